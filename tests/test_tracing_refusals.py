"""What a trace would get wrong is left alone, with the reason."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedmlp
from fusedmlp import fuse

from .class_nets import Functional, reasons


class Odd(nn.Module):
    """One layer that could be fused, and something that a trace would get wrong."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.calls, self.kept = 0, []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.odd(x, F.dropout(F.relu(self.fc(x)), 0.5, self.training))


KEPT = []


def _branch(self, x, h):
    return h if h.sum() > 0 else -h


def _random_depth(self, x, h):
    return h if random.random() < 0.5 else x


def _random_tensor(self, x, h):
    return h + torch.randn(6)


def _constant(self, x, h):
    return h + torch.arange(6)


def _counts(self, x, h):
    self.calls += 1
    return h


def _appends(self, x, h):
    self.kept.append(h)
    return h


def _leaks(self, x, h):
    KEPT.append(h)
    return h


def _counts_in_a_buffer(self, x, h):
    self.seen += 1
    return h


def _no_grad(self, x, h):
    with torch.no_grad():
        return h * 2


def _asks_for_a_type(self, x, h):
    return h if isinstance(x, torch.Tensor) else x


def _prints(self, x, h):
    print(h.shape)
    return h


ODD = {
    _branch: "control flow",
    _random_depth: "draws random numbers",
    _random_tensor: "makes a tensor|draws random numbers",
    _constant: "makes a tensor",
    _counts: "changes the module's attributes",
    _appends: "changes the module's attributes",
    _leaks: "keeps a tensor",
    _counts_in_a_buffer: "torch.fx cannot trace it|changes the module's attributes",
    _no_grad: "grad mode|with block",
    _asks_for_a_type: "asks for the type",
    _prints: "prints",
}


@pytest.mark.parametrize("odd", ODD, ids=lambda f: f.__name__[1:])
def test_what_a_trace_would_get_wrong_is_left_alone_and_reported(odd, monkeypatch, capsys):
    monkeypatch.setattr(Odd, "odd", odd, raising=False)
    net = Odd().eval()
    torch.manual_seed(1)
    random.seed(1)
    states = torch.get_rng_state(), random.getstate()
    KEPT.clear()
    fused = fuse(net, trace=True)
    assert type(fused) is Odd
    assert any(reason in reasons(net) for reason in ODD[odd].split("|")), reasons(net)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert net.calls == 0 and net.kept == [] and net.seen == 0 and net.training is False
    assert not [k for k in vars(net) if k.startswith("_tensor_constant")]
    assert fused(torch.randn(3, 6)).shape == (3, 6)


def test_a_decorated_forward_is_left_alone():
    class Frozen(Functional):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    net = Frozen()
    assert type(fuse(net, trace=True)) is Frozen and "is decorated" in reasons(net)


def test_without_trace_the_report_says_what_trace_would_do():
    assert "call fusedmlp.fuse with trace=True" in str(fusedmlp.report(fuse(Functional())))


def test_an_output_that_is_written_to_is_left_alone():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            h = F.elu(self.fc(x))
            h += x
            return h

    assert "nothing in its forward has a fused form" in reasons(Writes())
