"""--time-limit: training ends in time after an epoch, says so, and can go on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from fusedmlp.train import (
    Member,
    RunOptions,
    TrainConfig,
    UsageError,
    crossval,
    fit,
    fit_many,
    load,
    run_state,
)
from fusedmlp.train.console import Console

from .. import made_data
from .test_train import config, network

made_data.need(*made_data.TRAIN_EXTRA, "sklearn")


@pytest.fixture
def clock(monkeypatch):
    """A second goes by whenever a run looks at its clock: once an epoch, and once a checkpoint."""
    now = [0.0]

    def monotonic():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(run_state, "time", SimpleNamespace(monotonic=monotonic))


@pytest.mark.parametrize("limit, epochs", [(0.1, 1), (1, 1), (1.5, 1), (2, 2), (4.9, 4), (99, 9)])
def test_no_epoch_is_begun_that_would_not_fit(clock, limit, epochs):
    result = fit(network(), made_data.blobs(), config(epochs=9, time_limit=limit))
    assert len(result.history) == epochs == result.summary["epochs"]
    assert not result.interrupted


def test_what_was_reached_is_written_and_goes_on_to_the_same_weights(clock, tmp_path, capsys):
    data, whole = made_data.blobs(), network(dropout=0.2)
    fit(whole, data, config(epochs=7))
    options = RunOptions(out=tmp_path / "run")
    net = network(dropout=0.2)
    fit(net, data, config(epochs=7, time_limit=5), options, progress=Console())
    said = capsys.readouterr().out
    assert (
        "note: --time-limit 5: stopped after 2 of 7 epochs, since another would not fit; go on "
        f"with --resume {tmp_path / 'run'}\n" in said
    )
    assert "test accuracy" in said and "interrupted" not in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epochs"] == 2 and summary["test_accuracy"] is not None
    assert (tmp_path / "run" / "curves.png").exists() and load(tmp_path / "run").model
    # The limit was of that call; without one the run goes on to its end.
    net = network(dropout=0.2)
    result = fit(net, data, config(epochs=7), RunOptions(resume=tmp_path / "run"))
    assert len(result.history) == 7
    for mine, theirs in zip(net.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_from_the_command_line(tmp_path, capsys):
    flags = ("--dataset", "synthetic", "--hidden", 8, "--device", "cpu", "--out", tmp_path / "r")
    assert made_data.command("train", *flags, "--epochs", 9999, "--time-limit", 0.001) == 0
    said = capsys.readouterr().out
    assert "note: --time-limit 0.001: stopped after 1 of 9999 epochs" in said
    flags = ("train", "--resume", tmp_path / "r", "--epochs", 3)
    assert made_data.command(*flags) == 0
    assert "stopped" not in capsys.readouterr().out
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["epochs"] == 3


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_is_none(limit):
    with pytest.raises(UsageError, match="--time-limit must be a number above 0, got"):
        TrainConfig(time_limit=limit).check()


def test_several_networks_have_no_limit():
    limited, data = config(time_limit=1), made_data.blobs()
    with pytest.raises(UsageError, match="--time-limit belongs to train"):
        crossval(limited, data=data)
    member = Member(network(), limited, torch.arange(9))
    with pytest.raises(UsageError, match="member 0: --time-limit belongs to fit"):
        fit_many([member], data.x_train, data.y_train, loss="cross_entropy")
