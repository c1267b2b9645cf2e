"""mlp_fwd and mlp_bwd, a whole network as one call, on every backend that has them.

Kernels run where test_triton.py and test_cuda_kernels.py say: the interpreter, the PTX
machine, or a GPU. Oracle: the layers one after the other, in fp64.
"""

import importlib

import pytest
import torch

import fusedmlp.functional as FF
from fusedmlp import ops
from fusedmlp.backends import registry
from fusedmlp.spec import activations, layers, philox
from fusedmlp.spec.budget import excess

from .. import interpreter
from ..check_op import DTYPES, SEED, STREAM, Case, leaves_of
from ..conftest import _skip_unless_usable

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The interpreter computes both sides of a selection, also the one that overflows.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
NEED_W, NEED_B, NEED_SLOPE = 1, 2, 4
ALL = NEED_W | NEED_B | NEED_SLOPE


@pytest.fixture(params=["reference", "native", "triton"])
def mlp_backend(request, device, monkeypatch) -> str:
    name = request.param
    _skip_unless_usable(name, device)
    if name == "native":
        key = {"cpu": "CPU", "cuda": "CUDA"}[device]
        if not torch._C._dispatch_has_kernel_for_dispatch_key("fusedmlp::mlp_fwd.native", key):
            pytest.skip(f"the extension has no mlp for {device} tensors")
    elif not hasattr(importlib.import_module(f"fusedmlp.backends.{name}"), "mlp_fwd"):
        pytest.skip(f"{name} has no mlp")
    if name == "triton" and device == "cpu":
        if reason := interpreter.unusable():
            pytest.skip(reason)
        from fusedmlp.backends.triton import tiles

        # The interpreter runs one program after the other: fewer and larger ones.
        monkeypatch.setattr(tiles, "_SMALL_TILE", 4096)
        interpreter.repair(monkeypatch)
    return name


class Net:
    """Random tensors of a network, as the arguments of the ops and as leaves for autograd."""

    def __init__(self, widths, acts, p, dtype, device, leading=(67,), bias=True, alpha=0.01):
        self.acts, self.p, self.dtype, self.alpha = acts, p, dtype, alpha
        threshold, scale = philox.threshold_and_scale(p)
        self.state = torch.tensor([SEED, STREAM], device=device)
        self.tensors = {"x": torch.randn(*leading, widths[0])}
        self.dy = torch.randn(*leading, widths[-1]).to(device, dtype)
        for i, (k, n) in enumerate(zip(widths, widths[1:], strict=False)):
            made = Case("linear_act", 1, k, n, acts[i], p, torch.float32, bias=bias).inputs()
            self.tensors |= {f"{t}{i}": made[t] for t in ("w", "b", "slope") if t in made}
        self.tensors = {name: t.to(device, dtype) for name, t in self.tensors.items()}
        self.x = self.tensors["x"]
        self.names = [name for name in self.tensors if name != "x"]
        self.params = [self.tensors[name] for name in self.names]
        net = []
        for i, act in enumerate(acts):
            w, b, slope = (self.tensors.get(f"{name}{i}") for name in ("w", "b", "slope"))
            drop = threshold, scale, i, 5
            e = layers.Epilogue(b, slope, self.state, activations.IDS[act], alpha, *drop)
            net.append(layers.Layer(w, e))
        self.params, self.ints, self.numbers = layers.pack(net)

    def forward(self, backend, keep=True, x=None):
        x = self.x if x is None else x
        return ops.BY_BACKEND[backend].mlp_fwd(
            x, self.params, self.state, self.ints, self.numbers, 5, keep
        )

    def backward(self, backend, kept, needs=None, need_dx=True, dy=None, x=None):
        """{name: gradient}, without those that have no elements."""
        count = len(self.acts)
        found = ops.BY_BACKEND[backend].mlp_bwd(
            self.dy if dy is None else dy,
            self.x if x is None else x,
            self.params,
            self.state,
            kept[:count],
            kept[count:],
            self.ints,
            self.numbers,
            5,
            layers.bits_of(self.ints) if needs is None else needs,
            need_dx,
        )
        named = dict(zip(["x", *self.names], found, strict=True))
        for name, t in named.items():
            assert t.shape in ((0,), self.tensors.get(name, t).shape), name
        return {name: t for name, t in named.items() if t.numel()}

    def by_autograd(self, dtype):
        """Output and gradients of the layers one after the other."""
        leaves = leaves_of(self.tensors, dtype)
        y = leaves["x"]
        for i, act in enumerate(self.acts):
            y = FF.linear_act(
                y,
                leaves[f"w{i}"],
                leaves.get(f"b{i}"),
                act,
                slope=leaves.get(f"slope{i}", self.alpha if act == "leaky_relu" else None),
                p=self.p,
                seed=SEED,
                stream=STREAM + i,
                row_offset=5,
                backend="reference",
            )
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(dtype))
        return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


NETS = [
    # In 16 bits, rounding decides on which side of relu's kink a hidden unit is.
    (("relu", "relu", "none"), 0.2, "fp32"),
    (("gelu", "prelu", "softplus"), 0.0, "fp32"),
    (("leaky_relu", "sigmoid", "relu_squared"), 0.3, "fp32"),
    (("silu", "softplus", "none"), 0.2, "fp16"),
    (("elu", "gelu_tanh", "none"), 0.0, "fp16"),
    (("silu", "softplus", "none"), 0.2, "bf16"),
    (("tanh",), 0.5, "fp16"),
]


@pytest.mark.parametrize(
    ("acts", "p", "dtype"), NETS, ids=lambda v: ",".join(v) if isinstance(v, tuple) else str(v)
)
def test_outputs_and_gradients_are_within_the_error_budget(acts, p, dtype, mlp_backend, device):
    """Of all layers, against fp64; masks by layer number and row offset."""
    dtype = DTYPES[dtype]
    if (mlp_backend, device) == ("native", "cpu"):
        pytest.skip("test_mlp.py, over many networks: its products are not the library's")
    # 40 outputs: the largest error of the 10 sums of a bias would be chance.
    net = Net((13, 24, 17, 40)[: len(acts) + 1], acts, p, dtype, device)
    kept = net.forward(mlp_backend)
    got = {"y": kept[len(acts) - 1]} | net.backward(mlp_backend, kept)
    truth, plain = net.by_autograd(torch.float64), net.by_autograd(dtype)
    assert got.keys() == truth.keys()
    used = {name: excess(got[name], plain[name], truth[name], dtype) for name in truth}
    assert all(u <= 1 for u in used.values()), f"share of the error budget used: {used}"


def test_the_outputs_are_those_of_the_layers_to_the_bit(mlp_backend, device):
    """Whichever layers are run as one call: a network is its layers."""
    if (mlp_backend, device) == ("native", "cpu"):
        pytest.skip("the network has matrix products of its own there, its layers the library's")
    net = Net((13, 24, 17, 10), ("gelu", "relu", "tanh"), 0.3, torch.float32, device)
    kept, x = net.forward(mlp_backend), net.x
    of_backend = ops.BY_BACKEND[mlp_backend]
    preacts = kept[3:]
    unpacked = layers.unpack(net.params, net.ints, net.numbers, net.state, 5)
    for i, (w, e) in enumerate(unpacked):
        if e.saves(x.dtype) == activations.SAVE_PREACT:
            y, preact = of_backend.linear_act_fwd(x, w, *e)
            assert torch.equal(preacts.pop(0), preact)
        else:
            y = of_backend.linear_act_infer(x, w, *e)
        assert torch.equal(kept[i], y)
        x = y
    assert not preacts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("alpha", [0.1, -0.1])
def test_products_are_kept_where_backward_reads_them(alpha, p, dtype, mlp_backend, device):
    """Exactly where activations.saves says; without `keep` there is the output alone."""
    acts, dtype = activations.NAMES, DTYPES[dtype]
    net = Net((8,) * (len(acts) + 1), acts, p, dtype, device, leading=(3,), alpha=alpha)
    if (mlp_backend, device) == ("native", "cpu") and dtype != torch.float32:
        pytest.skip("on a CPU the extension runs networks in fp32 only")
    kept = net.forward(mlp_backend)
    of_z = [
        activations.saves(act.id, alpha, dtype, p > 0) == activations.SAVE_PREACT
        for act in activations.TABLE
    ]
    assert [t.shape for t in kept] == [(3, 8)] * (len(acts) + sum(of_z))
    if mlp_backend != "reference":
        wanted = net.forward("reference")[len(acts) :]
        torch.testing.assert_close(kept[len(acts) :], wanted, equal_nan=True, rtol=0.1, atol=0.1)
    alone = net.forward(mlp_backend, keep=False)
    assert len(alone) == 1
    torch.testing.assert_close(alone[0], kept[len(acts) - 1], equal_nan=True)


@pytest.mark.parametrize("acts", [("relu", "prelu", "none"), ("none", "silu", "gelu")])
def test_only_what_is_needed_is_returned_and_it_is_the_same(acts, mlp_backend, device):
    net = Net((5, 9, 7, 6), acts, 0.3, torch.float32, device, leading=(19,))
    kept = net.forward(mlp_backend)
    full = net.backward(mlp_backend, kept)
    assert full.keys() == net.tensors.keys()
    for needs, need_dx in (
        ([0, 0, 0], False),
        ([0, 0, 0], True),
        ([0, 0, NEED_W], False),
        ([0, NEED_B, 0], False),
        ([NEED_W, 0, NEED_B], False),
        ([0, NEED_W | NEED_SLOPE, NEED_W | NEED_B], False),
        ([ALL, ALL, 0], True),
    ):
        got = net.backward(mlp_backend, kept, needs, need_dx)
        bits = {"w": NEED_W, "b": NEED_B, "s": NEED_SLOPE}
        wanted = {n for n in full if n != "x" and needs[int(n[-1])] & bits[n[0]]}
        assert got.keys() == wanted | ({"x"} if need_dx else set())
        for name, gradient in got.items():
            assert torch.equal(gradient, full[name]), name


def test_layers_below_the_first_that_learns_are_not_run(device, monkeypatch):
    _skip_unless_usable("triton", device)
    if device == "cpu" and (reason := interpreter.unusable()):
        pytest.skip(reason)
    from fusedmlp.backends.triton import mlp  # the module

    calls = []
    dgrad_act = mlp.dgrad_act
    monkeypatch.setattr(mlp, "dgrad_act", lambda *args: calls.append(1) or dgrad_act(*args))
    net = Net((5, 6, 7, 8), ("relu", "relu", "none"), 0.3, torch.float32, device, leading=(9,))
    kept = net.forward("triton")
    for needs, expected in (([0, 0, ALL], 0), ([0, ALL, 0], 1), ([ALL, 0, 0], 2), ([0, 0, 0], 0)):
        calls.clear()
        net.backward("triton", kept, needs, need_dx=False)
        assert len(calls) == expected


@pytest.mark.parametrize("leading", [(), (1,), (2, 3, 5)])
def test_any_number_of_leading_dimensions_and_any_strides(leading, mlp_backend, device):
    net = Net((6, 4, 1, 3), ("gelu", "none", "none"), 0.0, torch.float32, device, leading)
    kept = net.forward(mlp_backend)
    assert kept[2].shape == (*leading, 3)
    grads = net.backward(mlp_backend, kept)
    assert {n: g.shape for n, g in grads.items()} == {n: t.shape for n, t in net.tensors.items()}

    def strided(t):
        return torch.stack((t, t + 1), -1)[..., 0]

    again = net.forward(mlp_backend, x=strided(net.x))
    torch.testing.assert_close(again, kept)
    other = net.backward(mlp_backend, kept, dy=strided(net.dy), x=strided(net.x))
    torch.testing.assert_close(other, grads)
    truth = net.by_autograd(torch.float64)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, truth[name].float(), rtol=1e-4, atol=1e-5)


def test_an_expanded_gradient_without_an_epilogue_to_undo(mlp_backend, device):
    """The last layer has no bias: what comes in is multiplied as it is."""
    net = Net((6, 4, 3), ("relu", "none"), 0.0, torch.float32, device, (9,), bias=False)
    kept = net.forward(mlp_backend)
    one = torch.ones(1, 1, device=device).expand(9, 3)
    expanded = net.backward(mlp_backend, kept, dy=one)
    torch.testing.assert_close(expanded, net.backward(mlp_backend, kept, dy=one.contiguous()))


@pytest.mark.parametrize(
    ("widths", "leading"), [((6, 4, 3), (0,)), ((6, 4, 3), (2, 0)), ((0, 4, 3), (5,))]
)
def test_empty_sizes(widths, leading, mlp_backend, device):
    """No rows give gradients of 0; without inputs the output is that of the biases."""
    net = Net(widths, ("gelu", "relu"), 0.3, torch.float32, device, leading)
    kept = net.forward(mlp_backend)
    assert kept[1].shape == (*leading, 3)
    grads = net.backward(mlp_backend, kept)
    truth = net.by_autograd(torch.float64)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, truth[name].float(), rtol=1e-4, atol=1e-5)
    assert grads.keys() == {name for name, t in net.tensors.items() if t.numel()}


@pytest.mark.parametrize("keep", [False, True])
def test_schemas_and_fakes(keep, mlp_backend, device):
    net = Net((6, 4, 3), ("gelu", "prelu"), 0.3, torch.float32, device, (2, 5))
    tests = "test_schema", "test_faketensor"
    flat = net.ints, net.numbers, 5
    of_backend = ops.BY_BACKEND[mlp_backend]
    torch.library.opcheck(
        of_backend.mlp_fwd, (net.x, net.params, net.state, *flat, keep), test_utils=tests
    )
    kept = net.forward(mlp_backend)
    for needs, need_dx in (([ALL, ALL], keep), ([0, NEED_B], keep)):
        args = net.dy, net.x, net.params, net.state, kept[:2], kept[2:], *flat, needs, need_dx
        torch.library.opcheck(of_backend.mlp_bwd, args, test_utils=tests)


def test_wrong_arguments_are_refused(mlp_backend, device):
    net = Net((6, 4, 3), ("gelu", "relu"), 0.3, torch.float32, device, (5,))
    of_backend = ops.BY_BACKEND[mlp_backend]
    flat = net.ints, net.numbers, 5
    kept = net.forward(mlp_backend)
    refused = (ValueError, TypeError, RuntimeError)
    with pytest.raises(refused, match="must be given for each layer"):
        of_backend.mlp_fwd(net.x, net.params[:-1], net.state, *flat, True)
    with pytest.raises(refused, match=r"weight must be \(N, K\) with K = 6"):
        of_backend.mlp_fwd(net.x, net.params[2:] + net.params[:2], net.state, *flat, True)
    with pytest.raises(refused, match="state must be an int64 tensor"):
        of_backend.mlp_fwd(net.x, net.params, None, *flat, True)
    with pytest.raises(refused, match="dy must be"):
        net.backward(mlp_backend, kept, dy=net.dy[:, :2])
    with pytest.raises(refused, match="needs must have 2, 1 and 2 entries"):
        net.backward(mlp_backend, kept, needs=[ALL])


def test_an_extension_without_the_op_says_so(device, monkeypatch):
    """An older build: the reason, not a crash."""
    if registry._BY_NAME["native"].reasons_against(device, torch.float32):
        pytest.skip("native cannot run here")
    net = Net((6, 4), ("relu",), 0.0, torch.float32, device)
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if torch._C._dispatch_has_kernel_for_dispatch_key("fusedmlp::mlp_fwd.native", key):
        assert len(net.forward("native")) == 1
    else:
        with pytest.raises(registry.BackendError, match="the extension has no mlp_fwd"):
            net.forward("native")
