"""FusedSequential: the numbers of its modules one by one, whatever is changed in them."""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.utils import parametrizations

import fusedmlp
from fusedmlp import FusedLinear, FusedMLP, FusedSequential, fuse
from fusedmlp.backends import registry
from fusedmlp.fusion import surgery
from fusedmlp.nn import ReLUSquared

from ..nets import SEED, assert_same, by_hand, in_state, mlp, on_backend, ops_called  # noqa: F401

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
    assert len(fusedmlp.report(fused).fused) == 1
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
def test_any_part_of_a_group_may_be_missing(modules, ops, backend):
    net = nn.Sequential(*modules)
    fused = fuse(net)
    assert len(fusedmlp.report(fused).fused) == ops
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


# Everything is looked at in each call.


def test_changes_are_seen_at_the_next_call(backend):
    net, x = fuse(mlp()), torch.randn(4, 6)

    def check(fused, *layers):
        assert len(fusedmlp.report(net).fused) == fused
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
    check(1, 0)


def test_a_child_hooked_after_a_call_is_called(backend):
    net, x, seen = fuse(mlp()), torch.randn(4, 6), []
    net(x)
    net[1].register_forward_hook(lambda m, a, y: seen.append(y.shape))
    net(x)
    assert seen == [(4, 16)]


def test_small_calls_without_dropout_see_changes_too():
    """Such calls go to the modules at once when the last one did."""
    net = fuse(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.5))).eval()
    x = torch.randn(4, 6)
    for _ in range(3):
        assert ops_called(lambda: net(x)) == set()
    net[2].train()
    assert ops_called(lambda: net(x)) & {"fusedmlp::mlp_fwd", "fusedmlp::linear_act_infer"}
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


@pytest.mark.filterwarnings("ignore:Complex modules")
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
    if registry._BY_NAME["native"].reasons_against(device, torch.float32):
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
    mixed = FusedSequential(FusedLinear(6, 16, activation="relu", dropout=0.5), *flat[3:])
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
    assert surgery.assign_streams(model, 10) == 16 and model.b.stream_offset == 13


def test_the_list_operations_of_a_sequential():
    net, x = fuse(mlp()), torch.randn(4, 6)
    assert type(net[:3]) is FusedSequential and net[:3][0] is net[0]
    assert type(FusedMLP(6, [4], 3)[1:]) is FusedSequential
    assert len(net + net) == 14 and type(net + net) is FusedSequential
    assert len(net * 2) == 14 and type(net * 2) is FusedSequential
    whole = net[:3] + net[3:]
    assert torch.equal(in_state(whole, x), in_state(net, x))
    net.append(nn.Dropout(0.5)).insert(0, nn.Identity())
    torch.testing.assert_close(in_state(net, x), by_hand(net, x, (0, 1, 2)))
    del net[0]
    net.pop(-1)
    assert len(net) == 7 and [type(m) for m in net] == [type(m) for m in mlp()]


def test_global_hooks_see_every_module(backend):
    net, seen = fuse(mlp()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    try:
        net(torch.randn(4, 6))
        assert "global module hook" in str(fusedmlp.report(net))
    finally:
        handle.remove()
    assert seen == [*net, net]


def test_used_from_threads():
    """Each thread has its own shapes, so that none may act on what another has found out."""
    from concurrent.futures import ThreadPoolExecutor

    net = fuse(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU())).eval()
    inputs = [torch.randn(m, 64) for m in (1, 2, 3, 700, 900)] * 4
    want = [by_hand(net, x) for x in inputs]
    with ThreadPoolExecutor(3) as pool:
        torch.testing.assert_close(list(pool.map(net, inputs)), want)
