"""Models written as classes through torch.compile(model, backend=fusedmlp.compile_backend)."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

import fusedmlp
from fusedmlp import fuse
from fusedmlp.backends import choice

from ..class_nets import (
    Functional,
    Net,
    as_sequential,
    compiled,
    dropout_of_ones_own,
    outputs_and_gradients,
)
from ..nets import assert_same, in_state, on_backend, ops_called  # noqa: F401

THEN = ["eager", "aot_eager"]


def same_as_fused(net, sequential, x, **options):
    """Outputs, masks and gradients of both, for masks of torch's generator and of dropout_state."""
    model, fused = compiled(net, **options), fuse(sequential)
    leaves = [*net.parameters()]
    want, got = (outputs_and_gradients(m, x, leaves) for m in (fused, model))
    torch.testing.assert_close(got, want)
    assert torch.equal(got[0] == 0, want[0] == 0)
    for row_offset in (0, 3):
        outputs = []
        for m in (model, fused):
            with fusedmlp.dropout_state(7, 40, row_offset):
                outputs.append(m(x))
        torch.testing.assert_close(*outputs)
        assert torch.equal(*(y == 0 for y in outputs))
    return model


# The course's Net.


@pytest.mark.parametrize("then", THEN)
def test_the_net_of_the_course_is_its_sequential(then, backend, device):
    net, x = Net(), torch.randn(32, 784, device=device)
    model = same_as_fused(net, as_sequential(net), x, then=then)
    assert not torch.equal(model(x), model(x))
    assert_same(as_sequential(net), model, x)
    net.eval()
    torch.testing.assert_close(model(x), net(x))


def test_on_a_cpu_it_is_one_op_and_one_node_of_autograd(monkeypatch):
    # Of a CPU that was measured plain PyTorch may be the faster one.
    monkeypatch.setattr(choice, "_measured", lambda *_: None)
    net, x = Net(), torch.randn(32, 784)
    model = compiled(net)
    y = model(x)
    if fusedmlp.explain(p=0.5).choice != "native":
        pytest.skip("the extension cannot run here")
    assert y.grad_fn.name() == "MlpBackward"
    assert ops_called(lambda: model(x).sum().backward()) == {
        "fusedmlp::mlp_fwd",
        "fusedmlp::mlp_bwd",
    }
    assert torch.equal(in_state(model, x), in_state(fuse(as_sequential(net)), x))


def test_a_dropout_of_ones_own_stays_what_it_is():
    net, x = Net(dropout_of_ones_own), torch.randn(300, 784)
    model = compiled(net)
    torch.manual_seed(5)
    got = model(x)
    torch.manual_seed(5)
    torch.testing.assert_close(got, net(x))


def test_an_optimiser_made_before_trains_it():
    torch.manual_seed(0)
    net, x, y = Functional(0.1), torch.randn(32, 6), torch.randint(3, (32,))
    optimiser, losses = torch.optim.SGD(net.parameters(), lr=0.3), []
    model = compiled(net)
    for _ in range(60):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_in_place_the_model_keeps_its_class_and_its_keys():
    net, x = Functional(), torch.randn(9, 6)
    keys, fused = list(net.state_dict()), fuse(_as_sequential(net))
    torch._dynamo.reset()
    net.compile(backend=fusedmlp.compile_backend)
    assert type(net) is Functional and list(net.state_dict()) == keys
    torch.testing.assert_close(in_state(net, x), in_state(fused, x))


def _as_sequential(net):
    return nn.Sequential(net.fc1, nn.ReLU(), nn.Dropout(net.p), net.fc2)


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
    net, x = Functional(act=act), torch.randn(9, 6, device=device)
    model = compiled(net, then="eager")
    ops = " ".join(ops_called(lambda: model(x)))
    assert "fusedmlp::linear_act" in ops or "fusedmlp::mlp" in ops
    torch.testing.assert_close(model.eval()(x), net(x))


def test_prelu_and_dropout_by_itself():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 8), nn.PReLU(8), nn.Dropout(0.2))
    x = torch.randn(5, 6, requires_grad=True)
    for then in THEN:
        same_as_fused(net, net, x, then=then)
    with fusedmlp.use_backend("reference"):
        same_as_fused(net, net, x)


def test_masks_are_counted_as_in_a_container_with_other_modules_between():
    net = nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.LayerNorm(8),
        nn.Linear(8, 4),
        nn.Dropout(0.3),
    )
    same_as_fused(net, net, torch.randn(7, 6))


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
    model = compiled(net)
    for call in (
        lambda m: m(x, y=y),
        lambda m: m(y=y, x=x),
        lambda m: m(x, y, scale=3.0),
        lambda m: m(x, 1.0),
    ):
        got, want = call(model), call(net)
        torch.testing.assert_close(got["h"], want["h"])
        assert type(got) is dict and type(got["both"]) is tuple


# What may be different in each call.


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_any_batch_size(dynamic):
    net = Net()
    fused = fuse(as_sequential(net))
    torch._dynamo.reset()
    model = torch.compile(net, backend=fusedmlp.compile_backend, dynamic=dynamic)
    sizes = (8, 32, 7, 1, 300, 32)
    for rows in sizes if dynamic is False else (*sizes, 9, 10, 11, 12, 13, 14):
        x = torch.randn(rows, 784)
        torch.testing.assert_close(in_state(model, x), in_state(fused, x))


def test_the_mode_is_followed():
    net, x = Net().eval(), torch.randn(8, 784)
    model = compiled(net)
    assert torch.equal(model(x), model(x))
    net.train()
    assert not torch.equal(model(x), model(x))
    net.eval()
    torch.testing.assert_close(model(x), net(x))


def test_gradients_are_recorded_where_they_are_wanted():
    net, x = Functional(), torch.randn(4, 6)
    model = compiled(net)
    for _ in range(2):
        assert model(x).requires_grad
        with torch.no_grad():
            assert not model(x).requires_grad
        with torch.inference_mode():
            assert model(x).is_inference()
    net.requires_grad_(False)
    assert not model(x).requires_grad
    net.fc2.weight.requires_grad_(True)
    model(x).sum().backward()
    assert net.fc2.weight.grad is not None and net.fc1.weight.grad is None


def test_what_the_forward_reads_may_change():
    net, x = Functional(0.5), torch.randn(4, 6)
    model = compiled(net)
    for p in (0.5, 0.25, 0.75, 1.0):
        net.p = p
        torch.testing.assert_close(in_state(model, x), in_state(fuse(_as_sequential(net)), x))
    net.act = torch.tanh
    net.fc1 = nn.Linear(6, 16)
    net.eval()
    torch.testing.assert_close(model(x), net(x))
    with torch.no_grad():
        net.fc1.weight.mul_(2)
    torch.testing.assert_close(model(x), net(x))


def test_the_backend_of_each_call_is_followed():
    model, x = compiled(Functional()), torch.randn(4, 6)
    for name in ("native", "reference", "native"):
        if name == fusedmlp.explain(p=0.5).choice or name == "reference":
            with fusedmlp.use_backend(name):
                ops = ops_called(lambda: model(x))
            assert ("fusedmlp::mlp_fwd" in ops) == (name == "native")


def test_networks_of_one_class_keep_their_own_parameters():
    nets, x = [Functional(0.0) for _ in range(3)], torch.randn(5, 6)
    torch._dynamo.reset()
    models = [torch.compile(net, backend=fusedmlp.compile_backend) for net in nets]
    for _ in range(2):
        for net, model in zip(nets, models, strict=True):
            torch.testing.assert_close(model(x), net(x))


def test_threads_that_share_a_graph_do_not_mix_parameters():
    nets, x = [Functional(0.0) for _ in range(2)], torch.randn(5, 6)
    torch._dynamo.reset()
    models = [torch.compile(net, backend=fusedmlp.compile_backend) for net in nets]
    wants = [net(x) for net in nets]
    for model in models:
        model(x)
    wrong = []

    def work(model, want):
        for _ in range(200):
            if not torch.allclose(model(x), want, atol=1e-5):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, wants, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_functional_call_replaces_parameters():
    net, x = Functional(0.0), torch.randn(4, 6)
    model = compiled(net)
    model(x)
    zeros = {f"_orig_mod.{name}": torch.zeros_like(p) for name, p in net.named_parameters()}
    assert not torch.func.functional_call(model, zeros, (x,)).any()


def test_the_generator_is_used_by_dropout_alone():
    net, x = Functional(), torch.randn(4, 6)
    model = compiled(net)
    net.eval()
    state = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), state)
    net.train()
    model(x)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_model_that_is_gone_leaves_no_parameter_behind():
    net = Functional()
    model = compiled(net)
    model(torch.randn(4, 6)).sum().backward()
    weight = weakref.ref(net.fc1.weight)
    del net, model
    gc.collect()
    assert weight() is None


# What comes after this pass.


def test_a_graph_without_groups_is_left_to_the_other_compiler():
    x = torch.randn(4)
    for then in THEN:
        f = compiled(lambda x: x.sin() + 1, then=then)
        torch.testing.assert_close(f(x), x.sin() + 1)


def test_options_that_the_other_backend_does_not_take_are_refused():
    f = compiled(torch.sin, then="eager", max_autotune=True)
    with pytest.raises(Exception, match="mode and options must be left out with 'eager'"):
        f(torch.randn(3))


def test_inductor_compiles_the_rest():
    net, x = Functional(), torch.randn(9, 6)
    same_as_fused(net, _as_sequential(net), x, then="inductor")


def test_a_fused_model_runs_too():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5))
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.body(x)).relu()

    fused, x = fuse(Mixed()), torch.randn(9, 6)
    torch.testing.assert_close(in_state(compiled(fused), x), in_state(fused, x))
    plain = copy.deepcopy(fused).eval()
    torch.testing.assert_close(compiled(plain)(x), plain(x))
