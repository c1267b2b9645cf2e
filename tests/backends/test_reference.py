"""The oracle is PyTorch: the reference backend in fp64 against F.* and finite differences."""

import pytest
import torch
import torch.nn.functional as F

import fusedmlp.functional as FF
from fusedmlp.spec import activations, philox

PLAIN = {
    "none": lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.01),
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu_squared": lambda z: F.relu(z).square(),
}
DOUBLE = dict(dtype=torch.float64)


def _tensors(act: str, m: int = 6, k: int = 5, n: int = 11):
    x, w = torch.randn(m, k, **DOUBLE), torch.randn(n, k, **DOUBLE)
    b = torch.randn(n, **DOUBLE)
    slope = torch.rand(n, **DOUBLE) if act == "prelu" else None
    return x, w, b, slope


def _expected(act: str, z: torch.Tensor, slope) -> torch.Tensor:
    return F.prelu(z, slope) if act == "prelu" else PLAIN[act](z)


@pytest.mark.parametrize("act", activations.NAMES)
def test_forward_and_gradients_are_those_of_torch(act):
    x, w, b, slope = (t if t is None else t.requires_grad_() for t in _tensors(act))
    leaves = [t for t in (x, w, b, slope) if t is not None]
    expected = _expected(act, F.linear(x, w, b), slope)
    got = FF.linear_act(x, w, b, act, slope=slope, backend="reference")
    dy = torch.randn_like(expected)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    )


@pytest.mark.parametrize("act", activations.NAMES)
def test_dropout_is_a_masked_and_scaled_activation(act):
    x, w, b, slope = _tensors(act)
    got = FF.linear_act(x, w, b, act, slope=slope, p=0.3, seed=5, stream=9, backend="reference")
    keep = philox.dropout_mask(5, 9, *got.shape, 0.3)
    expected = _expected(act, F.linear(x, w, b), slope)
    scale = philox.threshold_and_scale(0.3)[1]
    assert scale == torch.tensor(1 / 0.7, dtype=torch.float32).item()
    torch.testing.assert_close(got, torch.where(keep, expected * scale, 0.0))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("act", activations.NAMES)
def test_gradients_pass_gradcheck_and_gradgradcheck(act, p):
    x, w, b, slope = _tensors(act, 3, 4, 9)
    leaves = [t.requires_grad_() for t in (x, w, b, slope) if t is not None]

    def linear(x, w, b, slope=None):
        return FF.linear_act(x, w, b, act, slope=slope, p=p, seed=3, backend="reference")

    def elementwise(x, b, slope=None):
        return FF.bias_act_dropout(x, b, act, slope=slope, p=p, seed=3, backend="reference")

    assert torch.autograd.gradcheck(linear, leaves)
    assert torch.autograd.gradgradcheck(linear, leaves)
    leaves = [torch.randn(3, 9, **DOUBLE).requires_grad_(), *leaves[2:]]
    assert torch.autograd.gradcheck(elementwise, leaves)
    assert torch.autograd.gradgradcheck(elementwise, leaves)


@pytest.mark.parametrize("act", activations.TABLE, ids=lambda a: a.name)
def test_derivatives_of_the_table_agree(act):
    z = torch.linspace(-30, 30, 4001, **DOUBLE).requires_grad_()
    slope = torch.tensor(0.3, **DOUBLE)
    y = act.forward(z, slope)
    (expected,) = torch.autograd.grad(y.sum(), z)
    torch.testing.assert_close(act.from_z(z.detach(), slope), expected, atol=1e-12, rtol=1e-10)
    if act.from_y is not None:
        torch.testing.assert_close(act.from_y(y.detach(), slope), expected, atol=1e-12, rtol=1e-7)


def test_ids_are_positions_and_names_are_unique():
    assert [a.id for a in activations.TABLE] == list(range(len(activations.TABLE)))
    assert len(set(activations.NAMES)) == len(activations.NAMES)
