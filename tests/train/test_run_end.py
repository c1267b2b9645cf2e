"""The end of a run: results before pictures, equal files from equal runs, a full disk, and what
cannot be shown or has no reader."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from fusedmlp import cli
from fusedmlp.train import RunOptions, TrainError, crossval, fit, plots, run_folder, run_state
from fusedmlp.train.console import Console

from .. import made_data
from .test_train import config, network

made_data.need(*made_data.TRAIN_EXTRA, "sklearn")

QUICK = ("--dataset", "synthetic", "--hidden", "8", "--epochs", "2", "--device", "cpu")
RESULTS = {"config.json", "metrics.csv", "model.safetensors", "checkpoint.pt", "summary.json"}
PICTURES = {"curves.png", "predictions.png", "confusion.png"}
OF_A_TABLE = PICTURES | {"roc.png", "reliability.png", "importance.csv", "importance.png"}


def files(path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


# pictures


def test_pictures_are_drawn_whatever_a_notebook_left_in_the_environment(tmp_path):
    """Every cell of a notebook passes on this name; without its package matplotlib refuses to be
    imported, and once that ended a run that had been trained, without a summary."""
    named = {"MPLBACKEND": "module://no_such_package.backend_inline"}
    done = made_data.fusedmlp("train", *QUICK, "--out", "run", cwd=tmp_path, **named)
    assert done.returncode == 0 and "warning" not in done.stdout + done.stderr, done
    assert files(tmp_path / "run") == RESULTS | OF_A_TABLE
    flags = ("crossval", *QUICK, "--folds", "2", "--out", "cv")
    done = made_data.fusedmlp(*flags, cwd=tmp_path, **named)
    assert done.returncode == 0 and "warning" not in done.stdout + done.stderr, done
    assert {"summary.json", "results.csv", "crossval.png"} <= files(tmp_path / "cv")


def test_the_callers_choice_of_a_backend_is_left_alone():
    code = (
        "import os; from fusedmlp.train import plots; plots.new_figure(1, 1); import matplotlib; "
        "print(matplotlib.rcParams['backend'], os.environ['MPLBACKEND'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=made_data.environment(MPLBACKEND="svg"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "svg svg\n", done.stderr


def _fail(*_):
    raise RuntimeError("no ink\nand no paper")


def test_a_picture_that_fails_is_a_line_of_warning(tmp_path, monkeypatch, capsys, caplog):
    data = made_data.blobs()
    monkeypatch.setattr(plots, "curves", _fail)
    monkeypatch.setattr(plots, "confusion", _fail)
    fit(network(), data, config(), RunOptions(out=tmp_path / "said"), progress=Console())
    said = capsys.readouterr().out.splitlines()
    line = f"{tmp_path / 'said'}: no curves.png, confusion.png: no ink"
    assert said.count(f"warning: {line}") == 1
    assert files(tmp_path / "said") == RESULTS | {"predictions.png"}
    with caplog.at_level(logging.WARNING, logger="fusedmlp"):
        fit(network(), data, config(), RunOptions(out=tmp_path / "logged"))
    assert [record.getMessage() for record in caplog.records] == [line.replace("said", "logged")]
    monkeypatch.undo()
    fit(network(), data, config(), RunOptions(resume=tmp_path / "logged"))
    assert files(tmp_path / "logged") == RESULTS | PICTURES


def test_results_are_there_before_the_first_picture(tmp_path, monkeypatch):
    seen = []

    def look(history):
        seen.append(files(tmp_path / "run"))
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "curves", look)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), made_data.blobs(), config(), RunOptions(out=tmp_path / "run"))
    assert seen == [RESULTS] and files(tmp_path / "run") == RESULTS


def test_a_run_needs_no_matplotlib(tmp_path, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = made_data.blobs()
    fit(network(), data, config(), RunOptions(out=tmp_path / "run"))
    options = RunOptions(out=tmp_path / "cv")
    crossval(config(hidden=(4,), epochs=1), options=options, data=data, folds=2)
    first, second = (record.getMessage() for record in caplog.records)
    assert "no curves.png, predictions.png, confusion.png: " in first
    assert "no crossval.png: " in second
    for said in (first, second):
        assert "matplotlib" in said and said.endswith("pip install 'fusedmlp[train]'")
    assert files(tmp_path / "run") == RESULTS
    assert "summary.json" in files(tmp_path / "cv")


NAMES = ("$10 to $20", r"$\frac{", "\u732b \U0001f63a", "a\nb", "\udcff", "_x", "n" * 500, "")


@pytest.mark.parametrize("kind", ["rows", "images", "regression"])
def test_any_name_can_be_drawn(tmp_path, kind, caplog):
    """A dollar sign begins a formula, and what the font lacks is a warning a character."""
    if kind == "regression":
        data = replace(made_data.line(), name=NAMES[1], target=NAMES[2])
        net = network(sizes=(3, 8, 1))
    else:
        made = made_data.pictures(classes=4) if kind == "images" else made_data.blobs(classes=8)
        data = replace(made, name=NAMES[1], classes=NAMES[: len(made.classes)])
        net = network(sizes=(made.in_features, 8, len(made.classes)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(net, data, config(), RunOptions(out=tmp_path / "run"))
    assert not caplog.records
    assert sum(name.endswith(".png") for name in result.paths) == 3


# equal runs


def _comparable(path) -> dict[str, object]:
    """{file: its content}, without what a clock says."""
    found: dict[str, object] = {}
    for entry in path.iterdir():
        found[entry.name] = entry.read_bytes()
    for name in ("metrics.csv",):
        rows = found[name].decode().splitlines()
        found[name] = [row.rsplit(",", 1)[0] for row in rows]
    summary = json.loads(found["summary.json"])
    timed = ("seconds", "samples_per_second")
    found["summary.json"] = {k: v for k, v in summary.items() if not k.endswith(timed)}
    if "checkpoint.pt" in found:
        content = run_folder.load_checkpoint(path)
        for row in (*content["history"], content["position"]):
            for name in ("seconds", "total_seconds"):
                row.pop(name, None)
        found["checkpoint.pt"] = repr(content)
    return found


@pytest.mark.parametrize("command", ["train", "crossval"])
def test_two_equal_runs_leave_equal_files(tmp_path, command, monkeypatch):
    flags = [command, *QUICK, "--dropout", "0.2", "--optimizer", "adam", "--out", "run"]
    flags += ["--folds", "2"] if command == "crossval" else []
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert cli.main(flags) == 0
        found.append(_comparable(tmp_path / name / "run"))
    assert found[0].keys() == found[1].keys() >= {"model.safetensors", "config.json"}
    for name, content in found[0].items():
        assert found[1][name] == content, name


def test_the_model_file_does_not_depend_on_the_order_of_a_hash_table():
    """The library keeps metadata in a table that has another order in each call."""
    net = network(dropout=0.1)
    about = run_state.describe_run(net, made_data.blobs())
    assert len({run_folder.model_bytes(net, about) for _ in range(20)}) == 1


def test_the_model_file_is_one_that_the_library_reads(tmp_path):
    from safetensors import safe_open

    result = fit(
        network(dropout=0.1), made_data.blobs(), config(), RunOptions(out=tmp_path / "run")
    )
    with safe_open(result.paths["model.safetensors"], framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["fusedmlp"])["model"]["kind"] == "FusedMLP"
        for name, tensor in result.model.state_dict().items():
            assert torch.equal(file.get_tensor(name), tensor)


# a full disk


def _fill_at(monkeypatch, count: int) -> list:
    """From the write of that number on there is no room."""
    calls, sync = [], os.fsync

    def fsync(handle):
        calls.append(handle)
        if len(calls) >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(run_folder.os, "fsync", fsync)
    return calls


def test_a_disk_that_is_full_at_any_write_is_told_as_it_is(tmp_path, monkeypatch, caplog):
    """The first checkpoint has nothing to go on from; whatever comes later has, and can."""
    monkeypatch.setattr("fusedmlp.train.loop.SAVE_SECONDS", 0.0)
    data, told, number = made_data.blobs(), [], 0
    while True:
        number += 1
        run = tmp_path / str(number)
        with monkeypatch.context() as patch:
            _fill_at(patch, number)
            try:
                fit(network(), data, config(), RunOptions(out=run))
                break
            except TrainError as error:
                told.append(str(error))
        assert "No space left on device; it takes " in told[-1] and "are free there" in told[-1]
        if number == 1:
            assert told[0].endswith("there is no checkpoint yet, so the run has to be started anew")
            assert not run.exists()
            continue
        assert files(run) <= RESULTS and not any(name.startswith(".") for name in files(run))
        held = run_folder.load_checkpoint(run)["position"]["epoch"]
        assert told[-1].endswith(
            f"its checkpoint of epoch {held} is kept: go on with --resume {run}"
        )
        assert fit(network(), data, config(), RunOptions(resume=run)).history[-1]["epoch"] == 2
        assert files(run) == RESULTS | PICTURES
    # Two checkpoints with their metrics, and the results. Of pictures there are warnings.
    assert [text.split(f"{tmp_path}")[1].split(":")[0][2:] for text in told] == [
        "/checkpoint.pt",
        "/metrics.csv",
        "/checkpoint.pt",
        "/metrics.csv",
        "/config.json",
        "/metrics.csv",
        "/model.safetensors",
        "/summary.json",
    ]
    assert "no curves.png: cannot write" in caplog.text.replace(f"{run}: ", "")


def test_what_a_killed_run_was_writing_is_removed_when_it_goes_on(tmp_path):
    data = made_data.blobs()
    fit(network(), data, config(epochs=1), RunOptions(out=tmp_path / "run"))
    left = tmp_path / "run" / ".checkpoint.pt-abc"
    left.write_bytes(b"half")
    fit(network(), data, config(epochs=2), RunOptions(resume=tmp_path / "run"))
    assert not left.exists()
    left.write_bytes(b"half")
    fit(network(), data, config(epochs=1), RunOptions(out=tmp_path / "run", overwrite=True))
    assert not left.exists()


# terminals


def test_a_run_that_cannot_speak_still_ends(tmp_path):
    """One shell, since each process takes seconds to start: characters that are lacking, no
    output, no reader, a full disk under the output."""
    python = f"'{sys.executable}' -m fusedmlp"
    flags = " ".join(QUICK)
    script = f"""
PYTHONIOENCODING=ascii {python} train {flags} --out 'o ü' > ascii.txt; echo ascii $?
LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {python} train {flags} --out 'c ü' > c.txt; echo c $?
{python} train {flags} --out closed >&- 2>&-; echo closed $?
{python} train {flags} --out piped | head -n 1 > piped.txt; echo piped ${{PIPESTATUS[0]}}
{python} train {flags} --out full > /dev/full; echo full $?
{python} predict closed --rows 0 | head -n 1; echo predict ${{PIPESTATUS[1]}}
{python} info > /dev/full; echo info $?
{python} --help | head -n 1
"""
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=made_data.environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.splitlines() == [
        "ascii 0",
        "c 0",
        "closed 0",
        "piped 0",
        "full 1",  # the run is whole, its output is not
        "row,predicted,probability,true",
        "predict 0",
        "info 1",
        "usage: fusedmlp COMMAND [...]",
    ], done
    said = "fusedmlp: cannot write to standard output: No space left on device\n"
    assert done.stderr == 2 * said  # of the run, and of info
    for name in ("o ü", "c ü", "closed", "piped", "full"):
        assert files(tmp_path / name) == RESULTS | OF_A_TABLE, name
    assert "run folder: o \\xfc\n" in (tmp_path / "ascii.txt").read_text("ascii")
    assert "run folder: c " in (tmp_path / "c.txt").read_text("ascii")
    assert (tmp_path / "piped.txt").read_text().startswith("synthetic: 10000 rows")


def test_a_name_that_is_no_text_can_be_shown(tmp_path, capsysbinary, monkeypatch):
    """File names are bytes; those that are no UTF-8 come as lone surrogates."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "no\udcff"]) == 1
    assert capsysbinary.readouterr().err.startswith(b"fusedmlp: no\\udcff must be a run folder")


def test_a_console_without_a_terminal_is_silent(monkeypatch, capsys, tmp_path):
    """As in a service without standard output, or with one that has been closed."""
    monkeypatch.setattr(sys, "stdout", None)
    assert fit(network(), made_data.blobs(), config(), progress=Console()).history
    with open(tmp_path / "closed", "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        console = Console()
    assert fit(network(), made_data.blobs(), config(), progress=console).history


def test_a_run_that_goes_on_says_from_where(tmp_path, capsys):
    data, run = made_data.blobs(), tmp_path / "run"
    fit(network(), data, config(epochs=2), RunOptions(out=run), progress=Console())
    fit(network(), data, config(epochs=3), RunOptions(resume=run), progress=Console())
    assert capsys.readouterr().out.splitlines().count("going on from epoch 3, step 0") == 1


def test_folders_of_runs_know_all_that_runs_write():
    assert RESULTS | OF_A_TABLE | {"residuals.png"} <= set(run_folder.FILES)
