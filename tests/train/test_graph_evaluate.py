"""The graph engine's own test of held-out rows: what the model itself says of them. Without a GPU
its calls run one by one, through reference, native and, in the interpreter, Triton."""

from __future__ import annotations

import pytest
import torch

import fusedmlp
from fusedmlp.train import build, fit, loop
from fusedmlp.train.data.types import standardized
from fusedmlp.train.engines import graph_calls
from fusedmlp.train.engines.graph import EVALUATIONS, Graph
from fusedmlp.train.losses import loss_sums

from .. import made_data
from ..conftest import _skip_unless_usable
from ..engines import OPTIMIZERS, config, network, on
from ..interpreter import use_triton

made_data.need("safetensors", "matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

CASES = {
    "bytes": (lambda: made_data.pictures(rows=400), (64, 24, 16, 4)),
    "standardised bytes": (lambda: standardized(made_data.pictures()), (64, 7, 4)),
    "table": (lambda: standardized(made_data.blobs()), (12, 33, 3)),
    "no hidden layer": (made_data.blobs, (12, 3)),
    "regression": (made_data.line, (3, 16, 1)),
}


@pytest.fixture(autouse=True, params=["reference", "native", "triton"])
def _backend(request, device, monkeypatch):
    _skip_unless_usable(request.param, device)
    if request.param == "triton" and device == "cpu":
        use_triton(monkeypatch)
    with fusedmlp.use_backend(request.param):
        yield request.param


def wanted_of(engine, data):
    task = engine.task
    outputs = build.predict(task.model, data.x_test, data.scaling, task.precision)
    return loss_sums(task.loss, outputs, data.y_test)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_accuracy_are_those_of_the_model(case, device, monkeypatch):
    make, sizes = CASES[case]
    data = make().to(device)
    # Parts, of which the last has fewer rows.
    monkeypatch.setattr(graph_calls, "MAX_VALUES", 24 * max(sizes))
    assert 24 < len(data.x_test) and len(data.x_test) % 24
    loss = "cross_entropy" if data.is_classes else "mse"
    net = network(sizes=sizes, dropout=0.5)
    # Training mode, and smoothing of the training loss: neither has a part in a test.
    engine = on(device, data, OPTIMIZERS["sgd"], net, loss=loss, label_smoothing=0.3)
    sums = engine.evaluate(data.x_test, data.y_test)
    assert sums.dtype == torch.float64 and sums.device.type == device
    wanted = wanted_of(engine, data)
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=0)
    assert sums[1:].tolist() == wanted[1:].tolist()
    for _ in range(3):  # on a GPU: outside of a graph, captured, replayed
        assert torch.equal(engine.evaluate(data.x_test, data.y_test), sums)
    assert net.training


def test_it_follows_the_parameters_and_leaves_the_steps_alone(device):
    data = made_data.blobs().to(device)
    for precision, near in (("fp32", 1e-5), ("bf16", 1e-2)):
        net = network(sizes=(12, 16, 3), dropout=0.5)
        engine = on(device, data, OPTIMIZERS["adamw"], net, precision=precision)
        other = on(device, data, OPTIMIZERS["adamw"], network(sizes=(12, 16, 3), dropout=0.5))
        other.task.precision = precision
        other = Graph(other.task)
        other.set_step(0)
        found = []
        for rows in torch.arange(96, device=device).split(32):
            engine.step(rows)
            other.step(rows)
            found.append(engine.evaluate(data.x_test, data.y_test))
            torch.testing.assert_close(found[-1], wanted_of(engine, data), rtol=near, atol=1)
        assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
        assert engine.read() == other.read() and engine.number == 3
        for a, b in zip(net.parameters(), other.task.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_rows_that_it_does_not_take_are_left_to_the_model(device):
    data = made_data.blobs().to(device)
    engine = on(device, data, OPTIMIZERS["sgd"], network(sizes=(12, 16, 3)))
    assert engine.evaluate(data.x_test.double(), data.y_test) is None
    assert engine.evaluate(data.x_test.t().contiguous().t(), data.y_test) is None
    assert engine.evaluate(data.x_test.to("meta"), data.y_test) is None


def test_it_holds_the_data_of_a_few_evaluations(device):
    data = made_data.blobs().to(device)
    engine = on(device, data, OPTIMIZERS["sgd"], network(sizes=(12, 16, 3)))
    for rows in range(1, 2 * EVALUATIONS + 2):
        sums = [engine.evaluate(data.x_test[:rows], data.y_test[:rows]) for _ in range(2)]
        assert torch.equal(*sums) and sums[0][2] == rows
        assert len(engine.evaluated) <= EVALUATIONS


def test_a_run_does_not_call_the_model_for_its_tests(device, monkeypatch):
    monkeypatch.setattr(Graph, "reasons_against", Graph.reasons_on_any_device)
    calls = []
    results = {}
    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    for engine in ("graph", "autograd"):
        settings = config(engine=engine, device=device, epochs=2, batch_size=64)
        net = network(sizes=(12, 16, 3), dropout=0.5)
        results[engine] = fit(net, made_data.blobs(), settings).history
        assert len(calls) == (0 if engine == "graph" else 2)
    for row, other in zip(*results.values(), strict=True):
        assert row["test_loss"] == pytest.approx(other["test_loss"], rel=1e-3)
        assert row["test_accuracy"] == pytest.approx(other["test_accuracy"], abs=0.02)
