"""Captures of the graph engine, pretended on a CPU: when they are made, what follows a failure."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch

from fusedmlp.train.engines.graph import STEPS, Graph

from .. import made_data
from ..engines import OPTIMIZERS, on, state_equal

made_data.need("safetensors", "matplotlib")


def test_what_runs_outside_of_a_graph_and_when_graphs_are_made(monkeypatch):
    """The first call of a kind as it is, then as a graph; here a graph that runs its calls."""
    events = []

    def captured(self, calls):
        events.append("capture")
        return SimpleNamespace(replay=lambda: events.append("replay") or calls())

    monkeypatch.setattr(Graph, "_captured", captured)
    monkeypatch.setattr(Graph, "_outside", lambda self, calls: events.append("outside") or calls())
    data, engines = made_data.pictures(rows=400), []
    order = torch.arange(8 * (STEPS + 5) + 3)  # graphs of 16, 4 and 1 steps, and of 3 rows
    x, y = data.x_test, data.y_test
    for captures in (True, False):
        engine = on("cpu", data, OPTIMIZERS["adamw"])
        engine.captures = captures
        for _ in range(3):
            engine.steps(order, 8)
            engine.evaluate(x, y)
        other = copy.deepcopy(engine.task.optimizer.state_dict())
        engine.task.optimizer.load_state_dict(other)
        engine.steps(order, 8)
        engine.evaluate(x, y)
        engine.steps(torch.arange(300).repeat(2), 400)  # more rows than there are data
        engines.append(engine)
    once = ["capture", "replay"] * 5  # with the graph of the evaluation
    assert events == ["outside"] * 5 + once + ["replay"] * 5 + once + ["outside"] * 2
    assert state_equal(engines[0].task.model, engines[1].task.model)
    assert engines[0].read() == engines[1].read()


def _pretend_graphs(monkeypatch, fails_at: int) -> list[str]:
    """Graphs that run their calls; the one that is captured after `fails_at` others fails."""
    events = []

    def captured(self, calls):
        if events.count("capture") == fails_at:
            events.append("failure")
            try:
                raise ValueError("no kernel image")
            finally:
                raise RuntimeError("capture was invalidated")
        events.append("capture")
        return SimpleNamespace(replay=calls)

    monkeypatch.setattr(Graph, "_captured", captured)
    monkeypatch.setattr(Graph, "_outside", lambda self, calls: calls())
    return events


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_capture_that_fails_does_not_end_the_run(fails_at, monkeypatch, caplog):
    """The steps go on call by call, with the same results; the reason is said once."""
    events = _pretend_graphs(monkeypatch, fails_at)
    data, engines = made_data.pictures(rows=400), []
    order = torch.arange(8 * (STEPS + 5) + 3)
    for captures in (True, False):
        engine = on("cpu", data, OPTIMIZERS["adamw"])
        engine.captures = captures
        for _ in range(3):
            engine.steps(order, 8)
            engine.evaluate(data.x_test, data.y_test)
        engines.append(engine)
    assert events == ["capture"] * fails_at + ["failure"]
    assert state_equal(engines[0].task.model, engines[1].task.model)
    assert engines[0].read() == engines[1].read()
    assert [e.name for e in engines] == ["graph, call by call", "graph"] and Graph.name == "graph"
    (warning,) = [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()]
    assert warning.endswith("ValueError: no kernel image")


def test_an_error_of_the_calls_themselves_is_raised(monkeypatch):
    _pretend_graphs(monkeypatch, 0)
    engine = on("cpu", made_data.pictures(rows=400), OPTIMIZERS["sgd"])
    engine.captures = True
    engine.steps(torch.arange(32), 16)

    def broken(rows, count):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.calls, "run", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.steps(torch.arange(32), 16)


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_is_ended_and_does_not_wait_for_the_device(fails, monkeypatch):
    events = []
    stream = SimpleNamespace(wait_stream=lambda other: events.append("order"))
    graph = SimpleNamespace(
        capture_begin=lambda pool: events.append(("begin", pool)),
        capture_end=lambda: events.append("end"),
    )
    for name, made in (
        ("CUDAGraph", lambda: graph),
        ("Stream", lambda: stream),
        ("current_stream", lambda: stream),
        ("stream", lambda side: contextlib.nullcontext()),
        ("synchronize", lambda: events.append("wait")),
        ("empty_cache", lambda: events.append("wait")),
    ):
        monkeypatch.setattr(torch.cuda, name, made)
    engine = on("cpu", made_data.pictures(rows=400), OPTIMIZERS["sgd"])
    engine.pool = (0, 1)

    def calls():
        events.append("calls")
        if fails:
            raise RuntimeError("not while a stream is captured")

    if fails:
        with pytest.raises(RuntimeError, match="is captured"):
            engine._captured(calls)
    else:
        assert engine._captured(calls) is graph
    assert events == ["order", ("begin", (0, 1)), "calls", "end"] + ["order"] * (not fails)
