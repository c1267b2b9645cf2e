"""bench/gpu.sh with a Python that only writes down what it is asked to run."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from bench import record, run, smoke, steps
from fusedmlp.commands import tune

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

PYTHON = """#!/usr/bin/env bash
case $1 in
    -c) echo 9.0 ;;
    -) cat >/dev/null; for name in torch setuptools pytest xdist pytest_timeout; do
           [[ " $MISSING " == *" $name "* ]] || echo -n "$name "
       done ;;
    *) [ "$2" = bench.record ] || { echo "$*" >>"$CALLS"; echo "3 passed in 1.0s"; } ;;
esac
[[ "$*" != *"$HANGS"* ]] || sleep 60
[[ "$*" != *"$FAILS"* ]]
"""
TOOL = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
"""
PARTS = {
    "first": "build smoke tests sanitize steps layers",
    "measure": "build tune grid elementwise",
    "deep": "build counters compiled epochs memcheck",
}


@pytest.fixture
def gpu(tmp_path):
    """Runs parts or steps without some packages; the calls that it made, as lists of words."""
    calls, results = tmp_path / "calls", tmp_path / "results"
    for name in ("python", "ncu", "compute-sanitizer"):
        (tmp_path / name).write_text(PYTHON if name == "python" else TOOL)
        (tmp_path / name).chmod(0o755)

    def run(*wanted, missing="", fails="no call", **more):
        calls.write_text("")
        (tmp_path / "fusedmlp").mkdir(exist_ok=True)
        (tmp_path / "fusedmlp" / "table.json").write_text("{}")
        made = dict(PYTHON=str(tmp_path / "python"), CALLS=str(calls), RESULTS=str(results))
        made |= dict(MISSING=missing, FAILS=fails, HANGS="no call", XDG_CACHE_HOME=str(tmp_path))
        made["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "bench/gpu.sh", *wanted],
            cwd=record.ROOT,
            env=os.environ | made | more,
            capture_output=True,
            text=True,
        )
        return done, [line.split() for line in calls.read_text().splitlines()]

    run.results = results
    return run


def _summary(gpu):
    lines = (gpu.results / "summary.tsv").read_text().splitlines()
    return {tuple(line.split("\t")[:2]): line.split("\t")[2] for line in lines}


def test_parts_run_their_steps_and_say_how_each_went(gpu):
    done, calls = gpu()
    assert done.returncode == 0, done.stderr
    every = [(part, step) for part, names in PARTS.items() for step in names.split()]
    assert _summary(gpu) == dict.fromkeys(every, "ok")
    for part, names in PARTS.items():
        log = (gpu.results / f"{part}.txt").read_text()
        assert re.findall("== gpu: (.*)", log) == names.split()
    assert all(f"{part:<9} {step:<12} ok" in done.stdout for part, step in every)
    assert (gpu.results / "table.json").exists()
    assert "setup.py -q build_native --editable-mode".split() in calls


def test_a_step_that_fails_ends_neither_its_part_nor_the_others(gpu):
    done, _ = gpu("first", "measure", fails="bench.smoke")
    assert done.returncode == 1
    assert [name for name, word in _summary(gpu).items() if word != "ok"] == [("first", "smoke")]


def test_a_part_ends_in_time_and_keeps_what_it_has(gpu):
    """Whatever hangs: a GPU is often to be had for ten minutes, and a few files may leave it."""
    start = time.monotonic()
    done, calls = gpu("first", PART_SECONDS="3", HANGS="bench.smoke")
    assert time.monotonic() - start < 20 and done.returncode == 1
    assert "gpu: cut off after" in done.stdout and "gpu: no time left for: " in done.stdout
    said = _summary(gpu)
    assert said["first", "build"] == "ok" and said["first", "layers"] == "FAILED"
    assert len(list(gpu.results.iterdir())) <= 8


def test_gpu_tests_run_side_by_side_and_the_important_files_first(gpu):
    done, (call,) = gpu("tests")
    assert done.returncode == 0, done.stderr
    said = " ".join(call)
    assert "-m gpu" in said and "-n " in said and "--dist worksteal" in said
    assert "--timeout 60" in said and "--tb=line" in said and "-rfE" in said
    assert f"--junitxml {gpu.results}/junit.xml" in said
    assert "--continue-on-collection-errors" in call
    files = [word for word in call if word.startswith("tests/")]
    assert files[:2] == ["tests/backends/test_cuda_extension.py", "tests/backends/test_triton.py"]
    assert files[2].startswith("tests/train/test_graph_")
    ops, loss = "tests/autograd/test_ops.py", "tests/autograd/test_cross_entropy.py"
    assert files.index(ops) < files.index(loss) < 15
    root = record.ROOT
    every = {str(path.relative_to(root)) for path in (root / "tests").rglob("test_*.py")}
    assert len(files) == len(set(files)) and set(files) == every


def test_what_is_missing_is_done_without_or_named(gpu):
    done, (call,) = gpu("tests", missing="xdist pytest_timeout")
    assert done.returncode == 0, done.stderr
    assert not {"-n", "--dist", "--timeout"} & set(call)
    for step, package in (("tests", "pytest"), ("build", "setuptools")):
        done, calls = gpu(step, missing=package)
        assert done.returncode == 1 and not calls and f"no {package}" in done.stdout
    done, _ = gpu("first", missing="torch")
    assert done.returncode == 1 and "has no torch" in done.stderr
    done, _ = gpu("first", fails="-c")
    assert done.returncode == 1 and "no NVIDIA GPU that torch can use" in done.stderr
    done, _ = gpu("frist")
    assert (
        done.returncode == 1 and "unknown part or step 'frist'; known: all, first (" in done.stderr
    )


def test_results_of_an_earlier_call_stay(gpu):
    gpu.results.mkdir()
    (gpu.results / "ops.json").write_text("{}")
    (gpu.results / "summary.tsv").write_text("first\tbuild\tok\t7\tfine\n")
    done, _ = gpu("tests")
    assert (gpu.results / "ops.json").read_text() == "{}"
    assert _summary(gpu) == {("first", "build"): "ok", ("tests", "tests"): "ok"}
    assert "build" in done.stdout


def test_each_command_is_called_with_arguments_that_it_knows(gpu, monkeypatch):
    done, calls = gpu()
    known, files = {"bench.steps": steps.parse, "bench.run": run.parse}, []
    for call in calls:
        words = call[call.index("-m") + 1 :] if "-m" in call else []
        if words and words[0] in known:
            asked = known[words[0]](words[1:])
            assert asked.device == "cuda" and asked.seconds <= 240
            files.append(asked.out.name)
    names = ["steps", "ops", "grid", "elementwise", "compiled_steps", "compiled", "epochs"]
    assert files == [f"{name}.json" for name in names]
    (tuned,) = [call for call in calls if "tune" in call]
    asked = tune._parser().parse_args(tuned[tuned.index("tune") + 1 :])
    assert asked.missing and (8192, 4096, 16384) in asked.layers
    smokes = [call for call in calls if "bench.smoke" in call]
    assert [call[0] for call in smokes] == ["-m", "ncu", "compute-sanitizer"]
    tools = [call[2] for call in calls if "tests.ptx.harness" in call]
    assert tools == ["memcheck", "racecheck", "synccheck", "initcheck"]


@pytest.mark.slow
def test_a_rehearsal_runs_what_a_cpu_can_of_a_part(tmp_path):
    """`make gpu REHEARSE=1 PART=...` with this Python; the longest parts of it have other tests."""
    wanted = ("smoke", "steps", "layers", "tune", "counters")
    done = subprocess.run(
        ["bash", "bench/gpu.sh", *wanted],
        cwd=record.ROOT,
        env=os.environ | dict(PYTHON=sys.executable, RESULTS=str(tmp_path), REHEARSE="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert [line.split()[:3:2] for line in done.stdout.splitlines()[-len(wanted) :]] == [
        [step, "ok"] for step in wanted
    ]
    assert json.loads((tmp_path / "machine.json").read_text())["ceilings"]["copy_gb_per_s"] > 0


def test_a_failure_of_the_smoke_test_is_a_line_and_not_the_end(monkeypatch, capsys):
    def broken(case, backend):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(smoke, "_within_budget", broken)
    monkeypatch.setattr(smoke, "ceilings", lambda device: {"copy_gb_per_s": 1.0})
    assert smoke.main(["--device", "cpu", "--backend", "reference"]) == 1
    said = capsys.readouterr().out
    assert "FAILED  reference mlp fp32: RuntimeError: no kernel image\n" in said
    assert re.search(r"ok +[\d.]+ s  reference masks  bit for bit", said)
    assert "checks, 6 failed" in said and "and more" not in said


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
