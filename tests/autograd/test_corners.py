"""Corners of both ops on every backend: NaN, infinities, signed zeros, empty sizes, no dropout."""

import pytest
import torch
import torch.nn.functional as F

import fusedmlp.functional as FF
from fusedmlp.backends.composite import _plain as plain_activation
from fusedmlp.spec import activations, philox

from ..check_op import DTYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = ("linear_act", "bias_act_dropout")

NAN, INF = float("nan"), float("inf")
CORNERS = [
    0.0,
    -0.0,
    1e-40,
    -1e-40,
    1e-30,
    -1e-30,
    1.0,
    -1.0,
    20.5,
    -20.5,
    300.0,
    -300.0,
    6e4,
    -6e4,
    INF,
    -INF,
    NAN,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", activations.NAMES)
def test_corners_are_those_of_torch(act, dtype, backend, device):
    """NaN, infinities, signed zeros and denormals come out as PyTorch's functions give them.

    PyTorch's vector and scalar code differ for smooth functions of an infinity or a NaN, and its
    16-bit code from its fp32 code where a step in between overflows: any of these is right. A
    derivative read off y is right to eps of its largest value; that of a NaN may be a NaN.
    """
    dtype = DTYPES[dtype]
    exact = act in ("none", "relu", "leaky_relu", "prelu")
    x = torch.tensor(CORNERS * 3, dtype=dtype, device=device).requires_grad_()
    slope = torch.tensor([0.25], dtype=dtype, device=device) if act == "prelu" else None
    y = FF.bias_act_dropout(x, None, act, slope=slope, backend=backend)
    got = y, torch.autograd.grad(y, x, torch.full_like(y, 0.5))[0]
    variants = [_torch_corners(act, x, slope, dtype, False)]
    if not exact:
        variants += [
            _torch_corners(act, x, slope, t, one)
            for t in (dtype, torch.float32)
            for one in (False, True)
        ]
    for i, name in enumerate(("y", "dx")):
        right = torch.zeros_like(x, dtype=torch.bool)
        for variant in variants:
            right |= _same_corner(got[i].detach(), variant[i].to(dtype), exact or name == "y")
            if name == "dx" and not exact:
                right |= (got[i] - variant[i]).abs() <= 2 * torch.finfo(dtype).eps
                right |= x.isnan() & got[i].isnan()
        assert right.all(), f"{name} at {x[~right].tolist()}: {got[i][~right].tolist()}"


def _torch_corners(act, x, slope, dtype, one_by_one):
    """Value and gradient by PyTorch, in `dtype`, all at once or element by element."""
    parts = [x.detach()[i : i + 1] for i in range(len(x))] if one_by_one else [x.detach()]
    out = []
    for part in parts:
        part = part.to(dtype).requires_grad_()
        y = plain_activation(
            activations.IDS[act], part, slope if slope is None else slope.to(dtype), 0.01
        )
        out.append((y.detach(), torch.autograd.grad(y, part, torch.full_like(y, 0.5))[0]))
    return [torch.cat(t) for t in zip(*out, strict=True)]


def _same_corner(got, want, signed):
    """Elementwise: the same NaN, infinity, zero with its sign, or a close number."""
    tiny = torch.finfo(got.dtype).smallest_normal
    zero = (want == 0) & (got == 0) & ((torch.signbit(got) == torch.signbit(want)) | (not signed))
    # PyTorch flushes some denormal results to 0.
    denormal = ~(want == 0) & (want.abs() <= tiny) & (got.abs() <= tiny)
    flushed = (want == 0) & ~(got == 0) & (got.abs() <= tiny)
    eps = torch.finfo(got.dtype).eps
    close = (got.double() - want.double()).abs() <= 4 * eps * want.double().abs()
    close |= got == want  # infinities
    return (got.isnan() & want.isnan()) | zero | denormal | flushed | (close & (want != 0))


@pytest.mark.parametrize("act", activations.NAMES)
@pytest.mark.parametrize("op", OPS)
def test_a_dropped_element_is_plus_zero_with_zero_gradient(op, act, backend, device):
    """Selected, never multiplied: also where the input is NaN or infinite, and at p = 1."""
    keep = philox.dropout_mask(5, 0, 4, len(CORNERS), 0.5)
    for p, dropped in ((0.5, ~keep), (1.0, torch.ones_like(keep))):
        x = torch.tensor([CORNERS] * 4, device=device)
        slope = torch.tensor([0.25], device=device) if act == "prelu" else None
        args = dict(slope=slope, p=p, seed=5, backend=backend)
        if op == "linear_act":
            b = x[0].clone().requires_grad_()
            zeros = torch.zeros(4, 3, device=device), torch.zeros(len(CORNERS), 3, device=device)
            y = FF.linear_act(*zeros, b, act, **args)
            leaf = b
        else:
            leaf = x.requires_grad_()
            y = FF.bias_act_dropout(leaf, None, act, **args)
        (dx,) = torch.autograd.grad(y, leaf, torch.full_like(y, INF))
        out = y.detach().cpu()[dropped]
        assert (out == 0).all() and not torch.signbit(out).any()
        if leaf.dim() == 2:
            assert (dx.cpu()[dropped] == 0).all()
        elif p == 1.0:
            assert (dx == 0).all()


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("m", "k", "n"), [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("act", ["none", "relu", "gelu", "prelu"])
def test_empty_sizes(act, m, k, n, p, backend, device):
    x = torch.randn(m, k, device=device, requires_grad=True)
    w = torch.randn(n, k, device=device, requires_grad=True)
    b = torch.randn(n, device=device, requires_grad=True)
    slope = torch.rand(1, device=device, requires_grad=True) if act == "prelu" else None
    y = FF.linear_act(x, w, b, act, slope=slope, p=p, seed=1, backend=backend)
    assert y.shape == (m, n)
    leaves = [t for t in (x, w, b, slope) if t is not None]
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert all(torch.isfinite(g).all() for g in grads)
    z = torch.randn(m, n, device=device, requires_grad=True)
    y = FF.bias_act_dropout(z, b, act, slope=slope, p=p, seed=1, backend=backend)
    assert y.shape == (m, n)
    torch.autograd.grad(y.sum(), [z, b])


def test_eval_and_p_0_are_no_dropout_and_take_no_seed(backend, device):
    x, w = torch.randn(4, 5, device=device), torch.randn(6, 5, device=device)
    before = torch.get_rng_state()
    for kwargs in (dict(p=0.5, training=False), dict(p=0.0)):
        y = FF.linear_act(x, w, None, "relu", backend=backend, **kwargs)
        torch.testing.assert_close(y, F.relu(F.linear(x, w)))
    assert FF.dropout(x, 0.5, training=False, backend=backend) is x
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_behind_a_clamp_is_0_where_relu_squared_overflows(dtype, backend, device):
    """0 times the derivative of an overflowed square, which once was 0 times infinity."""
    dtype = DTYPES[dtype]
    large = 3e19 if dtype != torch.float16 else 300.0
    x = torch.tensor([large, 1.0, -1.0, large] * 5, dtype=dtype, device=device)
    for p in (0.0, 0.3):
        got = x.clone().requires_grad_()
        y = FF.bias_act_dropout(got, None, "relu_squared", p=p, seed=1, backend=backend)
        y.clamp(max=8.0).sum().backward()
        kept = y.detach() != 0
        want = x.clone().requires_grad_()
        (F.relu(want).square() * kept).clamp(max=4.0).sum().backward()
        scale = philox.threshold_and_scale(p)[1] if p else 1.0
        torch.testing.assert_close(got.grad, want.grad * scale)
        assert want.grad[0] == 0


def test_the_second_derivative_there_is_no_nan_either():
    for backend in ("reference", None):
        x = torch.tensor([3e19, 2.0], requires_grad=True)
        y = FF.bias_act_dropout(x, None, "relu_squared", backend=backend).clamp(max=8.0)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert dx.tolist() == [0.0, 4.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu", "softplus", "elu", "relu_squared"])
def test_the_value_at_infinity_is_infinity(act, dtype, backend, device):
    """In every place of a vector, whatever the width of the processor's."""
    for n in (1, 7, 16, 33):
        x = torch.full((n,), INF, dtype=DTYPES[dtype], device=device)
        y = FF.bias_act_dropout(x, None, act, backend=backend)
        assert (y == INF).all(), f"{n}: {y.tolist()}"


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["relu", "relu_squared"])
def test_not_even_an_infinite_gradient_passes_a_relu_that_is_off(act, dtype, p, backend, device):
    x = torch.tensor([[-1.0, -0.0, 0.0, -INF] * 8], dtype=DTYPES[dtype], device=device)
    x.requires_grad_()
    y = FF.bias_act_dropout(x, None, act, p=p, seed=1, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, INF))
    assert (dx == 0).all(), dx
