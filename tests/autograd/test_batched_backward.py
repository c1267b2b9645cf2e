"""A backward pass that is mapped over many gradients, where nothing transformed the forward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian, jacobian

import fusedmlp
import fusedmlp.functional as FF
from fusedmlp import fuse
from fusedmlp.autograd.mlp import Mlp
from fusedmlp.spec import philox

from ..nets import on_backend  # noqa: F401

ACTS = {"gelu": nn.GELU(), "relu": nn.ReLU(), "softplus": nn.Softplus(), "prelu": nn.PReLU()}


def _same_when_mapped(f, plain, x):
    """jacobian, Hessian, batched and vmapped gradients of f are those of plain PyTorch."""
    close = dict(rtol=1e-4, atol=1e-5)
    want = jacobian(plain, x)
    torch.testing.assert_close(jacobian(f, x, vectorize=True), want, **close)
    curved = [lambda t, g=g: g(t).square().sum() for g in (f, plain)]
    torch.testing.assert_close(
        hessian(curved[0], x, vectorize=True), hessian(curved[1], x), **close
    )
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    each = torch.eye(y.numel()).reshape(y.numel(), *y.shape)
    want = want.reshape(y.numel(), *x.shape)
    (got,) = torch.autograd.grad(y, leaf, each, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(got, want, **close)
    mapped = torch.func.vmap(lambda v: torch.autograd.grad(y, leaf, v, retain_graph=True)[0])
    torch.testing.assert_close(mapped(each), want, **close)


@pytest.mark.parametrize("act", ACTS)
def test_each_op(act, backend):
    linear = nn.Linear(6, 4)
    slope = ACTS[act].weight if act == "prelu" else None
    args = dict(slope=slope, backend=backend)
    _same_when_mapped(
        lambda x: FF.linear_act(x, linear.weight, linear.bias, act, **args),
        lambda x: ACTS[act](linear(x)),
        torch.randn(3, 6),
    )
    _same_when_mapped(
        lambda x: FF.bias_act_dropout(x, linear.bias, act, **args),
        lambda x: ACTS[act](x + linear.bias),
        torch.randn(3, 4),
    )


@pytest.mark.parametrize("act", ACTS)
def test_a_network_as_one_op(act, backend):
    plain = nn.Sequential(nn.Linear(6, 5), ACTS[act], nn.Linear(5, 3), ACTS[act])
    _same_when_mapped(fuse(plain), plain, torch.randn(4, 6))


def test_cross_entropy(backend):
    if fusedmlp.backends.registry._BY_NAME[backend].reasons_against(
        "cpu", torch.float32, "cross_entropy"
    ):
        pytest.skip("this backend has no cross_entropy for a CPU")
    target = torch.tensor([0, 2, 1])
    _same_when_mapped(
        lambda z: FF.cross_entropy(z, target, reduction="none", backend=backend),
        lambda z: F.cross_entropy(z, target, reduction="none"),
        torch.randn(3, 4),
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_weights_with_dropout(frozen, monkeypatch):
    net = fuse(nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Dropout(0.5), nn.Linear(5, 3)))
    net[0].weight.requires_grad_(not frozen)
    weights = [p for p in net.parameters() if p.requires_grad]
    x, keep = torch.randn(4, 6), philox.dropout_mask(3, 0, 4, 5, 0.5)
    with fusedmlp.dropout_state(3):
        y = net(x)
    by_hand = net[3](torch.where(keep, F.gelu(net[0](x)) * 2.0, 0.0))
    torch.testing.assert_close(y, by_hand)
    each = torch.eye(12).reshape(12, 4, 3)
    got, want = (
        torch.autograd.grad(of, weights, each, is_grads_batched=True) for of in (y, by_hand)
    )
    torch.testing.assert_close(got, want)


def test_the_usual_backward_of_a_network_is_still_one_op():
    assert Mlp.backward.__code__.co_names.count("is_batched") == 1
