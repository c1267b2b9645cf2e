"""Nets that the tests of modules and of fuse share, and what they give module by module."""

import contextlib

import pytest
import torch
from torch import nn

import fusedmlp
from fusedmlp.spec import philox

SEED, STREAM = 7, 40


def mlp(p=0.5, act=nn.ReLU):
    """Flat net of three layers; layer 0 and 1 drop."""
    return nn.Sequential(
        nn.Linear(6, 16),
        act(),
        nn.Dropout(p),
        nn.Linear(16, 9),
        act(),
        nn.Dropout(p),
        nn.Linear(9, 3),
    )


class Block(nn.Module):
    """Not a Sequential, and names one of its children twice."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 3)
        self.order = [self.body, self.head]
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        for m in self.order:
            x = m(x)
        return x


def by_hand(net, x, layers=(0, 1)):
    """What net gives inside dropout_state, module by module; `layers` of those that drop."""
    layers = iter(layers)
    for m in net:
        if type(m) is nn.Dropout and m.training and m.p > 0:
            rows = x.shape[:-1].numel()
            stream = STREAM + next(layers)
            keep = philox.dropout_mask(SEED, stream, rows, x.shape[-1], m.p, device=x.device)
            x = torch.where(keep.reshape(x.shape), x * (1 / (1 - m.p)), 0.0)
        else:
            x = m(x)
    return x


def in_state(net, x):
    with fusedmlp.dropout_state(SEED, STREAM):
        return net(x)


def assert_same(net, fused, x):
    """Values and all gradients of a flat net are those of its modules one by one."""
    leaves = [*net.parameters(), x.requires_grad_()]
    got, want = in_state(fused, x), by_hand(net, x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
    )


def ops_called(f):
    """Names of this package's ops that f runs."""
    with torch.profiler.profile() as profile:
        f()
    return {e.key for e in profile.key_averages() if e.key.startswith("fusedmlp::")} - {
        "fusedmlp::draw_seed"
    }


@pytest.fixture(autouse=True)
def on_backend(request):
    """A test that takes `backend` runs on it, whatever the sizes, and on its device."""
    if "backend" not in request.fixturenames:
        yield
        return
    device = request.getfixturevalue("device")
    where = contextlib.nullcontext() if device == "cpu" else torch.device(device)
    with where, fusedmlp.use_backend(request.getfixturevalue("backend")):
        yield
