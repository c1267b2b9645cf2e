"""The ways of bench.steps: small and on a CPU, what is refused a time, and their tables."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from bench import record, report, steps, ways
from bench.ways import network

LEFT_OUT = ("eager graph", "compile", "compile graph")  # without a GPU


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results file of a small run, on a machine with torch and no package of an extra."""
    out = tmp_path_factory.mktemp("results") / "steps.json"
    small = (
        "--group ways epochs --dims 12-16-3 --batch 16 --steps 10 --budget 0 --rows 60 --epochs 1"
    )
    code = (
        "import sys\n"
        "for name in ('tyro', 'rich', 'matplotlib', 'safetensors', 'sklearn', 'torchvision'):\n"
        "    sys.modules[name] = None\n"
        "from bench import steps\n"
        "sys.exit(steps.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, *small.split(), "--seeds", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT)
    assert done.returncode == 0, done.stderr
    assert "us a step" in done.stdout and "epochs 1  rounds 2  noise" in done.stdout
    return record.read(out)


def test_every_way_has_a_row(results):
    found = [row for row in results["rows"] if row["table"] == "steps"]
    assert len(found) == 2 * len(ways.WAYS)  # bf16 and fp32
    for row in found:
        if row["way"] in LEFT_OUT:
            assert "CUDA" in row["left out"] and "us a step" not in row
        else:
            assert len(row["us a step"]) == 3 and min(row["us a step"]) > 0
            assert row["time over graph's"][0] > 0
    epochs = [row for row in results["rows"] if row["table"] == "epochs"]
    assert len(epochs) == 2 * 2 * 2
    assert all(row["rounds"] == 2 and row["data"] == "noise" for row in epochs)
    assert not any("test accuracy" in row for row in epochs)  # of noise


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [(), (0.5,)])
def test_ways_are_held_against_fp64(precision, dropout):
    case = network("12-32-3", dropout, precision=precision, batch=64)
    data = ways.noise(256, 1, 12, 3)
    checker = ways.Checker(case, data, torch.randperm(256))
    for way in (ways.Ours, ways.Eager):
        made = way(case, data)
        before = ways.flat(made.net)
        assert checker.wrong(made) is None
        assert torch.equal(ways.flat(made.net), before)

    class Slower(ways.Ours):
        """A rate that is 3 % too small."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.engine.task.optimizer.param_groups[0]["lr"] = 0.97 * case.rate

    class Half(ways.Eager):
        """Reports half of its losses."""

        def read(self):
            return super().read() / 2

    assert "relative error" in checker.wrong(Slower(case, data))
    assert "losses add up" in checker.wrong(Half(case, data))


def test_a_way_that_is_wrong_gets_no_time(monkeypatch):
    monkeypatch.setattr(ways.Checker, "wrong", lambda self, way: "wrong: by order")
    rows = steps.way_rows(network("12-16-3", batch=16), ways.noise(64, 1, 12, 3), 2, 0.0)
    assert all(row["left out"] and "us a step" not in row for row in rows)


def test_steps_without_a_graph_are_not_called_a_graph(monkeypatch):
    def call_by_call(self, order):
        self.engine.name = "graph, call by call"  # as the engine does where a capture fails

    monkeypatch.setattr(ways, "WAYS", {"graph": ways.Ours})
    monkeypatch.setattr(ways.Checker, "wrong", lambda self, way: None)
    monkeypatch.setattr(ways.Ours, "steps", call_by_call)
    (row,) = steps.way_rows(network("12-16-3", batch=16), ways.noise(64, 1, 12, 3), 2, 0.0)
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
    first, second = (tmp_path / "README.md").read_text().split("<!-- /bench:gpu-steps -->")
    assert "| 12-16-3 batch 16 | fp32 | eager |" in first and "0.8812" not in first
    assert "us a step" in first and "left out" in first and "it needs CUDA graphs" in first
    assert "0.8812" in second and "| 12-16-3 " not in second


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert steps.main(["--device", "cuda"]) == 2
    assert "--group ways runs the same code" in capsys.readouterr().err


def test_groups_of_a_cpu_and_ways_are_not_mixed(capsys):
    for asked in (["--group", "main", "ways"], ["--device", "cuda", "--group", "batch"]):
        with pytest.raises(SystemExit):
            steps.main(asked)
        assert "measured apart" in capsys.readouterr().err


@pytest.mark.gpu
def test_all_ways_run_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU is available to torch")
    out = tmp_path / "steps.json"
    small = "--device cuda --group ways --dims 64-32-10 --steps 20 --budget 0.1 --rows 2000"
    assert steps.main([*small.split(), "--precision", "bf16", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows if "left out" in row] == []
