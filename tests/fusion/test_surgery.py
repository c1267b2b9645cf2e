"""fuse and unfuse: same objects, same keys; what cannot be fused is left alone, with the reason."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import fusedmlp
from fusedmlp import FusedMLP, FusedSequential, fuse, unfuse
from fusedmlp.fusion import surgery

from ..nets import Block, by_hand, in_state, mlp, on_backend, ops_called  # noqa: F401

# Same objects, same keys.


def test_children_parameters_and_keys_stay_the_same_objects():
    net = mlp()
    fused = fuse(net)
    assert type(net) is nn.Sequential and type(fused) is FusedSequential
    assert all(a is b for a, b in zip(net, fused, strict=True))
    assert type(fused[0]) is nn.Linear
    assert list(net.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(mlp().state_dict(), strict=True)
    mlp().load_state_dict(fused.state_dict(), strict=True)
    plain = unfuse(fused)
    assert type(plain) is nn.Sequential and all(a is b for a, b in zip(net, plain, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_is_no_sequential_keeps_its_class(inplace):
    model = Block()
    fused = fuse(model, inplace=inplace)
    assert (fused is model) == inplace
    assert type(fused) is Block and type(fused.body) is FusedSequential
    assert type(model.body) is (FusedSequential if inplace else nn.Sequential)
    assert fused.order[0] is fused.body and fused.head is model.head
    assert fused.calls is model.calls
    plain = unfuse(fused, inplace=inplace)
    assert type(plain.body) is nn.Sequential and "report" not in plain.__dict__
    assert plain.order[0] is plain.body
    assert torch.equal(plain.eval()(x := torch.randn(4, 6)), model.eval()(x))


def test_nested_at_any_depth_and_shared_modules_stay_shared():
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    model = nn.ModuleDict(
        {"a": nn.ModuleList([inner, nn.Sequential(inner, nn.ReLU())]), "b": inner}
    )
    fused = fuse(model)
    assert fused["b"] is fused["a"][0] is fused["a"][1][0]
    assert type(fused["b"]) is FusedSequential and type(inner) is nn.Sequential
    assert list(fused.state_dict()) == list(model.state_dict())
    assert len(list(fused.parameters())) == 2


def test_the_course_initialiser_gives_the_same_weights_before_and_after():
    def init_weights(m):
        if type(m) == nn.Linear:  # noqa: E721
            nn.init.normal_(m.weight, std=0.01)

    before, after = mlp(), fuse(mlp())
    torch.manual_seed(5)
    before.apply(init_weights)
    torch.manual_seed(5)
    after.apply(init_weights)
    for a, b in zip(fuse(before).state_dict().items(), after.state_dict().items(), strict=True):
        assert a[0] == b[0]
        if a[0].endswith("weight"):
            assert torch.equal(a[1], b[1])


def test_an_optimiser_made_before_fuse_trains_the_fused_net(backend):
    net = mlp(0.1)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    fused, x, target = fuse(net), torch.randn(16, 6), torch.randint(3, (16,))
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(fused(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_shared_weights_and_frozen_parameters(backend):
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh())
    net[2].weight = net[0].weight
    fused = fuse(net)
    net[2].bias.requires_grad_(False)
    fused(torch.randn(4, 6)).sum().backward()
    net.zero_grad(set_to_none=False)
    grad = net[0].weight.grad
    fused(x := torch.randn(4, 6)).sum().backward()
    want = torch.autograd.grad(by_hand(net, x).sum(), [net[0].weight])[0]
    torch.testing.assert_close(grad, want)
    assert net[2].bias.grad is None


def test_copies_are_independent_and_still_fused():
    for model in (fuse(mlp()), fuse(Block()), FusedMLP(6, [4], 3, dropout=0.5)):
        in_state(model, x := torch.randn(4, 6))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert str(fusedmlp.report(twin)) == str(fusedmlp.report(model))
            assert torch.equal(in_state(twin, x), in_state(model, x))
            next(twin.parameters()).data.zero_()
            assert not torch.equal(in_state(twin, x), in_state(model, x))


def test_torch_save_and_load(tmp_path):
    fused = fuse(mlp())
    torch.save(fused, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert (
        type(loaded) is FusedSequential and loaded.state_dict().keys() == fused.state_dict().keys()
    )


def test_fuse_twice_is_fuse_once():
    net = fuse(mlp())
    again = fuse(net)
    assert type(again) is FusedSequential and again is not net and again[0] is net[0]
    assert type(unfuse(again)) is nn.Sequential
    assert type(unfuse(fuse(FusedMLP(6, [4], 3)))) is nn.Sequential


# What is left alone, and the reason.


class MyLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class MySequential(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


def _hooked(register):
    def make():
        net = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        getattr(net[0], register)(lambda *a: None)
        return net

    return make


def _replaced_forward():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    net[0].forward = lambda x: 2 * x
    return net


REASONS = {
    "forward hook": (_hooked("register_forward_hook"), "it has hooks"),
    "forward pre-hook": (_hooked("register_forward_pre_hook"), "it has hooks"),
    "backward hook": (_hooked("register_full_backward_hook"), "it has hooks"),
    "backward pre-hook": (_hooked("register_full_backward_pre_hook"), "it has hooks"),
    "replaced forward": (_replaced_forward, "its forward was replaced"),
    "subclass": (lambda: nn.Sequential(MyLinear(6, 6), nn.ReLU()), "subclass of Linear"),
    "parametrised": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.ReLU()),
        "it is parametrised",
    ),
    "pruned": (
        lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5), nn.ReLU()),
        "it has hooks",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(6), nn.ReLU()), "LazyLinear is a subclass"),
    "elu": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ELU(2.0)), "alpha is 2"),
    "softplus": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Softplus(2.0)), "beta is 2"),
    "threshold": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Softplus(1, 5)), "threshold is 5"),
    "relu6": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU6()), "ReLU6 has no fused form"),
    "alpha dropout": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.AlphaDropout(0.0)),
        "AlphaDropout has no fused form",
    ),
    "dropout1d": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout1d(0.0)), "Dropout1d has no"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_fused_runs_as_it_is_and_says_why(case, backend):
    make, reason = REASONS[case]
    net = make()
    fused = fuse(net)
    assert not fusedmlp.report(fused).fused and reason in str(fusedmlp.report(fused))
    x, ys = torch.randn(5, 6), []
    assert ops_called(lambda: ys.append(fused(x))) == set()
    assert torch.equal(ys[0], net(x))


def test_a_subclass_of_sequential_is_left_alone_but_looked_into():
    net = nn.Sequential(MySequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU())))
    fused = fuse(net)
    assert type(fused[0]) is MySequential and type(fused[0][1]) is FusedSequential
    assert "MySequential is a subclass of nn.Sequential" in str(fusedmlp.report(fused))
    assert torch.equal(fused(x := torch.randn(4, 6)), net(x))


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_torchscript_inside_is_left_alone():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    net = nn.Sequential(scripted, nn.Linear(6, 6), nn.ReLU())
    fused = fuse(net)
    assert fused[0] is scripted and "ScriptModule has no fused form" in str(fusedmlp.report(fused))
    assert torch.equal(fused(x := torch.randn(4, 6)), net(x)) and torch.equal(fused(x), net(x))
    assert fuse(scripted) is scripted and unfuse(scripted) is scripted


def test_hooks_on_containers_go_on_working():
    net, seen = mlp(), []
    before = net.register_forward_hook(lambda m, a, y: seen.append(type(m)))
    fused = fuse(net)
    fused.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    fused(torch.randn(4, 6))
    before.remove()
    fused(torch.randn(4, 6))
    assert seen == ["pre", FusedSequential, "pre"]


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.parallel.DistributedDataParallel])
def test_a_wrapped_model_is_refused_unless_in_place(wrap, tmp_path):
    if wrap is not torch.compile:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
        )
    try:
        wrapped = wrap(mlp())
        with pytest.raises(ValueError, match="fuse: module must be a model that is not wrapped"):
            fuse(wrapped)
        assert fuse(wrapped, inplace=True) is wrapped
        inner = wrapped._orig_mod if wrap is torch.compile else wrapped.module
        assert type(inner) is FusedSequential
        if wrap is not torch.compile:
            wrapped(torch.randn(4, 6)).sum().backward()
            assert inner[0].weight.grad is not None
    finally:
        if wrap is not torch.compile:
            torch.distributed.destroy_process_group()


def test_a_module_compiled_in_place_is_refused():
    net = mlp()
    net.compile(backend="eager")
    with pytest.raises(ValueError, match="got a compiled Sequential"):
        fuse(net)


@pytest.mark.parametrize("f", [fuse, unfuse, fusedmlp.report, surgery.assign_streams])
def test_only_modules_are_taken(f):
    with pytest.raises(TypeError, match="module must be an nn.Module, got function"):
        f(F.relu)
