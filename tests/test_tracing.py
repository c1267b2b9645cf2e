"""Models written as classes: fused where a trace is the forward, left alone where it is not."""

import copy
import io
import pickle
import random

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import fusedmlp
from fusedmlp import FusedSequential, activations, functional, fuse, surgery, unfuse

from .nets import assert_same, in_state, ops_called


class Net(nn.Module):
    """The course's: 784-256-256-10 with dropout 0.2 and 0.5 while training."""

    def __init__(self, dropout=F.dropout):
        super().__init__()
        self.lin1 = nn.Linear(784, 256)
        self.lin2 = nn.Linear(256, 256)
        self.lin3 = nn.Linear(256, 10)
        self.relu = nn.ReLU()
        self.dropout = dropout

    def forward(self, x):
        h = self.relu(self.lin1(x.reshape((-1, 784))))
        if self.training:
            h = self.dropout(h, 0.2)
        h = self.relu(self.lin2(h))
        if self.training:
            h = self.dropout(h, 0.5)
        return self.lin3(h)


class Functional(nn.Module):
    """F.relu(self.fc1(x)), F.dropout(x, p, self.training): the other way to write it."""

    def __init__(self, p=0.5, act=F.relu):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 3)
        self.p, self.act = p, act

    def forward(self, x):
        return self.fc2(F.dropout(self.act(self.fc1(x)), self.p, self.training))


def dropout_of_ones_own(h, p):
    return (torch.rand_like(h) >= p) * h / (1 - p)


def as_sequential(net):
    return nn.Sequential(
        net.lin1, nn.ReLU(), nn.Dropout(0.2), net.lin2, nn.ReLU(), nn.Dropout(0.5), net.lin3
    )


def parts(model):
    return [part.modules for part in surgery.report(model).fused]


def reasons(model):
    return "\n".join(surgery.report(fuse(model, trace=True)).notes)


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
    assert "fusedmlp::linear_act" in " ".join(ops_called(lambda: fused(x)))
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
    first = [block.first_layer for block in fused.blocks]
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


# Left alone, with the reason.


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
    assert "call fusedmlp.fuse with trace=True" in str(fuse(Functional()).report())


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


# Under torch.compile.


def _outputs_and_gradients(model, x, parameters):
    torch.manual_seed(3)
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), parameters)]


def test_compiled_with_the_masks_of_eager():
    fused, x = fuse(Functional(), trace=True), torch.randn(9, 6)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with fusedmlp.use_backend("reference"):
        for mode in (True, False):
            fused.train(mode)
            want, got = (
                _outputs_and_gradients(m, x, [*fused.parameters()]) for m in (fused, compiled)
            )
            torch.testing.assert_close(got, want)
        fused.train()
        fused.p = 1.0
        torch.testing.assert_close(compiled(x), fused(x))


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_the_compile_backend_gives_what_fuse_gives(then, backend, device, monkeypatch):
    run, ran = functional.run_linear_act, []
    monkeypatch.setattr(functional, "run_linear_act", lambda *a: ran.append(a[5]) or run(*a))
    net, x = Net(), torch.randn(8, 784, device=device)
    fused, leaves = fuse(net, trace=True), [*net.parameters()]
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=fusedmlp.compile_backend, options={"then": then})
    want, got = (_outputs_and_gradients(m, x, leaves) for m in (fused, compiled))
    torch.testing.assert_close(got, want)
    assert torch.equal(got[0] == 0, want[0] == 0)
    for row_offset in (0, 3):
        with fusedmlp.dropout_state(7, 40, row_offset):
            got = compiled(x)
        with fusedmlp.dropout_state(7, 40, row_offset):
            torch.testing.assert_close(got, fused(x))
    assert not torch.equal(compiled(x), compiled(x))
    net.eval(), fused.eval()
    ran.clear()
    torch.testing.assert_close(compiled(x), fused(x))
    assert set(ran) == {activations.RELU}  # one call for each stretch, more where it is traced


def test_the_compile_backend_fuses_prelu_and_dropout_by_itself():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 8), nn.PReLU(8), nn.Dropout(0.2))
    fused, x = fuse(net), torch.randn(5, 6, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=fusedmlp.compile_backend, options={"then": "eager"})
    with fusedmlp.use_backend("reference"):
        leaves = [*net.parameters(), x]
        want, got = (_outputs_and_gradients(m, x, leaves) for m in (fused, compiled))
    torch.testing.assert_close(got, want)


def test_the_compile_backend_leaves_a_graph_without_stretches_to_the_other():
    torch._dynamo.reset()
    f = torch.compile(
        lambda x: x.sin() + 1, backend=fusedmlp.compile_backend, options={"then": "aot_eager"}
    )
    x = torch.randn(4)
    torch.testing.assert_close(f(x), x.sin() + 1)


def test_options_that_the_other_backend_does_not_take_are_refused():
    torch._dynamo.reset()
    f = torch.compile(
        torch.sin, backend=fusedmlp.compile_backend, options={"then": "eager", "max_autotune": True}
    )
    with pytest.raises(Exception, match="mode and options must be left out with 'eager'"):
        f(torch.randn(3))


# The report on an input.


@pytest.mark.parametrize("trace", [True, False])
def test_the_report_on_an_input_measures_and_leaves_everything_as_it_was(trace):
    model = Net() if trace else nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU())
    model.eval()
    fused, x = fuse(model, trace=trace), torch.randn(64, 784 if trace else 6)
    before, state = copy.deepcopy(fused.state_dict()), torch.get_rng_state()
    with fusedmlp.use_backend("reference"):
        report = fuse(model, trace=trace).report(x)
    measured = report.measured
    assert measured.milliseconds_plain > 0 and measured.milliseconds_fused > 0
    assert str(measured) in str(report) and "kept for backward" in str(measured)
    if trace:
        # Each activation and mask besides: 64 rows of 512 hidden units, 4 bytes each.
        assert measured.bytes_plain - measured.bytes_fused >= 64 * 512 * 4
    assert not any(m.training for m in fused.modules())
    assert all(p.grad is None for p in fused.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in fused.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_report_says_what_it_needs_where_nothing_depends_on_a_parameter():
    class Detached(Functional):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="report: the module must give a tensor"):
        fuse(Detached()).report(torch.randn(4, 6))
