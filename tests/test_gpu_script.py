"""bench/gpu.sh with a Python that only writes down what it is asked to run."""

import os
import shutil
import subprocess

import pytest

from bench import record

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
    assert files[:2] == ["tests/test_cuda_extension.py", "tests/test_triton.py"]
    assert files[2].startswith("tests/test_graph_")
    assert files.index("tests/test_ops.py") < files.index("tests/test_cross_entropy.py") < 15
    every = {f"tests/{path.name}" for path in (record.ROOT / "tests").glob("test_*.py")}
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
