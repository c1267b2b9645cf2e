"""FusedLinear, FusedDropout, FusedMLP: PyTorch's modules with PyTorch's keys and initial values."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedmlp
from fusedmlp import FusedDropout, FusedLinear, FusedMLP, FusedSequential
from fusedmlp.fusion import surgery
from fusedmlp.nn import ReLUSquared
from fusedmlp.spec import activations, philox

from ..nets import SEED, STREAM, by_hand, in_state, mlp, on_backend  # noqa: F401

MODULES = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "relu_squared": ReLUSquared,
}


def same_seed(make, *args, **kwargs):
    torch.manual_seed(11)
    return make(*args, **kwargs)


@pytest.mark.parametrize("activation", activations.NAMES)
def test_fused_linear_is_its_three_modules(activation, backend):
    layer = same_seed(FusedLinear, 6, 9, activation=activation, dropout=0.5)
    linear = same_seed(nn.Linear, 6, 9)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    plain = nn.Sequential(linear, MODULES[activation](), nn.Dropout(0.5))
    x = torch.randn(2, 3, 6, requires_grad=True)
    got, want = in_state(layer, x), by_hand(plain, x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), [x, *layer.parameters()]),
        torch.autograd.grad(want.square().sum(), [x, *plain.parameters()]),
    )
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


def test_fused_linear_has_the_keys_of_linear_and_is_none():
    """An activation inside is another meaning: what selects by isinstance must not take it."""
    layer = FusedLinear(6, 9)
    assert not isinstance(layer, nn.Linear) and layer.activation == "none"
    layer.load_state_dict(nn.Linear(6, 9).state_dict(), strict=True)
    nn.Linear(6, 9).load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert list(FusedLinear(6, 9, activation="prelu").state_dict()) == ["weight", "bias", "slope"]
    bare = FusedLinear(6, 9, False, "meta", torch.bfloat16, activation="prelu")
    assert bare.bias is None and bare.slope.dtype == torch.bfloat16 and bare.slope.is_meta
    assert bare(torch.empty(2, 6, device="meta", dtype=torch.bfloat16)).shape == (2, 9)
    assert repr(layer).startswith("FusedLinear(in_features=6, out_features=9, bias=True, activ")


def test_a_fused_dropout_is_a_dropout():
    """It computes what nn.Dropout does, so what looks for that is right to find it."""
    net = nn.Sequential(FusedLinear(6, 6), FusedDropout(0.5)).eval()
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.train()
    assert (net(torch.randn(50, 6)) == 0).any()


@pytest.mark.parametrize("slope, wanted", [(None, 0.25), (0.5, 0.5)])
def test_a_layer_made_without_memory_gets_all_its_values_from_reset_parameters(slope, wanted):
    """The slope stayed what the memory held."""
    kwargs = {"activation": "prelu", "slope": slope}
    layer = FusedLinear(6, 9, device="meta", **kwargs).to_empty(device="cpu")
    with torch.no_grad():
        for t in layer.parameters():
            t.fill_(float("nan"))
    same_seed(layer.reset_parameters)
    linear = same_seed(nn.Linear, 6, 9)
    assert layer.slope.tolist() == [wanted]
    assert layer.weight.equal(linear.weight) and layer.bias.equal(linear.bias)
    skipped = nn.utils.skip_init(FusedLinear, 6, 9, **kwargs)
    skipped.reset_parameters()
    assert skipped.slope.tolist() == [wanted] and skipped.slope.requires_grad


@pytest.mark.parametrize("activation", activations.NAMES)
def test_every_parameter_and_buffer_is_reset_by_the_module_that_owns_it(activation):
    """As FSDP does to a model that was made on the meta device."""
    net = nn.Sequential(
        FusedMLP(6, [9], 3, activation=activation, dropout=0.5, device="meta"),
        FusedLinear(3, 3, activation=activation, device="meta"),
    ).to_empty(device="cpu")
    assert not list(net.buffers())
    with torch.no_grad():
        for t in net.parameters():
            t.fill_(float("nan"))
    for m in net.modules():
        if list(m.parameters(recurse=False)):
            m.reset_parameters()
    assert all(t.isfinite().all() for t in net.parameters())


def test_slopes():
    assert FusedLinear(2, 2, activation="leaky_relu").negative_slope == 0.01
    assert FusedLinear(2, 2, activation="prelu").slope.tolist() == [0.25]
    layer, x = FusedLinear(6, 9, activation="leaky_relu", slope=0.3), torch.randn(4, 6)
    torch.testing.assert_close(layer(x), F.leaky_relu(F.linear(x, layer.weight, layer.bias), 0.3))
    layer = FusedLinear(6, 9, activation="prelu", slope=0.5)
    layer.slope = nn.Parameter(torch.rand(9))
    torch.testing.assert_close(
        layer(x), F.prelu(F.linear(x, layer.weight, layer.bias), layer.slope)
    )
    layer.slope = nn.Parameter(torch.rand(5))
    with pytest.raises(ValueError, match="slope must have 1 or N = 9 elements"):
        layer(x)


def test_fused_linear_copies_and_prints():
    layer = FusedLinear(6, 9, activation="leaky_relu", dropout=0.5)
    assert "activation='leaky_relu', dropout=0.5, slope=0.01" in repr(layer)
    x = torch.randn(4, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(in_state(twin, x), in_state(layer, x))


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_modules_compile_in_one_graph_with_the_masks_of_eager(compiler, backend):
    net = nn.Sequential(FusedLinear(6, 9, activation="prelu", dropout=0.5), FusedDropout(0.3))
    torch._dynamo.reset()
    compiled, x = torch.compile(net, backend=compiler, fullgraph=True), torch.randn(8, 6)
    torch.manual_seed(3)
    got = compiled(x)
    torch.manual_seed(3)
    torch.testing.assert_close(got, net(x))


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3, 7)], ids=str)
def test_fused_dropout_draws_the_specified_mask(shape, backend):
    x = torch.randn(shape, requires_grad=True)
    y = in_state(FusedDropout(0.25), x)
    rows = x.shape[:-1].numel() if x.dim() else 1
    columns = x.shape[-1] if x.dim() else 1
    keep = philox.dropout_mask(SEED, STREAM, rows, columns, 0.25, device=x.device).reshape(shape)
    want = torch.where(keep, x * (1 / 0.75), 0.0)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(want.sum(), x))


@pytest.mark.parametrize("p, training", [(0.0, True), (0.5, False)])
def test_fused_dropout_that_drops_nothing_returns_its_input(p, training):
    x = torch.randn(4, 6)
    assert FusedDropout(p).train(training)(x) is x


def test_fused_dropout_in_place_writes_into_its_input(backend):
    leaf = torch.randn(4, 6, requires_grad=True)
    x = leaf * 2
    y = in_state(FusedDropout(0.5, inplace=True), x)
    assert y.data_ptr() == x.data_ptr()
    want = in_state(FusedDropout(0.5), leaf * 2)
    assert torch.equal(y, want)
    assert torch.equal(
        torch.autograd.grad(y.square().sum(), leaf)[0],
        torch.autograd.grad(want.square().sum(), leaf)[0],
    )
    with pytest.raises(RuntimeError, match="leaf Variable"):
        FusedDropout(0.5, inplace=True)(leaf)


def test_relu_squared(backend):
    x = torch.randn(4, 6)
    assert torch.equal(ReLUSquared()(x), F.relu(x).square())


# FusedMLP


@pytest.mark.parametrize("activation", activations.NAMES)
@pytest.mark.parametrize("dropout", [0.0, [0.5, 0.0]], ids=str)
def test_fused_mlp_is_the_sequential_that_one_would_write(activation, dropout, backend):
    net = same_seed(FusedMLP, 6, [9, 7], 3, activation=activation, dropout=dropout)
    torch.manual_seed(11)
    plain = nn.Sequential()
    for k, n, p in ((6, 9, dropout and 0.5), (9, 7, 0.0)):
        plain.append(nn.Linear(k, n))
        if activation != "none":
            plain.append(MODULES[activation]())
        if p:
            plain.append(nn.Dropout(p))
    plain.append(nn.Linear(7, 3))
    assert repr(list(net)) == repr(list(plain))
    net.load_state_dict(plain.state_dict(), strict=True)
    assert same_seed(FusedMLP, 6, [9], 3)[0].weight.equal(same_seed(nn.Linear, 6, 9).weight)
    x = torch.randn(4, 6)
    torch.testing.assert_close(in_state(net, x), by_hand(net, x))
    torch.testing.assert_close(net.eval()(x), plain.eval()(x))


def test_layers_are_numbered_as_linears_are(backend):
    net = FusedMLP(6, [9, 9], 3, dropout=[0.0, 0.5])
    x = torch.randn(4, 6)
    torch.testing.assert_close(in_state(net, x), by_hand(net, x, [1]))
    bare = FusedMLP(6, [9, 9], 3, activation="none", dropout=[0.0, 0.5])
    torch.testing.assert_close(in_state(bare, x), by_hand(bare, x, [1]))
    assert net._layer_count() == bare._layer_count() == 3


def test_fused_mlp_without_hidden_layers_and_with_options():
    assert [type(m) for m in FusedMLP(6, [], 3)] == [nn.Linear]
    net = FusedMLP(6, (4,), 3, bias=False, device="meta", dtype=torch.float64, activation="prelu")
    assert net[0].bias is None and all(
        p.is_meta and p.dtype == torch.float64 for p in net.parameters()
    )
    assert isinstance(net, FusedSequential) and isinstance(net, nn.Sequential)
    twin = copy.deepcopy(FusedMLP(6, [4], 3))
    assert type(twin) is FusedMLP and twin(torch.randn(2, 6)).shape == (2, 3)


@pytest.mark.parametrize(
    ("first", "error"), [("a", TypeError), (1.5, TypeError), (2**63, ValueError)]
)
def test_streams_begin_at_an_int64(first, error):
    net = nn.Sequential(FusedLinear(4, 4), FusedDropout(0.5))
    with pytest.raises(error, match="assign_streams: first must be"):
        fusedmlp.assign_streams(net, first)
    assert [m.stream_offset for m in net] == [0, 0]


def test_assign_streams_reaches_layers_that_are_no_containers():
    net = nn.ModuleList([FusedLinear(3, 3), mlp(), FusedDropout(), FusedMLP(6, [4], 3)])
    assert surgery.assign_streams(net) == 4
    assert [m.stream_offset for m in (net[0], net[2], net[3])] == [0, 1, 2]


BAD = {
    "activation name": (FusedLinear, (2, 2), {"activation": "swish"}, ValueError, "unknown activ"),
    "activation type": (
        FusedLinear,
        (2, 2),
        {"activation": nn.ReLU()},
        TypeError,
        "must be a name",
    ),
    "dropout": (FusedLinear, (2, 2), {"dropout": 1.5}, ValueError, r"dropout must be in \[0, 1\]"),
    "dropout nan": (FusedLinear, (2, 2), {"dropout": float("nan")}, ValueError, "got nan"),
    "slope": (FusedLinear, (2, 2), {"slope": 0.1}, ValueError, "slope is for leaky_relu and prelu"),
    "slope type": (
        FusedLinear,
        (2, 2),
        {"activation": "prelu", "slope": "x"},
        TypeError,
        "slope must be a number, got str",
    ),
    "slope inf": (
        FusedLinear,
        (2, 2),
        {"activation": "prelu", "slope": float("inf")},
        ValueError,
        "finite",
    ),
    "p": (FusedDropout, (-0.1,), {}, ValueError, r"FusedDropout: p must be in \[0, 1\], got -0.1"),
    "p type": (FusedDropout, ("a",), {}, TypeError, "p must be a number"),
    "hidden int": (FusedMLP, (2, 2, 2), {}, TypeError, "hidden must be a sequence of sizes"),
    "hidden zero": (FusedMLP, (2, [0], 2), {}, ValueError, "hidden must be at least 1, got 0"),
    "hidden float": (FusedMLP, (2, [2.0], 2), {}, TypeError, "hidden must be ints, got float"),
    "in": (FusedMLP, (0, [2], 2), {}, ValueError, "in_features must be at least 1"),
    "out": (FusedMLP, (2, [2], "3"), {}, TypeError, "out_features must be ints"),
    "dropout count": (
        FusedMLP,
        (2, [2], 2),
        {"dropout": [0.1, 0.2]},
        ValueError,
        "one per hidden layer, 1, got 2",
    ),
    "dropout str": (FusedMLP, (2, [2], 2), {"dropout": "0"}, TypeError, "dropout must be a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case):
    make, args, kwargs, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make(*args, **kwargs)


def test_bad_inputs_are_refused_by_name():
    with pytest.raises(TypeError, match="linear_act: input must be a torch.Tensor, got list"):
        FusedLinear(2, 2)([1.0, 2.0])
    with pytest.raises(ValueError, match="linear_act: weight must be .* K = 3"):
        FusedLinear(2, 2)(torch.randn(4, 3))
    with pytest.raises(TypeError, match="dropout: input must be one of float32"):
        FusedDropout()(torch.arange(3))
    layer = FusedLinear(2, 2)
    layer.p = 2.0
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\]"):
        layer(torch.randn(4, 2))


def test_a_named_backend_is_used_or_refused(backend):
    layer = FusedLinear(2, 2, dtype=torch.float64)
    x = torch.randn(4, 2, dtype=torch.float64)
    if backend == "reference":
        assert layer(x).dtype == torch.float64
    else:
        with pytest.raises(fusedmlp.BackendError, match="fp64 is not one of its dtypes"):
            layer(x)
