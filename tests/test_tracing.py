"""Models written as classes are fused where a trace is the forward."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedmlp import FusedSequential, fuse, unfuse

from .class_nets import Functional, Net, as_sequential, dropout_of_ones_own, parts
from .nets import assert_same, in_state, ops_called

# The course's Net.


def test_the_net_of_the_course_is_its_sequential(backend, device):
    net = Net()
    fused = fuse(net, trace=True)
    assert isinstance(fused, Net) and type(net) is Net
    assert list(fused.state_dict()) == list(net.state_dict())
    assert all(a is b for a, b in zip(net.parameters(), fused.parameters(), strict=True))
    assert [names[0] for names in parts(fused)] == ["lin1", "lin2"]
    assert all(len(names) == 3 for names in parts(fused))
    x = torch.randn(32, 784, device=device)
    want = in_state(fuse(as_sequential(net)), x)
    assert torch.equal(in_state(fused, x), want)
    assert_same(as_sequential(net), fused, x)


def test_train_and_eval_are_followed_afterwards():
    fused, x = fuse(Net().eval(), trace=True), torch.randn(8, 784)
    assert torch.equal(fused(x), fused(x))
    assert not torch.equal(fused.train()(x), fused(x))
    torch.testing.assert_close(fused.eval()(x), unfuse(fused)(x))


def test_a_dropout_of_ones_own_stays_what_it_is():
    torch.manual_seed(3)
    net, x = Net(dropout_of_ones_own), torch.randn(300, 784)
    fused = fuse(net, trace=True)
    assert [len(names) for names in parts(fused)] == [2, 2]
    torch.manual_seed(5)
    got = fused(x)
    torch.manual_seed(5)
    torch.testing.assert_close(got, net(x))


def test_an_optimiser_made_before_trains_the_fused_net():
    torch.manual_seed(0)
    net, x, y = Functional(0.1), torch.randn(32, 6), torch.randint(3, (32,))
    optimiser, losses = torch.optim.SGD(net.parameters(), lr=0.3), []
    fused = fuse(net, trace=True)
    for _ in range(60):
        optimiser.zero_grad()
        loss = F.cross_entropy(fused(x), y)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


# What is recognised.

ACTS = [F.relu, torch.relu, F.gelu, F.silu, F.elu, F.leaky_relu, torch.tanh, torch.sigmoid]
ACTS += [
    F.softplus,
    lambda x: x.relu(),
    lambda x: x.tanh(),
    lambda x: F.gelu(x, approximate="tanh"),
]


@pytest.mark.parametrize("act", ACTS, ids=lambda a: getattr(a, "__name__", "act"))
def test_functions_of_activations_are_fused(act, backend, device):
    net = Functional(act=act)
    fused, x = fuse(net, trace=True), torch.randn(9, 6, device=device)
    assert [len(names) for names in parts(fused)] == [3]
    ops = " ".join(ops_called(lambda: fused(x)))
    assert "fusedmlp::linear_act" in ops or "fusedmlp::mlp" in ops
    torch.testing.assert_close(fused.eval()(x), net.eval()(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_unfuse_gives_the_class_back(inplace):
    net = Functional()
    fused = fuse(net, trace=True, inplace=inplace)
    assert (fused is net) == inplace and type(fused).__name__ == "FusedFunctional"
    plain = unfuse(fused, inplace=inplace)
    assert type(plain) is Functional and "_traces" not in plain.__dict__
    assert type(fuse(Functional())) is Functional


def test_modules_inside_modules_have_traces_and_masks_of_their_own():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Functional() for _ in range(2))
            self.back = nn.ModuleList(nn.Sequential(nn.Linear(3, 6), nn.ReLU()) for _ in range(2))

        def forward(self, x):
            for block, back in zip(self.blocks, self.back, strict=True):
                x = x + back(block(x))
            return x

    net, x = Residual(), torch.randn(5, 6)
    fused = fuse(net, trace=True)
    assert len(parts(fused)) == 4 and type(fused.back[0]) is FusedSequential
    first = [block._stream_offset for block in fused.blocks]
    assert len(set(first)) == 2
    torch.testing.assert_close(fused.eval()(x), net.eval()(x))


def test_two_inputs_keywords_and_several_outputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x, y, scale=None):
            h = F.gelu(self.fc(x + y))
            if scale is not None:
                h = h * scale
            return {"h": h, "both": (h, y)}

    net, x, y = Pair(), torch.randn(300, 6), torch.randn(300, 6)
    fused = fuse(net, trace=True)
    for call in (
        lambda m: m(x, y),
        lambda m: m(x, y=y),
        lambda m: m(y=y, x=x),
        lambda m: m(x, y, 2.0),
        lambda m: m(x, y, scale=3.0),
        lambda m: m(x, 1.0),
    ):
        got, want = call(fused), call(net)
        torch.testing.assert_close(got["h"], want["h"])
        assert type(got) is dict and type(got["both"]) is tuple


# What a trace must not freeze.


def test_what_the_forward_reads_may_change_afterwards():
    net, x = Functional(0.5), torch.randn(4, 6)
    fused = fuse(net, trace=True)
    fused(x)
    fused.p = 1.0
    assert torch.equal(fused(x), net.fc2.bias.expand(4, 3))
    fused.act = torch.tanh
    fused.fc1 = nn.Linear(6, 16)
    fused.eval()
    torch.testing.assert_close(fused(x), unfuse(fused)(x))
    with torch.no_grad():
        fused.fc1.weight.mul_(2)
    torch.testing.assert_close(fused(x), unfuse(fused)(x))


def test_a_config_object_and_a_list_of_layers_may_change_afterwards():
    class Config:
        p, depth = 0.5, 1

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Config()
            self.config.p = 0.5
            self.layers = nn.ModuleList([nn.Linear(6, 6)])

        def forward(self, x):
            for layer in self.layers:
                x = F.dropout(F.relu(layer(x)), self.config.p, self.training)
            return x

    fused, x = fuse(Deep(), trace=True), torch.randn(4, 6)
    fused(x)
    fused.config.p = 1.0
    assert not fused(x).any()
    fused.layers.append(nn.Linear(6, 6))
    torch.testing.assert_close(fused.eval()(x), unfuse(fused)(x))


def test_one_that_changes_in_every_call_runs_as_it_is():
    net, x = Functional(0.0), torch.randn(4, 6)
    fused = fuse(net, trace=True)
    for i in range(20):
        fused.p = i / 100
        fused(x)
    assert len(fused._traces) < 10
    fused.p = 0.0
    torch.testing.assert_close(fused(x), net(x))


def test_hooks_on_children_and_on_the_model_run():
    fused, x, seen = fuse(Functional(), trace=True), torch.randn(4, 6), []
    fused(x)
    fused.fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    fused.register_forward_hook(lambda *_: seen.append("model"))
    fused(x)
    assert seen == ["fc1", "model"]


# Copies.


def test_copies_and_pickles_run_fused_and_have_parameters_of_their_own():
    fused, x = fuse(Functional(), trace=True), torch.randn(4, 6)
    fused(x)
    saved = io.BytesIO()
    torch.save(fused, saved)
    saved.seek(0)
    copies = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
    copies.append(torch.load(saved, weights_only=False))
    for other in copies:
        assert type(other) is type(fused) and parts(other) == parts(fused)
        assert torch.equal(in_state(other, x), in_state(fused, x))
        with torch.no_grad():
            other.fc2.bias.add_(1)
        assert not torch.equal(in_state(other, x), in_state(fused, x))


def test_a_shallow_copy_has_a_mode_of_its_own():
    fused, x = fuse(Functional(), trace=True), torch.randn(4, 6)
    other = copy.copy(fused)
    other.training = False
    assert torch.equal(other(x), other(x)) and not torch.equal(fused(x), fused(x))


def test_functional_call_replaces_parameters():
    fused, x = fuse(Functional(0.0), trace=True), torch.randn(4, 6)
    zeros = {name: torch.zeros_like(p) for name, p in fused.named_parameters()}
    assert not torch.func.functional_call(fused, zeros, (x,)).any()
