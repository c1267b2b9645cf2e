"""`fusedmlp compare`: what differs between runs, their scores and seconds."""

from __future__ import annotations

import json

import pytest

from fusedmlp.train import RunOptions, crossval, fit

from .. import made_data
from .test_train import config, network

made_data.need(*made_data.TRAIN_EXTRA, "rich", "sklearn")


def told(capsys, *folders) -> list[list[str]]:
    """The cells of each line of the table."""
    assert made_data.command("compare", *folders) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line[0] in "┃│"]
    return [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in rows]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = made_data.blobs()
    fit(network(), data, config(lr=0.1), RunOptions(out="a"))
    fit(network(), data, config(lr=0.5, dropout=(0.1,)), RunOptions(out="b"))
    return tmp_path


def test_settings_that_differ_scores_and_seconds(runs, capsys):
    head, first, second = told(capsys, "b", "a")
    scores = ["test_accuracy", "test_loss", "train_accuracy", "train_loss"]
    assert head == ["run", "dropout", "lr", *scores, "seconds"]
    for name, row, settings in (("b", first, ["0.1", "0.5"]), ("a", second, ["0", "0.1"])):
        summary = json.loads((runs / name / "summary.json").read_text())
        assert row[:3] == [name, *settings]
        assert row[3:7] == [f"{summary[score]:.4f}" for score in scores]
        assert row[7] == f"{summary['train_seconds']:.2f}"


def test_equal_settings_and_other_machines(runs, capsys):
    assert made_data.command("compare", "a", "a") == 0
    assert "all settings are the same" in capsys.readouterr().out
    assert told(capsys, "a")[0][:2] == ["run", "test_accuracy"]
    path = runs / "a" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": 64}))
    head, first, _ = told(capsys, "a", "b")
    assert first[head.index("threads")] == "64"


def test_runs_that_are_not_finished_and_cross_validations(runs, capsys):
    (runs / "b" / "summary.json").unlink()
    crossval(config(hidden=(4,), epochs=1), options=RunOptions(out="cv"), folds=2,
             data=made_data.blobs())  # fmt: skip
    head, a, b, cv = told(capsys, "a", "b", "cv")
    epochs, accuracy = head.index("epochs"), head.index("test_accuracy")
    assert [row[epochs] for row in (a, b, cv)] == ["2", "2 of 2", "1"]
    assert b[-1] == "-" and float(b[accuracy]) > 0.3
    summary = json.loads((runs / "cv" / "summary.json").read_text())
    assert cv[accuracy] == f"{1 - summary['test_error']:.4f}"


def test_numbers_are_told_in_their_own_scores(tmp_path, capsys):
    net = network(sizes=(3, 8, 1))
    result = fit(net, made_data.line(), config(), RunOptions(out=tmp_path / "[red] run"))
    head, row = told(capsys, tmp_path / "[red] run")
    assert head[1:4] == ["test_r2", "test_rmse", "test_loss"]
    assert row[0].endswith("[red] run") and row[1] == f"{result.summary['test_r2']:.4f}"


def test_what_is_no_run_is_one_message(runs, capsys):
    for arguments, code, message in (
        ((), 2, "compare needs run folders"),
        (("a", "gone"), 1, "gone must be a run folder, but it has no config.json"),
    ):
        assert made_data.command("compare", *arguments) == code
        said = capsys.readouterr()
        assert message in said.err and len(said.err.splitlines()) == 1 and not said.out
    for content in ("{", "[]", "\xff"):
        (runs / "b" / "summary.json").write_bytes(content.encode("latin-1"))
        assert made_data.command("compare", "a", "b") == 1
        assert "b/summary.json is truncated, corrupted or no summary" in capsys.readouterr().err
    (runs / "b" / "summary.json").unlink()
    (runs / "b" / "metrics.csv").write_text("epoch,train_loss\n1,many\n")
    assert made_data.command("compare", "a", "b") == 1
    assert "b/metrics.csv is truncated, corrupted or no metrics" in capsys.readouterr().err
