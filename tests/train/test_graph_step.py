"""The graph engine: its sequence of calls gives plain PyTorch's step, on any device; on a GPU also
captured and replayed. Without one the calls run one by one, through reference and native."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedmlp
from fusedmlp.backends import reference
from fusedmlp.spec import activations
from fusedmlp.train import TrainError, explain, fit
from fusedmlp.train.data.types import Data, permutation, standardized
from fusedmlp.train.engines import Autograd, choose, graph_calls
from fusedmlp.train.engines import explain as explain_engines
from fusedmlp.train.engines.graph import STEPS, Graph
from fusedmlp.train.optim import EpsilonHatAdam
from fusedmlp.train.schedule import Schedule

from .. import made_data
from ..engines import (
    OPTIMIZERS,
    SEED,
    assert_near_fp64,
    config,
    network,
    on,
    orders,
    state_equal,
    task_of,
)

made_data.need("safetensors", "matplotlib")


@pytest.fixture(autouse=True)
def _backend(backend):
    """Each test with the ops of each backend that can run here."""
    with fusedmlp.use_backend(backend):
        yield


def assert_close(first, second, rtol=1e-4, atol=1e-5) -> None:
    pairs = zip(first.task.model.parameters(), second.task.model.parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_steps_as_autograd(name, device):
    """As many that graphs of several steps, of one, and of a last batch that is smaller occur."""
    data = made_data.pictures(rows=400)
    first, second = (on(device, data, OPTIMIZERS[name], kind=kind) for kind in (Graph, Autograd))
    batch = 16
    for epoch in range(3):
        order = permutation(SEED, epoch, len(data.x_train)).to(device)
        assert len(order) > (STEPS + 1) * batch and len(order) % batch
        first.steps(order, batch)
        second.steps(order, batch)
        first.sync()
        second.sync()
        found, wanted = first.read(), second.read()
        assert found[0] == pytest.approx(wanted[0], rel=1e-4) and found[2] == wanted[2]
        assert found[1] == pytest.approx(wanted[1], abs=2)
    assert_close(first, second)
    states = [engine.task.optimizer.state_dict() for engine in (first, second)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=1e-3, atol=1e-5)
    steps = 3 * -(-len(data.x_train) // batch)
    assert first.calls.state.tolist() == [SEED, steps * 3] and first.number == steps


@pytest.mark.parametrize("name", ["nesterov", "adamw", "adam"])
def test_parameters_are_as_near_to_fp64_as_plain_pytorchs(name):
    assert_near_fp64(
        made_data.pictures(rows=400),
        OPTIMIZERS[name],
        ends=(1, 50),
        dropout=(0.2, 0.5),
        make=Graph,
    )


@pytest.mark.parametrize("activation", activations.NAMES)
def test_every_activation(activation, device):
    data = made_data.pictures(rows=400)
    engines = []
    for kind in (Graph, Autograd):
        net = network(activation=activation, dropout=(0.0, 0.5))
        engines.append(on(device, data, OPTIMIZERS["sgd"], net, kind))
        engines[-1].steps(permutation(SEED, 0, 300).to(device), 64)
    assert_close(*engines)


SETTINGS = {
    "smoothing": dict(label_smoothing=0.2),
    "clipping": dict(clip_norm=0.1),
    "schedule": dict(schedule=Schedule("cosine", 20, 5)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_reach_it(name, device):
    data, settings = made_data.pictures(rows=400), SETTINGS[name]
    engines = []
    for kind, given in ((Graph, settings), (Autograd, settings), (Graph, {})):
        engines.append(on(device, data, OPTIMIZERS["adamw"], kind=kind, **given))
        for rows in orders(data, 20):
            engines[-1].step(rows.to(device))
        engines[-1].sync()
    assert_close(*engines[:2])
    with pytest.raises(AssertionError):
        assert_close(engines[0], engines[2])


@pytest.mark.parametrize("is_weighted", [False, True], ids=["equal", "weighted"])
def test_other_losses_standardised_rows_and_weights(is_weighted, device):
    for data, sizes, loss in (
        (standardized(made_data.line()), (3, 16, 1), "mse"),
        (standardized(made_data.pictures()), (64, 9, 4), "cross_entropy"),
        (standardized(made_data.blobs()), (12, 3), "cross_entropy"),
        (made_data.labels(), (12, 9, 3), "logistic"),
    ):
        engines, settings = [], {"loss": loss}
        if is_weighted:
            # The first of them are the whole of a step.
            settings["row_weights"] = torch.arange(len(data.x_train), device=device).float() % 4
            settings["row_weights"][permutation(SEED, 0, len(data.x_train))[:33].to(device)] = 0
        for kind in (Graph, Autograd):
            net = network(sizes=sizes)
            engines.append(on(device, data, OPTIMIZERS["momentum"], net, kind, **settings))
            engines[-1].steps(permutation(SEED, 0, len(data.x_train)).to(device), 33)
        assert_close(*engines)
        sums = [engine.read() for engine in engines]
        assert sums[0] == pytest.approx(sums[1], rel=1e-4)


def test_bf16_is_that_of_autocast(device):
    """Roundings fall alike where the order of operations is the same."""
    data, engines = made_data.pictures(rows=400), []
    for kind in (Graph, Autograd):
        engines.append(on(device, data, OPTIMIZERS["sgd"], kind=kind, precision="bf16"))
        for rows in orders(data, 10):
            engines[-1].step(rows.to(device))
    assert engines[0].task.model[0].weight.dtype == torch.float32
    assert_close(*engines, rtol=2e-2, atol=2e-3)


def test_one_row_one_class_and_one_feature(device):
    generator = torch.Generator().manual_seed(1)
    for sizes, batch in (((1, 7, 1), 33), ((5, 1), 1), ((3, 30, 2), 1)):
        x = torch.randn(70, sizes[0], generator=generator)
        y = torch.randint(0, sizes[-1], (70,), generator=generator)
        engines = []
        for kind in (Graph, Autograd):
            data = Data("made", x, y)
            engines.append(on(device, data, OPTIMIZERS["sgd"], network(sizes=sizes), kind))
            engines[-1].steps(permutation(SEED, 0, 70).to(device), batch)
        assert_close(*engines)


def test_twice_the_same_bits(device):
    data, engines = made_data.pictures(rows=400), []
    for calls in (1, 1, 4):
        engines.append(on(device, data, OPTIMIZERS["nesterov"]))
        order = permutation(SEED, 0, 256).to(device)
        for part in order.split(256 // calls):
            engines[-1].steps(part, 16)
    assert state_equal(engines[0].task.model, engines[1].task.model)
    assert state_equal(engines[0].task.model, engines[2].task.model)


@pytest.mark.parametrize("name", ["nesterov", "adamw", "adam"])
def test_it_goes_on_from_the_optimisers_state_dict(name, device):
    data, optimizer = made_data.pictures(rows=400), OPTIMIZERS[name]
    batches = [rows.to(device) for rows in orders(data, 20)]
    whole, half = on(device, data, optimizer), on(device, data, optimizer)
    for rows in batches:
        whole.step(rows)
    for rows in batches[:10]:
        half.step(rows)
    net = network(seed=9, dropout=(0.2, 0.5))
    net.load_state_dict(half.task.model.state_dict())
    again = on(device, data, optimizer, net)
    again.step(batches[0])  # a state of its own, which the other one replaces
    net.load_state_dict(half.task.model.state_dict())
    again.task.optimizer.load_state_dict(copy.deepcopy(half.task.optimizer.state_dict()))
    again.set_step(10)
    for rows in batches[10:]:
        again.step(rows)
    assert state_equal(whole.task.model, net)


def test_more_rows_than_data(device):
    """Rows may come more than once, in batches larger than the data."""
    data = made_data.blobs()
    order = torch.arange(180).repeat(3).to(device)
    engines = []
    for kind in (Graph, Autograd):
        net = network(sizes=(12, 16, 3), dropout=0.5)
        engines.append(on(device, data, OPTIMIZERS["adamw"], net, kind))
        engines[-1].steps(order[:100], 50)
        engines[-1].steps(order, 400)
    assert_close(*engines)
    assert engines[0].read()[2] == 640


# Reads of a value, results whose size a value decides, and constants made on the host.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "lift_fresh"}


class Watch(TorchDispatchMode):
    """Notes the name of every aten call."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen.add(function.overloadpacket.__name__)
        if "device" in kwargs and function.overloadpacket.__name__ == "_to_copy":
            self.seen.add("_to_copy to a device")
        return function(*args, **kwargs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["nesterov", "adamw", "adam"])
def test_no_call_of_the_sequence_waits_for_a_value(name, precision, monkeypatch):
    """What a capture would fail at, as far as it shows in the calls; the ops are plain PyTorch's
    so that theirs show too."""
    monkeypatch.setitem(graph_calls.BY_BACKEND, "reference", reference)
    settings = dict(precision=precision, label_smoothing=0.1, clip_norm=1.0)
    settings["schedule"] = Schedule("cosine", 20, 5)
    with fusedmlp.use_backend("reference"):
        engine = on("cpu", made_data.pictures(), OPTIMIZERS[name], **settings)
        engine.steps(torch.arange(132), 32)
        engine.calls.load(torch.arange(132), None)
        with Watch() as watch:
            engine.calls.run(32, 4)
            engine.calls.evaluate(engine.task.x, engine.task.y)
    assert {"index_select", "mm", "_log_softmax"} <= watch.seen
    assert not watch.seen & WAITING and "_to_copy to a device" not in watch.seen
    with Watch() as watch:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
        torch.tensor(1.0)
        torch.ones(3).to("meta")
    found = {"_local_scalar_dense", "nonzero", "lift_fresh", "_to_copy to a device"}
    assert found <= watch.seen


# what it refuses


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    task = task_of(network(), made_data.pictures(), OPTIMIZERS["sgd"])
    assert Graph.reasons_against(task) == ["it runs on a CUDA GPU, the device is cpu"]
    with pytest.raises(TrainError, match="engine 'graph' was asked for but .* CUDA GPU"):
        choose("graph", task)


def test_what_it_cannot_run_it_refuses():
    data = made_data.blobs()
    make = functools.partial(task_of, network(sizes=(12, 16, 3)), data)
    assert Graph.reasons_on_any_device(make(OPTIMIZERS["adamw"])) == []
    assert "fp16" in Graph.reasons_on_any_device(make(OPTIMIZERS["sgd"], precision="fp16"))[0]
    assert "SGD, Adam or AdamW" in Graph.reasons_on_any_device(make(torch.optim.RMSprop))[0]
    assert "another place for epsilon" in Graph.reasons_on_any_device(make(EpsilonHatAdam))[0]
    assert "from a loader" in Graph.reasons_on_any_device(make(OPTIMIZERS["sgd"], x=None))[0]


def test_auto_does_not_take_it(monkeypatch):
    """Also where it could run: no results file has shown it on a GPU."""
    monkeypatch.setattr(Graph, "reasons_against", Graph.reasons_on_any_device)
    task = task_of(network(), made_data.pictures(), torch.optim.SGD, clip_norm=0.0)
    assert choose("auto", task).name in ("native", "autograd")
    assert choose("graph", task).name == "graph"
    assert any(
        "graph: only when asked for by name" in line for line in explain_engines("auto", task)
    )
    assert "graph: taken, asked for by name" in explain_engines("graph", task)


def test_explain_names_the_engine_and_the_reasons_of_the_others():
    text = explain(network(sizes=(12, 16, 3)), made_data.blobs(), config(precision="fp16"))
    native, graph, autograd = text.splitlines()
    assert "it computes in fp32 or bf16, --precision is fp16" in native
    assert graph == "graph: it runs on a CUDA GPU, the device is cpu"
    assert autograd == "autograd: taken"


# on a GPU


@pytest.mark.gpu
def test_replays_draw_fresh_masks():
    """With a learning rate of 0 the outputs of two steps on the same rows differ by masks alone."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU is available to torch")
    data = made_data.pictures(rows=400)
    engine = on("cuda", data, lambda p: torch.optim.SGD(p, lr=0.0))
    rows, losses = torch.arange(64, device="cuda"), []
    for _ in range(4):
        engine.step(rows)
        losses.append(engine.read()[0])
    assert engine.graphs and len(set(losses)) == 4
    engine.set_step(0)
    engine.step(rows)
    assert engine.read()[0] == losses[0]


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_that_of_autograd():
    if not torch.cuda.is_available():
        pytest.skip("no GPU is available to torch")
    results = []
    for engine in ("graph", "autograd"):
        net = network(sizes=(12, 16, 3), dropout=0.5)
        settings = config(engine=engine, device="cuda", lr_schedule="cosine", warmup_epochs=0.5)
        results.append(fit(net, made_data.blobs(), settings))
    assert results[0].summary["engine"] == "graph"
    for row, other in zip(*(r.history for r in results), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert row["test_loss"] == pytest.approx(other["test_loss"], rel=1e-3)
