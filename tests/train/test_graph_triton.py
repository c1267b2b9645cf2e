"""The graph engine's steps through the Triton kernels, and how many launches they are.

The same tests as for reference and native, with this file's `backend`: in the interpreter where
there is no GPU. Launches are counted without running a kernel, as a GPU with 132 multiprocessors
would be given them.
"""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmlp
from fusedmlp.train.data.types import Data, Scaling, permutation, standardized
from fusedmlp.train.engines import graph_calls
from fusedmlp.train.engines.autograd import Autograd
from fusedmlp.train.engines.graph import STEPS, Graph
from fusedmlp.train.schedule import Schedule

from .. import made_data
from ..conftest import _skip_unless_usable
from ..engines import OPTIMIZERS, SEED, network, on
from ..interpreter import use_triton
from .test_graph_step import (  # noqa: F401  the same promises, with this file's `backend`
    _backend,
    assert_close,
    test_bf16_is_that_of_autocast,
    test_other_losses_standardised_rows_and_weights,
)

made_data.need("safetensors", "matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture
def backend(device, monkeypatch) -> str:
    _skip_unless_usable("triton", device)
    if device == "cpu":
        use_triton(monkeypatch)
    return "triton"


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_the_same_steps_as_autograd_with_every_setting(name, device):
    """Steps of a whole call, of shorter ones and of fewer rows; small, for the interpreter."""
    data = standardized(made_data.blobs()).to(device)
    settings = dict(label_smoothing=0.1, clip_norm=0.5, schedule=Schedule("cosine", 30, 5))
    engines = []
    for kind, backend in ((Graph, "triton"), (Autograd, "reference")):
        net = network(sizes=(12, 17, 3), dropout=0.5, activation="prelu")
        engines.append(on(device, data, OPTIMIZERS[name], net, kind, **settings))
        with fusedmlp.use_backend(backend):
            order = permutation(SEED, 0, len(data.x_train))[: 8 * (STEPS + 5) + 3]
            engines[-1].steps(order.to(device), 8)
        engines[-1].sync()
    assert_close(*engines)
    found, wanted = (engine.read() for engine in engines)
    assert found[0] == pytest.approx(wanted[0], rel=1e-4) and found[2] == wanted[2]
    assert found[1] == pytest.approx(wanted[1], abs=2)


# What gives memory or looks at it in another way: no kernel.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "view", "t"}
FREE |= {"_unsafe_view", "transpose", "slice", "split", "select", "unbind", "unsqueeze"}
TRITON = "fusedmlp.backends.triton"


class Launches(TorchDispatchMode):
    """Counts the kernels by name: aten calls with their own names, ours with the kernel's."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen: Counter[str] = Counter()
        monkeypatch.setitem(graph_calls.BY_BACKEND, "triton", importlib.import_module(TRITON))
        for name in ("bias_act_dropout", "cross_entropy", "dgrad_act", "linear_act"):
            module = importlib.import_module(f"{TRITON}.{name}")
            monkeypatch.setattr(module, "launch", self._launch)
        gemm, configs = map(importlib.import_module, (f"{TRITON}.gemm", f"{TRITON}.tiles"))
        monkeypatch.setattr(gemm, "capability", lambda t: configs.target(90))

    def _launch(self, kernel, *args, **constants):
        self.seen[getattr(kernel, "__name__", None) or kernel.fn.__name__] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


NETWORKS = {
    "784-256-10": ((784, 256, 10), 0.0),
    "784-256-256-10": ((784, 256, 256, 10), (0.2, 0.5)),
}


def counted(device, name, precision, optimizer, steps, monkeypatch, **settings) -> Counter[str]:
    """The launches of one call for so many steps at batch 256."""
    dims, dropout = NETWORKS[name]
    x = torch.randint(0, 256, (256 * STEPS, dims[0]), dtype=torch.uint8)
    data = Data("made", x, torch.arange(len(x)) % 10, scaling=Scaling(255.0))
    net = network(sizes=dims, dropout=dropout)
    launches = Launches(monkeypatch)
    with fusedmlp.use_backend("triton"):
        engine = on(device, data, optimizer, net, precision=precision, **settings)
        for _ in range(2):  # the second time without what is made once
            engine.calls.prepare()
            engine.calls.load(torch.arange(len(x)), None)
            launches.seen.clear()
            with launches:
                engine.calls.run(256, steps)
    return launches.seen


# Of each step of 784-256-10: 9 launches. A hidden layer more: 4 more.
STEP = Counter(
    linear_act_fwd_kernel=2,
    cross_entropy_kernel=1,
    bias_act_dropout_bwd_kernel=1,  # the gradient of the last bias
    dgrad_act_kernel=1,
    column_sum_kernel=1,
    mm=2,  # weight gradients
)
HIDDEN = Counter(linear_act_fwd_kernel=1, dgrad_act_kernel=1, column_sum_kernel=1, mm=1)
UPDATE = {"sgd": Counter(_fused_sgd_=1), "adamw": Counter(_foreach_add_=1, _fused_adamw_=1)}
# Of all steps of a call together: gather, scale, add up, advance.
CALL = Counter(add=1, index_select=3, _to_copy=1, div_=1, cat=2, argmax=1, eq=1, sum=2, add_=3)


def times(counts: Counter[str], n: int) -> Counter[str]:
    return Counter({name: n * count for name, count in counts.items()})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", UPDATE)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_launches_of_a_graph(name, optimizer, precision, device, monkeypatch):
    """Those of a step, by kind, and what does not grow with the number of steps."""
    seen = counted(device, name, precision, OPTIMIZERS[optimizer], STEPS, monkeypatch)
    step, call = STEP + UPDATE[optimizer], CALL
    if name != "784-256-10":
        step += HIDDEN
    if precision == "bf16":  # weights to bf16 and gradients back; the inputs
        step, call = step + Counter(_foreach_copy_=2), call + Counter(_to_copy=1)
    assert seen == times(step, STEPS) + call
    if (name, optimizer) == ("784-256-10", "sgd"):
        assert step.total() == (9 if precision == "fp32" else 11) and call.total() <= 16
    with pytest.raises(AssertionError):
        assert seen == times(step, STEPS + 1) + call


def test_settings_take_few_launches_more(device, monkeypatch):
    """A schedule its rates once a call; clipping four calls a step, smoothing none."""
    plain = counted(device, "784-256-10", "fp32", OPTIMIZERS["sgd"], 4, monkeypatch)
    found = []
    for settings in (
        dict(label_smoothing=0.1),
        dict(clip_norm=1.0),
        dict(schedule=Schedule("cosine", 20, 5)),
    ):
        seen = counted(device, "784-256-10", "fp32", OPTIMIZERS["sgd"], 4, monkeypatch, **settings)
        found.append(seen - plain)
    assert not found[0]
    clip = ("_foreach_norm", "stack", "linalg_vector_norm", "add", "reciprocal", "mul", "clamp")
    assert set(found[1]) <= {*clip, "_foreach_mul_"} and found[1].total() <= 4 * 8
    assert found[2] == Counter(add=1, index_select=1)


def test_the_launches_of_an_evaluation(device, monkeypatch):
    """A layer a launch, and the loss; all rows in one pass."""
    data = made_data.pictures().to(device)
    launches = Launches(monkeypatch)
    with fusedmlp.use_backend("triton"):
        engine = on(device, data, OPTIMIZERS["sgd"])
        with launches:
            engine.calls.evaluate(data.x_test, data.y_test)
    assert launches.seen["linear_act_fwd_kernel"] == 3 == len(engine.calls.layers)
    assert launches.seen["cross_entropy_kernel"] == 1
    assert launches.seen.total() <= 14
