"""What was measured on a GPU decides on the engine; pretended on a CPU, where `graph` runs its
calls one by one."""

from __future__ import annotations

import pytest
import torch

from fusedmlp.backends import measured
from fusedmlp.backends.registry import BackendError
from fusedmlp.train import TrainConfig, explain, fit
from fusedmlp.train.engines import choose, tuned
from fusedmlp.train.engines.graph import Graph
from fusedmlp.tuning import first_call, measure

from .. import made_data
from ..engines import network, task_of

made_data.need("safetensors", "matplotlib")

BATCH = 32


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """One on which `graph` runs, with a table of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FUSEDMLP_AUTOTUNE", raising=False)
    monkeypatch.setattr(measured, "kind", lambda device_type: "Test GPU")
    monkeypatch.setattr(Graph, "reasons_against", staticmethod(Graph.reasons_on_any_device))
    monkeypatch.setattr("fusedmlp.train.engines.native.Native.automatic", False)
    measured.forget()
    yield
    monkeypatch.undo()
    measured.forget()


def _task(**settings):
    data = made_data.pictures(rows=200)
    net = network((data.x_train[0].numel(), 24, 4), dropout=0.5)
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    return task_of(net, data, sgd, **settings)


def _keep(task, wrong=None, **times) -> None:
    key = "engine, " + tuned.work_of(task, BATCH).key
    row = {"times": times, "wrong": wrong or {}}
    measured.keep(task.device.type, "calls", key, row)


def test_auto_takes_graph_where_it_was_right_and_faster():
    task = _task()
    assert choose("auto", task, BATCH).name == "autograd"
    for times, wanted in (
        ({"eager": 100.0, "graph": 50.0}, "graph"),
        ({"eager": 100.0, "graph": 99.0}, "autograd"),
        ({"eager": 100.0}, "autograd"),
    ):
        _keep(task, {} if len(times) > 1 else {"graph": "it is off"}, **times)
        assert choose("auto", task, BATCH).name == wanted
        assert choose("auto", task).name == "autograd"
        assert choose("graph", task, BATCH).name == "graph"


def test_engines_are_compared_before_they_are_timed(monkeypatch):
    work = tuned.work_of(_task(), BATCH)
    told = []
    result = tuned.judge(work, 0.02, [], lambda **what: told.append(what["doing"]))
    assert told == ["eager", "graph", "timing"]
    assert set(result["times"]) == {"eager", "graph"} and not result["wrong"]
    assert set(tuned.judge(work, 0.02, ["graph"], lambda **what: None)["times"]) == {"eager"}

    steps = Graph.steps

    def off(self, order, batch):
        steps(self, order, batch)
        with torch.no_grad():
            self.task.model[0].bias.add_(0.01)

    monkeypatch.setattr(Graph, "steps", off)
    result = tuned.judge(work, 0.02, [], lambda **what: None)
    assert set(result["times"]) == {"eager"}
    assert result["wrong"]["graph"].startswith("parameter 1 is off by 0.0")

    def broken(self, order, batch):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(Graph, "steps", broken)
    result = tuned.judge(work, 0.02, [], lambda **what: None)
    assert result["wrong"] == {"graph": "it raises RuntimeError: no kernel image"}


@pytest.fixture
def gpu(monkeypatch) -> list:
    """A GPU on which every measurement takes no time; the (work, module) that were measured."""
    seen = []

    def made_up(works, *rest, module="ways"):
        for work in works:
            seen.append((work, module))
            names = ("eager", "graph") if module == tuned.__name__ else ("eager", "native mlp")
            times = dict(zip(names, (100.0, 50.0), strict=True))
            yield work, {"times": times, "wrong": {"triton mlp": "it is off"}, "ratios": {}}

    monkeypatch.setattr(measure, "measure", made_up)
    monkeypatch.setattr(first_call, "is_allowed", lambda device_type: True)
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(tuned.time, "perf_counter", lambda: float(next(clock)))
    return seen


def test_the_start_of_a_training_measures_what_is_not_known(gpu):
    task, said = _task(), []
    tuned.at_start(task, BATCH, said.append)
    assert not gpu and not said  # a CPU needs no start
    task.device = torch.device("cuda")
    tuned.at_start(task, BATCH, said.append)
    work = tuned.work_of(task, BATCH)
    assert gpu == [(work, "ways"), (work, tuned.__name__)]
    assert said[-1].startswith("this GPU was measured for this network in 3 s, kept in ")
    assert said[-1].endswith("(--tune off skips it)")
    assert [line for line in said if "triton mlp is never chosen here, as it is off" in line]
    assert tuned.is_graph_faster(task, BATCH)
    tuned.at_start(task, BATCH, said.append)
    assert len(gpu) == 2  # all is known now


def test_autocast_is_measured_layer_by_layer(gpu):
    task = _task(precision="bf16", device=torch.device("cuda"))
    tuned.at_start(task, BATCH, lambda line: None)
    ways = [work for work, module in gpu if module == "ways"]
    assert [(work.dtype, len(work.layers)) for work in ways] == [("bf16", 1)]


def test_a_gpu_that_cannot_be_measured_does_not_end_the_run(gpu, monkeypatch):
    def fails(works, *rest, **more):
        raise BackendError("tune: the process that measures did not start: no driver")
        yield

    monkeypatch.setattr(measure, "measure", fails)
    task, said = _task(device=torch.device("cuda")), []
    tuned.at_start(task, BATCH, said.append)
    assert said == [
        "this GPU could not be measured for this network, so plain PyTorch is used: tune: the "
        "process that measures did not start: no driver"
    ]


@pytest.mark.parametrize(
    ("settings", "times"), [({}, 1), ({"tune": "off"}, 0), ({"backend": "reference"}, 0)]
)
def test_fit_measures_unless_it_is_told_not_to(settings, times, monkeypatch):
    asked = []
    monkeypatch.setattr(tuned, "at_start", lambda *what: asked.append(what[1]))
    data = made_data.pictures(rows=64)
    config = TrainConfig(epochs=1, batch_size=BATCH, device="cpu", **settings)
    fit(network((data.x_train[0].numel(), 8, 4)), data, config)
    assert asked == [BATCH] * times


def test_explain_says_when_graph_is_taken():
    data = made_data.pictures(rows=64)
    net = network((data.x_train[0].numel(), 8, 4))
    config = TrainConfig(epochs=1, batch_size=BATCH, device="cpu")
    lines = explain(net, data, config).splitlines()
    assert "where the start of a training has found it right and faster" in lines[1]
