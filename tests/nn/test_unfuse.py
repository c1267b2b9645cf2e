"""unfuse leaves plain PyTorch only: the same values and parameters, for every class of the
package."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fusedmlp
from fusedmlp import FusedDropout, FusedLinear, FusedMLP, FusedSequential, fuse, unfuse
from fusedmlp.nn import ReLUSquared
from fusedmlp.spec import activations

from ..nets import in_state, on_backend, ops_called  # noqa: F401

PLAIN = {
    "none": [nn.Linear],
    "relu": [nn.Linear, nn.ReLU],
    "leaky_relu": [nn.Linear, nn.LeakyReLU],
    "prelu": [nn.Linear, nn.PReLU],
    "elu": [nn.Linear, nn.ELU],
    "sigmoid": [nn.Linear, nn.Sigmoid],
    "tanh": [nn.Linear, nn.Tanh],
    "softplus": [nn.Linear, nn.Softplus],
    "gelu": [nn.Linear, nn.GELU],
    "gelu_tanh": [nn.Linear, nn.GELU],
    "silu": [nn.Linear, nn.SiLU],
    "relu_squared": [nn.Linear, ReLUSquared],
}


class Model(nn.Module):
    """Every class of the package, as attributes; one of them is named twice."""

    def __init__(self, activation="relu"):
        super().__init__()
        slope = {"slope": 0.3} if activation in ("leaky_relu", "prelu") else {}
        self.fc = FusedLinear(6, 9, activation=activation, dropout=0.5, **slope)
        self.drop = FusedDropout(0.2)
        self.mlp = FusedMLP(9, [8], 7, activation=activation, dropout=0.1)
        self.mixed = FusedSequential(FusedLinear(7, 7, False), nn.Flatten(0, -2))
        self.order = [self.fc, self.drop]

    def forward(self, x):
        for m in self.order:
            x = m(x)
        return self.mixed(self.mlp(x))


def of_the_package(model):
    own = {type(m).__name__ for m in model.modules() if "fusedmlp" in type(m).__module__}
    return own - {"ReLUSquared", "ColumnPReLU"}


def in_plain_torch(module):
    """Whether the graph that torch.export makes of a module has none of this package's ops."""
    program = torch.export.export(module.eval(), (torch.randn(2, 3, 6),))
    return not any("fusedmlp" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", activations.NAMES)
def test_every_class_becomes_plain_with_the_same_values_and_parameters(activation, inplace):
    model = Model(activation).eval()
    x = torch.randn(2, 3, 6)
    want, parameters = model(x), list(model.parameters())
    plain = unfuse(model, inplace=inplace)
    assert (plain is model) == inplace and not of_the_package(plain)
    assert all(a is b for a, b in zip(parameters, plain.parameters(), strict=True))
    assert plain.order[0] is plain.fc and plain.order[1] is plain.drop
    assert [type(m) for m in plain.fc] == [*PLAIN[activation], nn.Dropout]
    assert type(plain.drop) is nn.Dropout and plain.drop.p == 0.2
    assert type(plain.mlp) is nn.Sequential and type(plain.mixed) is nn.Sequential
    assert type(plain.mixed[0]) is nn.Linear and plain.mixed[0].bias is None
    torch.testing.assert_close(plain(x), want)
    assert in_plain_torch(plain) and (inplace or not in_plain_torch(model))


@pytest.mark.parametrize("activation", activations.NAMES)
def test_gradients_are_the_same(activation):
    layer, x = FusedLinear(6, 9, activation=activation), torch.randn(4, 6, requires_grad=True)
    plain = unfuse(layer)
    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(plain(x).square().sum(), leaves),
        torch.autograd.grad(layer(x).square().sum(), leaves),
    )


def test_only_what_does_something_is_in_the_sequential():
    def classes(**options):
        plain = unfuse(FusedLinear(6, 9, **options))
        return [type(m) for m in plain] if isinstance(plain, nn.Sequential) else type(plain)

    assert classes() is nn.Linear
    assert classes(dropout=0.5) == [nn.Linear, nn.Dropout]
    assert classes(activation="relu") == [nn.Linear, nn.ReLU]
    bare = unfuse(FusedLinear(6, 9))
    assert vars(bare).keys() == vars(nn.Linear(6, 9)).keys()
    assert list(bare._parameters) == ["weight", "bias"]
    sequential = unfuse(FusedLinear(6, 9, activation="relu"))
    assert vars(sequential).keys() == vars(nn.Sequential()).keys()
    assert list(sequential.state_dict()) == ["0.weight", "0.bias"]
    assert vars(sequential[0]).keys() == vars(nn.Linear(6, 9)).keys()


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_settings_stay(training):
    layer = FusedLinear(6, 9, activation="leaky_relu", slope=0.3, dropout=0.4).train(training)
    plain = unfuse(nn.Sequential(layer, FusedDropout(0.2, inplace=True)).train(training))
    assert all(m.training == training for m in plain.modules())
    assert plain[0][1].negative_slope == 0.3 and plain[0][2].p == 0.4
    assert plain[1].p == 0.2 and plain[1].inplace
    assert (plain[0](torch.randn(50, 6)) == 0).any() == training


def test_prelu_with_a_slope_for_each_column_keeps_them_at_the_last_dimension():
    """nn.PReLU has its slopes at dimension 1: another function on (3, 9, 9)."""
    layer, x = FusedLinear(6, 9, activation="prelu"), torch.randn(3, 9, 6)
    layer.slope = nn.Parameter(torch.linspace(-1, 1, 9))
    plain = unfuse(layer)
    assert plain[1].weight is layer.slope
    for rows in (x, x[0], x[0, 0]):
        torch.testing.assert_close(plain(rows), layer(rows))
    wrong = nn.Sequential(plain[0], nn.PReLU(9))
    wrong[1].weight = layer.slope
    assert not torch.allclose(wrong(x), layer(x))


def test_hooks_go_on_working():
    layer, seen = FusedLinear(6, 9, activation="relu"), []
    layer.register_forward_pre_hook(lambda m, a: seen.append(type(m)))
    layer.register_forward_hook(lambda m, a, y: seen.append(y.min().item()))
    layer.register_full_backward_hook(lambda m, a, b: seen.append(a[0].shape))
    unfuse(layer)(torch.randn(64, 6, requires_grad=True)).sum().backward()
    assert seen == [nn.Sequential, 0.0, (64, 6)]


def test_in_place_a_layer_stays_the_same_object():
    layer = FusedLinear(6, 9, activation="relu")
    x = torch.randn(4, 6)
    want = layer(x)
    assert unfuse(layer, inplace=True) is layer and type(layer) is nn.Sequential
    torch.testing.assert_close(layer(x), want)
    assert type(unfuse(FusedLinear(6, 9), inplace=True)) is nn.Linear
    assert type(unfuse(FusedDropout(), inplace=True)) is nn.Dropout


def test_the_original_stays_fused():
    model = Model()
    in_state(model, x := torch.randn(2, 3, 6))
    before = [type(m) for m in model.modules()], list(model.state_dict())
    unfuse(model)
    assert ([type(m) for m in model.modules()], list(model.state_dict())) == before
    assert "fusedmlp" in str(ops_called(lambda: model(x)))


def test_shared_layers_and_weights_stay_shared():
    layer = FusedLinear(6, 6, activation="tanh")
    tied = FusedLinear(6, 6)
    tied.weight = layer.weight
    plain = unfuse(nn.ModuleList([layer, layer, tied]))
    assert plain[0] is plain[1] and plain[0][0].weight is plain[2].weight is layer.weight


def test_copies_of_the_plain_model_need_no_more_than_torch():
    plain = unfuse(Model("gelu").eval())
    x = torch.randn(2, 3, 6)
    data = pickle.dumps(plain.mlp)
    assert b"fusedmlp" not in data and b"fusedmlp" not in pickle.dumps(plain.fc)
    torch.testing.assert_close(copy.deepcopy(plain)(x), plain(x))


def test_fused_again_it_is_one_op_again(backend):
    layer, x = FusedLinear(6, 9, activation="gelu", dropout=0.5), torch.randn(4, 6)
    again = fuse(unfuse(layer))
    assert type(again) is FusedSequential and len(fusedmlp.report(again).fused) == 1
    torch.testing.assert_close(in_state(again, x), in_state(layer, x))


class Own(FusedLinear):
    def forward(self, input):
        return super().forward(input) + 1


class OwnContainer(FusedSequential):
    def forward(self, input):
        return super().forward(input) + 1


def _replaced():
    layer = FusedLinear(6, 6, activation="relu")
    layer.forward = lambda x: x
    return layer


REFUSED = {
    "parametrised": (
        lambda: parametrizations.weight_norm(FusedLinear(6, 6, activation="relu")),
        "weight, bias and slope as parameters.*remove_parametrizations",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(FusedLinear(6, 6), "weight", 0.5),
        "weight, bias and slope as parameters.*prune.remove",
    ),
    "own forward": (lambda: Own(6, 6), "Own must have the forward of this package"),
    "own container": (
        lambda: OwnContainer(nn.Linear(6, 6), nn.ReLU()),
        "OwnContainer must have the forward of this package",
    ),
    "replaced forward": (_replaced, "FusedLinear must have the forward of this package"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_plain_form_is_refused_and_nothing_changed(case, inplace):
    make, message = REFUSED[case]
    model = nn.ModuleList([FusedLinear(6, 6), make()])
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"unfuse: .*{message}"):
        unfuse(model, inplace=inplace)
    assert [type(m) for m in model.modules()] == before


def test_a_subclass_that_computes_the_same_becomes_plain():
    class Named(FusedMLP):
        def __init__(self):
            super().__init__(6, [4], 3)

    net, x = Named(), torch.randn(4, 6)
    assert type(unfuse(net)) is nn.Sequential
    torch.testing.assert_close(unfuse(net)(x), net(x))


def test_attributes_of_a_users_class_with_our_names_stay():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.first_layer, self._plan, self._memo, self._traces = 5, "a", "b", "c"
            self.net = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

        def forward(self, x):
            return self.net(x) * self.first_layer

    model, x = Mine(), torch.randn(4, 6)
    for made in (fuse(model), unfuse(fuse(model)), fuse(copy.deepcopy(model), inplace=True)):
        assert (made.first_layer, made._plan, made._memo, made._traces) == (5, "a", "b", "c")
        torch.testing.assert_close(made(x), model(x))


def test_lora_finds_plain_layers_only():
    """What peft does: layers by isinstance, a low-rank term beside each, added to the weight."""

    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.a = nn.Parameter(torch.randn(base.out_features, 2))
            self.b = nn.Parameter(torch.randn(2, base.in_features))

        def forward(self, x):
            return self.base(x) + x @ (self.a @ self.b).t()

        def merged(self):
            with torch.no_grad():
                self.base.weight += self.a @ self.b
            return self.base

    def change_after_merging(net):
        x, found = torch.randn(4, 6), []
        for parent in list(net.modules()):
            for name, m in list(parent.named_children()):
                if isinstance(m, nn.Linear):
                    setattr(parent, name, Lora(m))
                    found.append((parent, name))
        before = net(x)
        for parent, name in found:
            setattr(parent, name, getattr(parent, name).merged())
        assert isinstance(net, nn.Sequential)
        return len(found), (net(x) - before).abs().max().item()

    plain = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 3))
    fused = nn.Sequential(FusedLinear(6, 9, activation="gelu"), nn.Linear(9, 3))
    cases = [(plain, 2), (fuse(copy.deepcopy(plain)), 2), (fused, 1), (unfuse(fused), 2)]
    for net, wanted in cases:
        count, change = change_after_merging(net)
        assert count == wanted and change < 1e-4


IN_TORCHSCRIPT = {
    "FusedLinear": lambda: FusedLinear(6, 6),
    "FusedDropout": FusedDropout,
    "FusedMLP": lambda: FusedMLP(6, [4], 3),
    "FusedSequential": lambda: fuse(nn.Sequential(nn.Linear(6, 6), nn.ReLU())),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("name", IN_TORCHSCRIPT)
def test_torchscript_is_refused_by_name(name, how, called_before, backend):
    module, x = IN_TORCHSCRIPT[name]().eval(), torch.randn(4, 6)
    if called_before:
        module(x)
    for model in (module, nn.Sequential(nn.Identity(), module)):
        inputs = (x,) if how == "trace" else ()
        with pytest.raises(TypeError, match=rf"torch.jit: .* got a {name}; .*fusedmlp.unfuse"):
            getattr(torch.jit, how)(model, *inputs)
        made = getattr(torch.jit, how)(unfuse(model), *inputs)
        torch.testing.assert_close(made(x), model(x))


def test_the_report_on_an_input_measures_the_plain_model():
    report = fusedmlp.report(Model(), torch.randn(2, 3, 6))
    assert report.measured.bytes_fused < report.measured.bytes_plain
