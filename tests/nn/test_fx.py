"""torch.fx, and whatever else has a __torch_function__, takes modules and functions as it takes
PyTorch's own."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

import fusedmlp
from fusedmlp import FusedDropout, FusedLinear, FusedMLP, FusedSequential, functional, fuse, unfuse
from fusedmlp.spec import activations

from ..nets import in_state, mlp


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = FusedLinear(6, 9, activation="prelu", dropout=0.5)
        self.drop = FusedDropout(0.3)
        self.body = nn.Sequential(FusedLinear(9, 9, activation="gelu"), FusedMLP(9, [8], 7))
        self.fused = FusedSequential(FusedLinear(7, 7, dropout=0.1), nn.ReLU())
        self.last = nn.Linear(7, 5)

    def forward(self, x, target):
        x = self.fused(self.body(self.drop(self.fc(x))))
        x = functional.linear_act(x, self.last.weight, self.last.bias, "tanh")
        x = functional.bias_act_dropout(functional.dropout(x, 0.5, self.training), None, "silu")
        return functional.cross_entropy(x, target, label_smoothing=0.1)


INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(2)), torch.arange(8) % 5


def calls(graph, op):
    return [str(node.target) for node in graph.nodes if node.op == op]


def test_modules_and_functions_are_leaves():
    traced = fx.symbolic_trace(Model())
    # A FusedSequential is traced through, as nn.Sequential is.
    assert calls(traced.graph, "call_module") == [
        "fc", "drop", "body.0", "body.1.0", "body.1.1", "body.1.2", "fused.0", "fused.1"
    ]  # fmt: skip
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert functions == [
        functional.linear_act,
        functional.dropout,
        functional.bias_act_dropout,
        functional.cross_entropy,
    ]
    assert "self.fc(x)" in traced.code and "fusedmlp_functional_linear_act(" in traced.code


def test_the_traced_model_has_the_values_and_the_parameters():
    model = Model().eval()
    traced = fx.symbolic_trace(model)
    copies = copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), fx.symbolic_trace(traced)
    for twin in (traced, *copies):
        assert torch.equal(twin(*INPUTS), model(*INPUTS))
        assert list(twin.state_dict()) == list(model.state_dict())
    assert traced.fc.weight is model.fc.weight
    traced(*INPUTS).backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(*INPUTS).backward()
    torch.testing.assert_close(got, {name: p.grad for name, p in model.named_parameters()})


def test_layers_in_the_traced_model_follow_train_and_eval():
    net = nn.Sequential(FusedLinear(6, 9, dropout=0.5), FusedDropout(0.5)).eval()
    traced, x = fx.symbolic_trace(net), torch.randn(50, 6)
    assert torch.equal(traced(x), net(x))
    torch.manual_seed(3)
    got = traced.train()(x)
    torch.manual_seed(3)
    assert torch.equal(got, net.train()(x)) and (got == 0).any()


@pytest.mark.parametrize("activation", activations.NAMES)
def test_a_layer_that_is_the_root_is_its_function(activation):
    layer, x = FusedLinear(6, 9, activation=activation, dropout=0.5), torch.randn(8, 6)
    traced = fx.symbolic_trace(layer)
    assert calls(traced.graph, "call_module") == []
    assert torch.equal(in_state(traced, x), in_state(layer, x))
    assert traced.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_dropout_that_is_the_root_is_its_function(inplace):
    layer, x = FusedDropout(0.5, inplace), torch.randn(8, 6)
    traced, given = fx.symbolic_trace(layer), x.clone()
    got = in_state(traced, given)
    assert torch.equal(got, in_state(layer, x.clone()))
    assert torch.equal(given, got if inplace else x)


@pytest.mark.parametrize("make", [mlp, lambda: FusedMLP(6, [4], 3)], ids=["sequential", "mlp"])
def test_a_container_that_is_the_root_is_traced_through(make):
    net, x = fuse(make()).eval(), torch.randn(8, 6)
    traced = fx.symbolic_trace(net)
    assert calls(traced.graph, "call_module") == [str(i) for i in range(len(net))]
    torch.testing.assert_close(traced(x), net(x))


def test_a_traced_model_is_unfused_with_its_graph():
    model = nn.Sequential(FusedLinear(6, 9, activation="relu"), nn.Linear(9, 3))
    traced, x = fx.symbolic_trace(model), torch.randn(8, 6)
    plain = unfuse(traced)
    assert type(plain.get_submodule("0")) is nn.Sequential
    torch.testing.assert_close(plain(x), model(x))


# What is no tensor, a subclass and a mode.


class Recorder:
    """No tensor: gives the function that it is passed to, and its arguments."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function, args, kwargs


class Logged(torch.Tensor):
    seen: list = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


W, B, TARGET = torch.ones(3, 6), torch.ones(3), torch.arange(4) % 3
CALLS = {
    "linear_act": (functional.linear_act, lambda x: (x, W, B, "relu")),
    "its weight": (functional.linear_act, lambda w: (torch.ones(4, 6), w[:3], B, "relu")),
    "bias_act_dropout": (functional.bias_act_dropout, lambda x: (x, torch.ones(6), "relu")),
    "dropout": (functional.dropout, lambda x: (x, 0.5, False)),
    "cross_entropy": (functional.cross_entropy, lambda x: (x, TARGET)),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_subclass_gets_the_call_of_a_function(case):
    function, arguments = CALLS[case]
    plain = torch.randn(4, 6)
    x = plain.as_subclass(Logged)
    args = arguments(x)
    Logged.seen = []
    got = function(*args)
    assert Logged.seen[0] is function and isinstance(got, Logged)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), function(*arguments(plain)))


@pytest.mark.parametrize("case", CALLS)
def test_a_mode_gets_the_call_of_a_function(case):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    (function, arguments), seen = CALLS[case], []
    args = arguments(torch.randn(4, 6))
    with Mode():
        got = function(*args)
    assert seen == [function]
    assert torch.equal(got, function(*args))


def test_what_is_no_tensor_is_asked_for_the_function():
    thing = Recorder()
    layer = FusedLinear(6, 9, activation="leaky_relu", slope=0.3, dropout=0.5)
    function, args, kwargs = layer(thing)
    assert function is functional.linear_act
    assert args == (thing, layer.weight, layer.bias, "leaky_relu")
    assert (kwargs["slope"], kwargs["p"], kwargs["training"]) == (0.3, 0.5, True)
    function, args, kwargs = FusedDropout(0.5).eval()(thing)
    assert function is functional.dropout and args == (thing, 0.5, False)
    assert functional.cross_entropy(thing, TARGET)[0] is functional.cross_entropy


def test_what_has_nothing_to_do_with_tensors_is_refused_by_name():
    with pytest.raises(TypeError, match="linear_act: input must be a torch.Tensor, got list"):
        FusedLinear(2, 2)([1.0, 2.0])
    with pytest.raises(TypeError, match="dropout: input must be a torch.Tensor, got list"):
        FusedDropout()([1.0, 2.0])
    with pytest.raises(TypeError, match="dropout: input must be a torch.Tensor, got NoneType"):
        FusedDropout(0.0)(None)


def test_functions_compile_in_one_graph():
    def f(x, w, b):
        with fusedmlp.dropout_state(3):
            return functional.dropout(functional.linear_act(x, w, b, "gelu"), 0.5)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 6)
    torch.testing.assert_close(compiled(x, W, B), f(x, W, B))
