"""bench/gpu.sh with a Python that only writes down what it is asked to run."""

import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from bench import record, run, steps

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

PYTHON = """#!/usr/bin/env bash
case $1 in
    -c) name=${2#import }; [[ " $MISSING " != *" $name "* ]] ;;
    -) cat >/dev/null ;;
    -m) [ "$2" = bench.record ] || { echo "$*" >>"$CALLS"; echo "3 passed in 1.0s"; } ;;
    *) echo "$*" >>"$CALLS"; echo "3 passed in 1.0s" ;;
esac
"""


@pytest.fixture
def gpu(tmp_path):
    """Runs a part without some packages; the pytest calls that it made, as lists of words."""
    python, calls, results = (tmp_path / name for name in ("python", "calls", "results"))
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(part, *missing):
        calls.write_text("")
        environment = dict(PYTHON=str(python), CALLS=str(calls), RESULTS=str(results))
        done = subprocess.run(
            ["bash", "bench/gpu.sh", part],
            cwd=record.ROOT,
            env=os.environ | environment | {"MISSING": " ".join(missing)},
            capture_output=True,
            text=True,
        )
        return done, [line.split() for line in calls.read_text().splitlines()]

    run.results = results
    return run


def test_gpu_tests_run_side_by_side_and_the_important_files_first(gpu):
    done, (first, rest) = gpu("test")
    assert done.returncode == 0, done.stderr
    said = " ".join(first)
    assert "-m gpu" in said and "-n " in said and "--dist worksteal" in said
    assert "--timeout 60" in said and "--tb=line" in said and "-rfE" in said
    assert f"--junitxml {gpu.results}/junit.xml" in said
    assert "--continue-on-collection-errors" in first and "--continue-on-collection-errors" in rest
    files = [word for word in first if word.startswith("tests/")]
    assert files[:2] == ["tests/backends/test_cuda_extension.py", "tests/backends/test_triton.py"]
    assert files[2].startswith("tests/train/test_graph_")
    ops, loss = "tests/autograd/test_ops.py", "tests/autograd/test_cross_entropy.py"
    assert files.index(ops) < files.index(loss) < 15
    root = record.ROOT
    every = {str(path.relative_to(root)) for path in (root / "tests").rglob("test_*.py")}
    assert len(files) == len(set(files)) and set(files) == every


def test_plugins_that_are_missing_are_done_without(gpu):
    done, calls = gpu("test", "xdist", "pytest_timeout")
    assert done.returncode == 0, done.stderr
    assert len(calls) == 2
    for call in calls:
        assert not {"-n", "--dist", "--timeout"} & set(call)
    done, calls = gpu("test", "pytest")
    assert done.returncode == 1 and not calls and "no pytest" in done.stdout


def test_results_of_an_earlier_call_stay(gpu):
    gpu.results.mkdir()
    (gpu.results / "ops.json").write_text("{}")
    (gpu.results / "summary.tsv").write_text("build\tok\t7\tfine\n")
    done, _ = gpu("test")
    assert (gpu.results / "ops.json").read_text() == "{}"
    summary = (gpu.results / "summary.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in summary] == [["build", "ok"], ["test", "ok"]]
    assert "build" in done.stdout


def test_benchmarks_are_called_with_arguments_that_they_know(gpu):
    done, (first, second) = gpu("bench")
    assert done.returncode == 0, done.stderr
    assert (first[:2], second[:2]) == (["-m", "bench.steps"], ["-m", "bench.run"])
    asked = steps.parse(first[2:])
    assert (asked.device, asked.group, asked.seconds) == ("cuda", ["ways", "epochs"], 150)
    assert str(asked.out) == f"{gpu.results}/steps.json"
    asked = run.parse(second[2:])
    assert (asked.suite, asked.device, asked.resume) == ("gpu", "cuda", True)


def test_the_machine_is_written_down_around_each_part(tmp_path, monkeypatch):
    gpu = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=8)
    monkeypatch.setattr(record.torch.cuda, "get_device_properties", lambda number: gpu)
    answers = {"clocks.sm": "1980 MHz"}
    monkeypatch.setattr(record, "gpu_state", lambda *names: {n: answers.get(n) for n in names})
    path = tmp_path / "machine.json"
    for moment in ("build before", "build after"):
        assert record.main([str(path), moment]) == 0
    found = json.loads(path.read_text())
    assert found["machine"]["gpu"] == "A GPU" and found["multiprocessors"] == 132
    assert list(found["clocks"]) == ["build before", "build after"]
    assert found["clocks"]["build after"]["clocks.sm"] == "1980 MHz"
