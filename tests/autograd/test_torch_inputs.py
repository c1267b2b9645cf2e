"""PyTorch's own test inputs, of its modules and operators, through the package."""

import warnings
from unittest import mock

import pytest
import torch
from torch import nn

import fusedmlp.functional as FF
from fusedmlp import fuse

from ..class_nets import compiled

MODULES = (
    "Linear", "ReLU", "LeakyReLU", "PReLU", "ELU", "Sigmoid", "Tanh", "Softplus", "GELU", "SiLU",
)  # fmt: skip
# PyTorch's operator -> (activation, slope) of the same function here, given what follows the input;
# None: there is none.
OPERATORS = {
    "nn.functional.relu": lambda x: ("relu", None),
    "nn.functional.leaky_relu": lambda x, negative_slope=0.01: ("leaky_relu", negative_slope),
    "nn.functional.prelu": lambda x, weight: ("prelu", weight) if _is_ours(x, weight) else None,
    "nn.functional.elu": lambda x, alpha=1.0: ("elu", None) if alpha == 1 else None,
    "nn.functional.gelu": lambda x, approximate="none": (
        "gelu" if approximate == "none" else "gelu_tanh",
        None,
    ),
    "nn.functional.silu": lambda x: ("silu", None),
    "nn.functional.softplus": lambda x: ("softplus", None),
    "sigmoid": lambda x: ("sigmoid", None),
    "tanh": lambda x: ("tanh", None),
}
# PyTorch's inputs have beta = 3 throughout: they are taken without it, and must stay as they are
# behind the compile backend.
OTHER = ("nn.functional.softplus",)
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


def _is_ours(x, weight):
    """PyTorch's slopes are of dimension 1, these of the last."""
    return x.dim() > 0 and weight.numel() in (1, x.shape[1] if x.dim() == 2 else 1)


@pytest.fixture(scope="module")
def torch_tests():
    """{name: what PyTorch's tests say of a module or operator}."""
    pytest.importorskip("expecttest", reason="PyTorch's test inputs need expecttest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # On import they forbid what other tests set.
        with mock.patch.object(torch.backends, "disable_global_flags", lambda: None):
            from torch.testing._internal import common_methods_invocations, common_modules
    found = {}
    for info in [*common_modules.module_db, *common_methods_invocations.op_db]:
        name = info.module_cls.__name__ if hasattr(info, "module_cls") else info.name
        found.setdefault(name, info)
    return found


def _same(ours, theirs, leaves, x):
    """Values and gradients of two functions without arguments."""
    got, want = ours(), theirs()
    assert got.shape == want.shape and got.dtype == want.dtype
    tolerance = dict(rtol=2e-2, atol=2e-2) if want.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, want, equal_nan=True, **tolerance)
    assert got.requires_grad == want.requires_grad
    if want.requires_grad and want.numel():
        dy = torch.randn_like(want)
        wanted = [t for t in (*leaves, x) if t.requires_grad]
        found = [torch.autograd.grad(y, wanted, dy, allow_unused=True) for y in (got, want)]
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, equal_nan=True, **tolerance)


def _modules(info, dtype, training):
    given = dict(device="cpu", dtype=dtype, requires_grad=True, training=training)
    for made in info.module_inputs_func(info, **given):
        args, kwargs = made.constructor_input.args, made.constructor_input.kwargs
        module = info.module_cls(*args, **kwargs).to(dtype).train(training)
        (x,) = [*made.forward_input.args, *made.forward_input.kwargs.values()]
        yield module, x


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_give_what_pytorch_gives(name, dtype, torch_tests):
    """Alone in a container, and between a layer and a dropout."""
    count = 0
    for training in (True, False):
        for module, x in _modules(torch_tests[name], DTYPES[dtype], training):
            nets = [nn.Sequential(module)]
            if x.dim() and x.shape[-1]:
                width = x.shape[-1]
                layer = nn.Linear(width, width, dtype=x.dtype)
                nets.append(nn.Sequential(layer, module, nn.Dropout(0.0)).train(training))
            for net in nets:
                fused = fuse(net)
                _same(lambda f=fused: f(x), lambda f=net: f(x), net.parameters(), x)  # noqa: B023
                count += 1
    assert count >= 2


def _samples(info, dtype):
    """Those of its tests and of its comparison with NumPy: any strides, sizes of 0, infinities."""
    for sample in info.reference_inputs("cpu", dtype, requires_grad=True):
        if sample.input.numel() <= 20_000:
            yield sample.input, sample.args, sample.kwargs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_give_what_pytorch_gives(name, dtype, torch_tests):
    """As bias_act_dropout, and behind a product where the input has rows."""
    op, count = torch_tests[name].op, 0
    for x, args, kwargs in _samples(torch_tests[name], DTYPES[dtype]):
        if name in OTHER:
            kwargs = {}
        ours = OPERATORS[name](x, *args, **kwargs)
        if ours is None:
            continue
        act, slope = ours
        leaves = [slope] if isinstance(slope, torch.Tensor) else []

        def alone(x=x, act=act, slope=slope):
            return FF.bias_act_dropout(x, None, act, slope=slope)

        _same(alone, lambda: op(x, *args, **kwargs), leaves, x)  # noqa: B023
        count += 1
        if x.dim() and x.isfinite().all() and (act != "prelu" or x.dim() == 2):
            w = torch.eye(x.shape[-1], dtype=x.dtype)

            def behind(x=x, w=w, act=act, slope=slope):
                return FF.linear_act(x, w, None, act, slope=slope)

            _same(behind, lambda: op(x, *args, **kwargs), leaves, x)  # noqa: B023
    assert count > 5


@pytest.mark.parametrize("name", [*OPERATORS, "nn.functional.linear"])
def test_operators_give_the_same_behind_the_compile_backend(name, torch_tests):
    """Of a model written with them, on some inputs that have rows."""
    info, count = torch_tests[name], 0

    class Net(nn.Module):
        def __init__(self, width, args, kwargs):
            super().__init__()
            self.fc, self.args, self.kwargs = nn.Linear(width, width), args, kwargs

        def forward(self, x):
            return info.op(self.fc(x), *self.args, **self.kwargs)

    for x, args, kwargs in _samples(info, torch.float32):
        if x.dim() >= 2 and x.numel() and x.isfinite().all() and count < 2:
            net = Net(x.shape[-1], args, kwargs)
            model = compiled(net, then="eager")
            _same(lambda f=model: f(x), lambda f=net: f(x), net.parameters(), x)  # noqa: B023
            count += 1
    assert count


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gives_what_pytorch_gives(dtype, torch_tests):
    info, count = torch_tests["nn.functional.linear"], 0
    for x, (w, *rest), kwargs in _samples(info, DTYPES[dtype]):
        b = rest[0] if rest else kwargs.get("bias")
        if w.dim() != 2:
            with pytest.raises(ValueError, match=r"weight must be \(N, K\)"):
                FF.linear_act(x, w, b)
            continue
        leaves = [w] if b is None else [w, b]
        for act, then in (("none", lambda z: z), ("tanh", torch.tanh)):

            def ours(x=x, w=w, b=b, act=act):
                return FF.linear_act(x, w, b, act)

            _same(ours, lambda: then(info.op(x, w, b)), leaves, x)  # noqa: B023
        count += 1
    assert count


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_or_scales(dtype, torch_tests):
    count = 0
    for x, args, kwargs in _samples(torch_tests["nn.functional.dropout"], DTYPES[dtype]):
        p, training = (*args, kwargs.get("p", 0.5))[0], kwargs.get("training", True)
        module = fuse(nn.Sequential(nn.Dropout(p))).train(training)
        for y in (FF.dropout(x, p, training), module(x)):
            assert y.shape == x.shape and y.dtype == x.dtype
            if not training or p == 0:
                assert torch.equal(y, x)
                continue
            kept = y != 0
            want = x[kept] / (1 - p) if p < 1 else x[kept]
            torch.testing.assert_close(y[kept], want)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert not (dx[~kept & (x != 0)] != 0).any()
        count += 1
    assert count
