"""bench.gpu_step: the same code small and on a CPU, what it refuses to time, and its tables."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from bench import gpu_step, record, report, step_ways
from bench.step_ways import Case

LEFT_OUT = ("eager graph", "compile", "compile graph")  # without a GPU


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results file of a small run, on a machine with torch and no package of an extra."""
    out = tmp_path_factory.mktemp("results") / "steps.json"
    small = "--device cpu --dims 12-16-3 --batch 16 --steps 10 --budget 0 --rows 60 --epochs 1"
    code = (
        "import sys\n"
        "for name in ('tyro', 'rich', 'matplotlib', 'safetensors', 'sklearn', 'torchvision'):\n"
        "    sys.modules[name] = None\n"
        "from bench import gpu_step\n"
        "sys.exit(gpu_step.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, *small.split(), "--seeds", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT)
    assert done.returncode == 0, done.stderr
    assert "us a step" in done.stdout and "ms for 1 epochs of noise" in done.stdout
    return record.read(out)


def test_every_way_has_a_row(results):
    steps = [row for row in results["rows"] if row["table"] == "steps"]
    assert len(steps) == 2 * len(step_ways.WAYS)  # bf16 and fp32
    for row in steps:
        if row["way"] in LEFT_OUT:
            assert "CUDA" in row["left out"] and "us a step" not in row
        else:
            assert len(row["us a step"]) == 3 and min(row["us a step"]) > 0
            assert row["time over graph's"][0] > 0
    epochs = [row for row in results["rows"] if row["table"] == "epochs"]
    assert len(epochs) == 2 * 2 * 2
    assert all(row["seeds"] == 2 and row["data"] == "noise" for row in epochs)
    assert not any("test accuracy" in row for row in epochs)  # of noise


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [(), (0.5,)])
def test_ways_are_held_against_fp64(precision, dropout):
    case = Case((12, 32, 3), dropout, precision, batch=64)
    loaded = gpu_step.made(256, 1, 12, 3)
    checker = step_ways.Checker(case, loaded, torch.randperm(256))
    for way in (step_ways.Ours, step_ways.Eager):
        made = way(case, loaded)
        before = step_ways._flat(made.net)
        assert checker.wrong(made) is None
        assert torch.equal(step_ways._flat(made.net), before)

    class Slower(step_ways.Ours):
        """A rate that is 3 % too small."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.engine.task.optimizer.param_groups[0]["lr"] = 0.97 * step_ways.RATE

    class Half(step_ways.Eager):
        """Reports half of its losses."""

        def read(self):
            return super().read() / 2

    assert "relative error" in checker.wrong(Slower(case, loaded))
    assert "losses add up" in checker.wrong(Half(case, loaded))


def test_a_way_that_is_wrong_gets_no_time(monkeypatch):
    monkeypatch.setattr(step_ways.Checker, "wrong", lambda self, way: "wrong: by order")
    case = Case((12, 16, 3), (), "fp32", batch=16)
    rows = gpu_step.step_rows(case, gpu_step.made(64, 1, 12, 3), 2, 0.0)
    assert all(row["left out"] and "us a step" not in row for row in rows)


def test_steps_without_a_graph_are_not_called_a_graph(monkeypatch):
    def steps(self, order):
        self.engine.name = "graph, call by call"  # as the engine does where a capture fails

    monkeypatch.setattr(step_ways, "WAYS", {"graph": step_ways.Ours})
    monkeypatch.setattr(step_ways.Checker, "wrong", lambda self, way: None)
    monkeypatch.setattr(step_ways.Ours, "steps", steps)
    case = Case((12, 16, 3), (), "fp32", batch=16)
    (row,) = gpu_step.step_rows(case, gpu_step.made(64, 1, 12, 3), 2, 0.0)
    assert row["way"] == "graph, call by call" and row["us a step"]


def test_a_gpus_results_become_two_tables(results, tmp_path):
    folder = tmp_path / "bench" / "results"
    found = results | {"name": "gpu_steps"}
    for row in found["rows"]:
        if row["table"] == "epochs":
            row |= {"data": "fashion_mnist", "test accuracy": 0.8812, "deviation": 0.0021}
    record.write(folder / "gpu" / "steps.json", found)
    text = "".join(
        f"<!-- bench:{n} -->\n<!-- /bench:{n} -->\n" for n in ("gpu-steps", "gpu-epochs")
    )
    (tmp_path / "README.md").write_text(text)
    report.main(["--root", str(tmp_path), "--plots", str(tmp_path / "plots")])
    steps, epochs = (tmp_path / "README.md").read_text().split("<!-- /bench:gpu-steps -->")
    assert "| 12-16-3 | fp32 | eager |" in steps and "0.8812" not in steps
    assert "us a step" in steps and "left out" in steps and "it needs CUDA graphs" in steps
    assert "0.8812" in epochs and "| 12-16-3 |" not in epochs


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_step.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_all_ways_run_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU is available to torch")
    out = tmp_path / "steps.json"
    small = "--dims 64-32-10 --steps 20 --budget 0.1 --rows 2000 --epochs 0 --precision bf16"
    assert gpu_step.main([*small.split(), "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows if "left out" in row] == []
