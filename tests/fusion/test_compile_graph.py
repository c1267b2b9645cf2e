"""What compile_backend must not fuse, move or freeze: compiled models do what the models do."""

import random

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fusedmlp
from fusedmlp import fuse
from fusedmlp.backends import choice

from ..class_nets import Functional, Net, as_sequential, compiled, outputs_and_gradients
from ..nets import in_state, ops_called


class Odd(nn.Module):
    """Layers that could be fused, and something done between or after them."""

    def __init__(self, odd):
        super().__init__()
        self.fc, self.fc2, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ELU()
        self.odd = odd
        self.calls, self.kept = 0, []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.odd(self, x)


KEPT = []


def _layers(self, h):
    return self.fc2(F.gelu(self.fc(h)))


def _branch(self, x):
    h = _layers(self, x)
    return h.relu() if h.sum() > 0 else -h


def _random_depth(self, x):
    return _layers(self, x) if random.random() < 0.5 else F.relu(self.fc(x))


def _random_tensor(self, x):
    return _layers(self, x) + torch.randn(6)


def _constant(self, x):
    return _layers(self, x) + torch.arange(6)


def _counts(self, x):
    self.calls += 1
    return _layers(self, x) * self.calls


def _appends(self, x):
    self.kept.append(1)
    return _layers(self, x) * len(self.kept)


def _leaks(self, x):
    KEPT.append(F.relu(self.fc(x)))
    return KEPT[-1] * 2


def _counts_in_a_buffer(self, x):
    self.seen += 1
    return _layers(self, x) * self.seen


def _no_grad_in_between(self, x):
    h = self.fc(x)
    with torch.no_grad():
        h = F.gelu(h)
    return self.fc2(h + x)


def _no_grad_before_the_activation(self, x):
    h = self.fc(x)
    with torch.no_grad():
        torch.sin(x)
        a = F.gelu(h)
    return a * 2 + self.fc2(x)


def _autocast_from_the_second_layer_on(self, x):
    h = F.gelu(self.fc(x))
    with torch.autocast("cpu", torch.bfloat16):
        h = F.gelu(self.fc2(h))
    return h.float()


def _asks_for_a_type(self, x):
    return _layers(self, x) if isinstance(x, torch.Tensor) else x


def _prints(self, x):
    h = F.gelu(self.fc(x))
    print(h.shape)
    return self.fc2(F.gelu(h))


def _breaks_the_graph(self, x):
    h = self.fc(x)
    torch._dynamo.graph_break()
    return F.gelu(self.fc2(F.gelu(h)))


def _writes_into_its_output(self, x):
    h = self.act(self.fc(x))
    h += x
    return h


def _writes_by_a_function(self, x):
    h = self.act(self.fc(x))
    return F.hardtanh(h, -0.5, 0.5, True)


def _writes_into_a_part(self, x):
    h = self.act(self.fc(x))
    h[0] = 0
    return h


def _works_in_place(self, x):
    return self.fc2(F.relu_(self.fc(x)))


def _works_in_place_on_what_is_read_again(self, x):
    h = self.fc(x)
    F.relu(h, inplace=True)
    return self.fc2(F.gelu(h)) + h


def _writes_into_what_it_has_read(self, x):
    w, x = self.fc2.weight.detach().clone(), x.detach().clone()
    with torch.no_grad():
        h = F.gelu(F.linear(x, w))
        w.mul_(2)
        h = F.gelu(F.linear(h, w))
        x.mul_(2)
    return self.fc(h + x)


def _weights_made_in_between(self, x):
    h = F.gelu(self.fc(x))
    return F.gelu(F.linear(h, self.fc2.weight * 2, self.fc2.bias + 1))


def _one_layer_twice(self, x):
    return self.fc(F.gelu(self.fc(F.gelu(self.fc(x)))))


def _a_layer_read_twice(self, x):
    h = F.gelu(self.fc(x))
    return self.fc2(h) + h


def _a_weight_that_is_the_input(self, x):
    return F.gelu(F.linear(x[:6], x[:6]))


def _three_dimensions(self, x):
    return _layers(self, x.reshape(2, -1, 6)).flatten(0, 1)


def _one_dimension(self, x):
    return _layers(self, x[0]) + x


def _checkpointed(self, x):
    return checkpoint(lambda h: _layers(self, h), x, use_reentrant=False)


def _inside_vmap(self, x):
    return torch.vmap(lambda row: _layers(self, row))(x)


def _inside_grad(self, x):
    return torch.func.grad(lambda h: _layers(self, h).sum())(x) + x


def _the_gradient_of_itself(self, x):
    def loss(h):
        return F.softplus(self.fc(h)).sum()

    return torch.func.jacrev(loss)(x) + _layers(self, x)


def _dead_code(self, x):
    F.gelu(self.fc2(x))
    return _layers(self, x)


def _detached(self, x):
    return self.fc2(F.gelu(self.fc(x)).detach())


def _a_hook_of_a_tensor(self, x):
    h = F.gelu(self.fc(x))
    h.register_hook(lambda g: g * 2)
    return self.fc2(h)


ODD = [f for name, f in list(globals().items()) if name.startswith("_") and callable(f)]
ODD = [f for f in ODD if f is not _layers and f.__module__ == __name__]
# What another compiler traces differs in how a chain runs, not in what is found.
TRACED = [
    _autocast_from_the_second_layer_on,
    _works_in_place,
    _weights_made_in_between,
    _one_layer_twice,
    _three_dimensions,
    _inside_grad,
]
CASES = [(odd, "eager") for odd in ODD] + [(odd, "aot_eager") for odd in TRACED]


@pytest.mark.filterwarnings("ignore:.*torch.compile.*:UserWarning")
@pytest.mark.parametrize("odd, then", CASES, ids=lambda v: getattr(v, "__name__", f"_{v}")[1:])
def test_the_compiled_model_does_what_the_model_does(odd, then, capsys):
    def run(wrap):
        torch.manual_seed(1)
        net, results = Odd(odd), []
        model = wrap(net)
        KEPT.clear()
        random.seed(1)
        for rows in (4, 4, 12):
            torch.manual_seed(rows)
            x = torch.randn(rows, 6, requires_grad=True)
            y = model(x)
            leaves = [x, *net.parameters()]
            grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
            results += [y, *grads]
        return [*results, torch.tensor(net.calls), torch.tensor(len(net.kept)), net.seen]

    want, got = run(lambda net: net), run(lambda net: compiled(net, then=then))
    tolerance = 1e-2 if odd is _autocast_from_the_second_layer_on else 1e-5
    torch.testing.assert_close(got, want, rtol=10 * tolerance, atol=tolerance)


# Modules that are more than their class.


def test_hooks_run():
    net, x, seen = Functional(0.0), torch.randn(4, 6), []
    net.fc1.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    net.fc2.register_forward_hook(lambda m, args, y: y + 1)
    net.fc1.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].shape))
    want = net(x)
    seen.clear()
    model = compiled(net)
    y = model(x)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert seen == [(4, 16)]


def test_a_subclass_and_a_parametrised_layer_compute_what_they_are():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    net, x = Functional(0.0), torch.randn(4, 6)
    net.fc1 = Doubled(6, 16)
    net.fc2 = parametrizations.weight_norm(net.fc2)
    want, got = (outputs_and_gradients(m, x, [*net.parameters()]) for m in (net, compiled(net)))
    torch.testing.assert_close(got, want)


def test_layers_that_share_a_weight_have_the_sum_of_their_gradients():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.back = nn.Linear(6, 6), nn.Linear(6, 6)
            self.back.weight = self.fc.weight

        def forward(self, x):
            return self.back(torch.tanh(self.fc(x)))

    net, x = Tied(), torch.randn(4, 6)
    want, got = (outputs_and_gradients(m, x, [*net.parameters()]) for m in (net, compiled(net)))
    torch.testing.assert_close(got, want)


# What PyTorch wraps around it.


def test_under_autocast():
    net, x = Functional(), torch.randn(4, 6)
    fused = fuse(nn.Sequential(net.fc1, nn.ReLU(), nn.Dropout(0.5), net.fc2))
    model = compiled(net)
    model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = in_state(model, x), in_state(fused, x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_masks(reentrant):
    net, results = Functional(), []
    model = compiled(net)
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        x = torch.ones(4, 6, requires_grad=True)
        net.zero_grad()
        torch.manual_seed(2)
        y = run(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad.clone() for p in net.parameters())])
    torch.testing.assert_close(*results)


def test_double_backward():
    net, x = Functional(0.0, torch.tanh), torch.randn(4, 6, requires_grad=True)
    found = []
    for model in (net, compiled(net)):
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), [x, net.fc1.weight]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    net, x = Functional().to(dtype), torch.randn(9, 6, dtype=dtype)
    fused = fuse(nn.Sequential(net.fc1, nn.ReLU(), nn.Dropout(0.5), net.fc2))
    torch.testing.assert_close(in_state(compiled(net), x), in_state(fused, x))


def test_an_empty_batch():
    net = Functional()
    assert compiled(net)(torch.randn(0, 6)).shape == (0, 3)


def test_wide_layers_run_apart(monkeypatch):
    """Weights of more than 2 million elements are not for the op of a whole network, unmeasured."""
    monkeypatch.setattr(choice, "_measured", lambda *_: None)
    net, x = Functional(), torch.randn(9, 1500)
    net.fc1, net.fc2 = nn.Linear(1500, 1500), nn.Linear(1500, 3)
    fused = fuse(nn.Sequential(net.fc1, nn.ReLU(), nn.Dropout(0.5), net.fc2))
    model = compiled(net)
    for _ in range(2):
        torch.testing.assert_close(in_state(model, x), in_state(fused, x))
    assert "fusedmlp::mlp_fwd" not in ops_called(lambda: model(x))


def test_the_rest_of_a_large_model_stays_what_it_is():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Functional() for _ in range(2))
            self.back = nn.ModuleList(nn.Sequential(nn.Linear(3, 6), nn.ReLU()) for _ in range(2))
            self.norm, self.conv = nn.BatchNorm1d(6), nn.Conv1d(1, 2, 3, padding=1)

        def forward(self, x):
            for block, back in zip(self.blocks, self.back, strict=True):
                x = self.norm(x + back(block(x)))
            return self.conv(x[:, None]).flatten(1)

    net, x = Residual().eval(), torch.randn(5, 6)
    torch.testing.assert_close(compiled(net)(x), net(x))
    net.train()
    first, second = (in_state(compiled(net), x) for _ in range(2))
    assert torch.equal(first == 0, second == 0)


# What fuse and the report say.


def test_fuse_and_the_report_name_the_line():
    line = "torch.compile(model, backend=fusedmlp.compile_backend)"
    with pytest.warns(UserWarning, match="nothing in Net was fused") as found:
        fused = fuse(Net())
    assert line in str(found[0].message) and found[0].filename == __file__
    said = str(fusedmlp.report(fused))
    assert line in said and "lin1, lin2, lin3" in said
    assert "torch.compile" not in str(fusedmlp.report(fuse(as_sequential(Net()))))
    both = fuse(nn.ModuleList([Net(), as_sequential(Net())]))
    line = "torch.compile(fusedmlp.unfuse(model), backend=fusedmlp.compile_backend)"
    assert line in str(fusedmlp.report(both))
    for model in (compiled(Net()), Net()):
        model.compile(backend=fusedmlp.compile_backend)
        said = str(fusedmlp.report(model))
        assert "the model is compiled" in said and "torch.compile(" not in said


def test_the_log_says_what_was_fused(caplog):
    with caplog.at_level("INFO", "fusedmlp"):
        compiled(Functional())(torch.randn(4, 6))
    assert "compile_backend: one call for Linear, ReLU, Dropout, Linear" in caplog.text
