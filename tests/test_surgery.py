"""fuse and unfuse: same objects, same keys, same numbers; what cannot be fused runs as it is."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fusedmlp
from fusedmlp import FusedLinear, FusedMLP, FusedSequential, dispatch, fuse, rng, surgery, unfuse
from fusedmlp.nn import ReLUSquared

SEED, STREAM = 7, 40


def mlp(p=0.5, act=nn.ReLU):
    """Flat net of three stretches; layer 0 and 1 drop."""
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
            keep = rng.dropout_mask(SEED, stream, rows, x.shape[-1], m.p, device=x.device)
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
def _on(request):
    """A test that takes `backend` runs on it, whatever the sizes, and on its device."""
    if "backend" not in request.fixturenames:
        yield
        return
    device = request.getfixturevalue("device")
    where = contextlib.nullcontext() if device == "cpu" else torch.device(device)
    with where, fusedmlp.use_backend(request.getfixturevalue("backend")):
        yield


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.2),
    nn.LeakyReLU(-0.1),
    nn.PReLU(),
    nn.PReLU(16),
    nn.ELU(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Softplus(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    ReLUSquared(),
]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_every_activation_is_fused_and_equal(act, bias, backend):
    net = nn.Sequential(nn.Linear(6, 16, bias=bias), act, nn.Dropout(0.5), nn.Linear(16, 3))
    fused = fuse(net)
    assert len(fused.report().fused) == 1
    assert_same(net, fused, torch.randn(5, 6))


@pytest.mark.parametrize(
    "modules, ops",
    [
        ([nn.Linear(6, 6), nn.ReLU()], 1),
        ([nn.Linear(6, 6), nn.Dropout(0.5)], 1),
        ([nn.ReLU(), nn.Dropout(0.5)], 1),
        ([nn.Dropout(0.5)], 1),
        ([nn.Linear(6, 6)], 0),
        ([nn.ReLU()], 0),
        ([nn.Dropout(0.5), nn.ReLU()], 1),
        ([nn.ReLU(), nn.Identity(), nn.Dropout(0.5)], 1),
        ([nn.ReLU(), nn.ReLU(), nn.Dropout(0.5)], 1),
        ([], 0),
    ],
    ids=lambda v: "-".join(type(m).__name__ for m in v) if isinstance(v, list) else "",
)
def test_any_part_of_a_stretch_may_be_missing(modules, ops, backend):
    net = nn.Sequential(*modules)
    fused = fuse(net)
    assert len(fused.report().fused) == ops
    torch.testing.assert_close(in_state(fused, torch.ones(5, 6)), by_hand(net, torch.ones(5, 6)))


@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (2, 3, 6)])
def test_any_leading_shape(shape, backend):
    net = mlp()
    torch.testing.assert_close(in_state(fuse(net), x := torch.randn(shape)), by_hand(net, x))


def test_flatten_in_between(backend):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), *mlp()).train()
    net[2] = nn.Linear(2 * 4 * 4, 16)
    x = torch.randn(3, 1, 6, 6)
    torch.testing.assert_close(in_state(fuse(net), x), by_hand(net, x))


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
    assert str(fused.report()) == str(surgery.report(fused))
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
    fused, x, target = fuse(net), torch.randn(64, 6), torch.randint(3, (64,))
    losses = []
    for _ in range(30):
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
            assert str(twin.report()) == str(model.report())
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


def test_the_list_operations_of_a_sequential():
    net, x = fuse(mlp()), torch.randn(4, 6)
    assert type(net[:3]) is FusedSequential and net[:3][0] is net[0]
    assert type(FusedMLP(6, [4], 3)[1:]) is FusedSequential
    assert len(net + net) == 14 and type(net + net) is FusedSequential
    assert len(net * 2) == 14 and type(net * 2) is FusedSequential
    whole = net[:3] + net[3:]
    assert torch.equal(in_state(whole, x), in_state(net, x))
    net.append(nn.Dropout(0.5)).insert(0, nn.Identity())
    torch.testing.assert_close(in_state(net, x), by_hand(net, x))
    del net[0]
    net.pop(-1)
    assert len(net) == 7 and [type(m) for m in net] == [type(m) for m in mlp()]


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
    assert not fused.report().fused and reason in str(fused.report())
    x = torch.randn(5, 6)
    assert ops_called(lambda: fused(x)) == set()
    assert torch.equal(fused(x), net(x))


def test_a_subclass_of_sequential_is_left_alone_but_looked_into():
    net = nn.Sequential(MySequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU())))
    fused = fuse(net)
    assert type(fused[0]) is MySequential and type(fused[0][1]) is FusedSequential
    assert "MySequential is a subclass of nn.Sequential" in str(fused.report())
    assert torch.equal(fused(x := torch.randn(4, 6)), net(x))


def test_hooks_on_containers_go_on_working():
    net, seen = mlp(), []
    before = net.register_forward_hook(lambda m, a, y: seen.append(type(m)))
    fused = fuse(net)
    fused.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    fused(torch.randn(4, 6))
    before.remove()
    fused(torch.randn(4, 6))
    assert seen == ["pre", FusedSequential, "pre"]


def test_global_hooks_see_every_module(backend):
    net, seen = fuse(mlp()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    try:
        net(torch.randn(4, 6))
        assert "global module hook" in str(net.report())
    finally:
        handle.remove()
    assert seen == [*net, net]


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


@pytest.mark.parametrize("f", [fuse, unfuse, surgery.report, surgery.number_layers])
def test_only_modules_are_taken(f):
    with pytest.raises(TypeError, match="module must be an nn.Module, got function"):
        f(F.relu)


# Everything is looked at in each call.


def test_changes_are_seen_at_the_next_call(backend):
    net, x = fuse(mlp()), torch.randn(4, 6)

    def check(fused, *layers):
        assert len(net.report().fused) == fused
        torch.testing.assert_close(in_state(net, x), by_hand(net, x, layers))

    check(2, 0, 1)
    net[1] = nn.Tanh()
    check(2, 0, 1)
    net[1].__class__ = nn.Sigmoid
    check(2, 0, 1)
    net[1] = nn.ELU()
    check(2, 0, 1)
    net[1].alpha = 3.0
    check(2, 1, 2)  # Linear / ELU / Dropout
    net[1] = nn.LeakyReLU()
    check(2, 0, 1)
    net[1].negative_slope = 0.7
    check(2, 0, 1)
    net[2].p = 0.25
    check(2, 0, 1)
    net[2].eval()
    check(2, 1)
    net.eval()
    check(2)
    net[2].train()
    check(2, 0)
    net[2].p = 0
    check(2)
    net[2].p = 0.5
    net.train()
    net[0].weight = nn.Parameter(torch.randn(16, 6))
    check(2, 0, 1)
    net[0] = nn.Linear(6, 16, bias=False)
    check(2, 0, 1)
    handle = net[0].register_forward_hook(lambda m, a, y: 2 * y)
    check(2, 0, 1)
    handle.remove()
    net[3].forward = lambda t: t[:, :9]
    check(2, 0, 1)
    del net[3].forward
    parametrizations.weight_norm(net[0])
    check(2, 0, 1)
    net[2] = nn.Identity()
    check(2, 1)


def test_a_child_hooked_after_a_call_is_called(backend):
    net, x, seen = fuse(mlp()), torch.randn(4, 6), []
    net(x)
    net[1].register_forward_hook(lambda m, a, y: seen.append(y.shape))
    net(x)
    assert seen == [(4, 16)]


def test_small_calls_without_dropout_see_changes_too():
    """Such calls go to the modules at once when the last one did."""
    net, x = fuse(mlp()).eval(), torch.randn(4, 6)
    for _ in range(3):
        assert ops_called(lambda: net(x)) == set()
    net[2].train()
    assert ops_called(lambda: net(x)) == {"fusedmlp::linear_act_infer"} or net(x).requires_grad
    torch.testing.assert_close(in_state(net, x), by_hand(net, x))
    net[2].eval()
    net(x), net(x)
    with fusedmlp.use_backend("reference"):
        assert ops_called(lambda: net(x.requires_grad_())) == {"fusedmlp::linear_act_infer"}
    net[1] = nn.Dropout(0.5)
    torch.testing.assert_close(in_state(net, x), by_hand(net, x))


@pytest.mark.parametrize("act", [nn.ReLU, nn.ELU, nn.Softplus, nn.LeakyReLU, ReLUSquared, nn.GELU])
@pytest.mark.parametrize("drop", [[], [nn.Dropout(0.5)], [nn.Dropout(0.5, inplace=True)]], ids=len)
def test_a_module_that_works_in_place_may_follow(act, drop, backend):
    """The op keeps its output where PyTorch would not, and nn.Hardtanh writes into it."""
    net = nn.Sequential(nn.Linear(6, 6), act(), *drop, nn.Hardtanh(-0.5, 0.5, inplace=True))
    x = torch.randn(5, 6)
    try:
        net(x).sum().backward()
    except RuntimeError:
        pytest.skip("plain PyTorch cannot do it either")
    fuse(net)(x).sum().backward()


def test_in_place_on_the_input_is_kept(backend):
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5))
    x = torch.randn(4, 6)
    fuse(net).eval()(x)
    assert (x >= 0).all()


# Inputs that no op takes.


@pytest.mark.parametrize(
    "dtype, device",
    [(torch.float64, "cpu"), (torch.complex64, "cpu"), (torch.float32, "meta")],
    ids=str,
)
def test_automatic_choice_does_what_plain_pytorch_can(dtype, device):
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to(device, dtype)
    x = torch.randn(4, 6, dtype=torch.float32).to(device, dtype)
    y = fuse(net)(x)
    assert y.dtype == dtype and y.device.type == device and y.shape == (4, 3)
    if device != "meta":
        assert torch.equal(y, net(x))


def test_a_named_backend_refuses_what_it_cannot_do(device):
    if dispatch._BY_NAME["native"].refuses(device, torch.float32):
        pytest.skip("native cannot run here")
    net = fuse(mlp()).double()
    with fusedmlp.use_backend("native"), pytest.raises(fusedmlp.BackendError, match="fp64"):
        net(torch.randn(4, 6, dtype=torch.float64))
    assert net(torch.randn(4, 6, dtype=torch.float64)).dtype == torch.float64


def test_errors_are_those_of_the_modules(backend):
    net = fuse(mlp())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(torch.randn(4, 5))
    with pytest.raises(TypeError):
        net(None)
    net[2].p = 1.5
    with pytest.raises(ValueError, match="dropout probability"):
        net(torch.randn(4, 6))


def test_tuples_integers_and_other_inputs_flow_through(backend):
    class Second(nn.Module):
        def forward(self, pair):
            return pair[1]

    net = fuse(nn.Sequential(Second(), nn.Embedding(10, 6), nn.Linear(6, 4), nn.ReLU()))
    assert net((None, torch.arange(3))).shape == (3, 4)
    assert fuse(nn.Sequential())("as it is") == "as it is"


def test_subclasses_of_tensor_go_to_the_modules():
    class Tagged(torch.Tensor):
        pass

    net = fuse(mlp()).eval()
    y = net(torch.randn(4, 6).as_subclass(Tagged))
    assert type(y) is Tagged
    sparse = torch.eye(6).to_sparse()
    assert fuse(nn.Sequential(nn.Linear(6, 4), nn.ReLU()))(sparse).shape == (6, 4)


# Masks.


def test_one_seed_a_forward_and_none_without_dropout(backend):
    net, x = fuse(mlp()), torch.randn(4, 6)
    torch.manual_seed(1)
    a = net(x)
    torch.manual_seed(1)
    assert torch.equal(a, net(x)) and not torch.equal(a, net(x))
    net.eval()
    before = torch.get_rng_state()
    net(x)
    assert torch.equal(before, torch.get_rng_state())


def test_layers_go_on_counting_through_nested_containers(backend):
    flat, x = mlp(), torch.randn(4, 6)
    for nested in (
        nn.Sequential(flat[:3], *flat[3:]),
        nn.Sequential(nn.Sequential(nn.Sequential(flat[:3])), flat[3:]),
    ):
        torch.testing.assert_close(in_state(fuse(nested), x), by_hand(flat, x))
    by_hand_nested = FusedSequential(FusedSequential(*flat[:3]), FusedSequential(*flat[3:]))
    torch.testing.assert_close(in_state(by_hand_nested, x), by_hand(flat, x))
    hooked = fuse(nn.Sequential(flat[:3], flat[3:]))
    hooked[1].register_forward_hook(lambda *a: None)
    torch.testing.assert_close(in_state(hooked, x), by_hand(flat, x))
    mixed = FusedSequential(FusedLinear(6, 16, dropout=0.5), *flat[3:])
    mixed[0].load_state_dict(flat[0].state_dict(), strict=False)
    torch.testing.assert_close(in_state(mixed, x), by_hand(flat, x))


def test_containers_of_one_model_have_layers_of_their_own(backend):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = mlp(), mlp()

        def forward(self, x):
            return self.a(x), self.b(x)

    model, x = fuse(Two()), torch.randn(4, 6)
    a, b = in_state(model, x)
    torch.testing.assert_close(a, by_hand(model.a, x))
    torch.testing.assert_close(b, by_hand(model.b, x, (3, 4)))
    assert surgery.number_layers(model, 10) == 16 and model.b.first_layer == 13


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", ["whole", "inner"])
def test_checkpointing_recomputes_the_same_masks(part, reentrant, backend):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    torch.manual_seed(2)
    inner = fuse(mlp())
    plain = FusedSequential(nn.Linear(6, 6), nn.Dropout(0.5), Checkpointed(inner)[0])
    again = FusedSequential(plain[0], plain[1], Checkpointed(inner))
    outer = Checkpointed(again) if part == "whole" else again

    def run(f):
        """Separate containers draw separate seeds, so `plain` has to call inner as `again` does."""
        torch.manual_seed(2)
        x = torch.ones(4, 6, requires_grad=True)
        f.zero_grad()
        y = f(x)
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in f.parameters())]

    plain[2] = nn.Sequential(inner)
    torch.testing.assert_close(run(outer), run(plain))


def test_double_backward(backend):
    net = fuse(mlp(act=nn.Tanh)).double() if backend == "reference" else fuse(mlp(act=nn.Tanh))
    x = torch.randn(4, 6, dtype=net[0].weight.dtype, requires_grad=True)
    grad = [
        torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0]
        for f in (lambda t: in_state(net, t), lambda t: by_hand(net, t))
    ]
    leaves = [x, net[0].weight]
    torch.testing.assert_close(
        torch.autograd.grad(grad[0].square().sum(), leaves),
        torch.autograd.grad(grad[1].square().sum(), leaves),
    )


# What PyTorch wraps around a module.


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_with_the_masks_of_eager(compiler, backend):
    net = nn.Sequential(
        mlp(act=nn.ReLU), nn.BatchNorm1d(3), nn.Linear(3, 8), nn.PReLU(), nn.Dropout(0.3)
    )
    net = fuse(net)
    x = torch.randn(8, 6, requires_grad=True)

    def run(f):
        torch.manual_seed(3)
        y = f(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=compiler, fullgraph=True)
    got, want = run(compiled), run(net)
    assert torch.equal(got[0] == 0, want[0] == 0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    net.eval()
    torch.testing.assert_close(compiled(x), net(x))
