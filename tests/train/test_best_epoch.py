"""The best epoch: which one is kept, early stopping, and resuming with both."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fusedmlp.train import (
    Member,
    RunOptions,
    TrainConfig,
    TrainError,
    UsageError,
    crossval,
    fit,
    fit_many,
    load,
)
from fusedmlp.train.best import best_epoch
from fusedmlp.train.data.types import Data, parts_of
from fusedmlp.train.run_folder import load_checkpoint

from .. import made_data
from ..engines import config, network, state_equal

made_data.need(*made_data.TRAIN_EXTRA, "sklearn")
BEST = dict(keep="best", val_split=0.25, lr=0.3, dropout=0.2)


def rows_of(*pairs) -> list[dict]:
    return [{"val_accuracy": a, "val_loss": b} for a, b in pairs]


def test_the_best_has_most_right_then_the_lower_loss_then_comes_first():
    assert best_epoch(rows_of((0.5, 1.0), (0.9, 3.0), (0.9, 2.0), (0.9, 2.0), (0.8, 0.1))) == 3
    assert best_epoch(rows_of((None, 2.0), (None, 1.0), (None, math.nan))) == 2
    assert best_epoch([]) == 0 and best_epoch(rows_of((None, math.nan))) == 0


def noise() -> Data:
    """Classes that have little to do with the rows, so that long training makes it worse."""
    data = made_data.blobs(rows=200)
    generator = torch.Generator().manual_seed(1)
    return Data(
        "noise",
        data.x_train,
        torch.randint(0, 3, (150,), generator=generator),
        data.x_test,
        data.y_test,
        data.x_test[:40],
        data.y_test[:40],
        classes=data.classes,
    )


@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_the_model_has_the_weights_of_its_best_epoch(engine):
    settings = config(keep="best", epochs=12, lr=0.3, engine=engine)
    net = network(sizes=(12, 32, 3))
    result = fit(net, noise(), settings)
    kept = result.summary["kept_epoch"]
    assert kept == best_epoch(result.history) < 12
    assert result.summary["val_loss"] == result.history[kept - 1]["val_loss"]
    twin = network(sizes=(12, 32, 3))
    fit(twin, noise(), settings.replace(keep="last", epochs=kept))
    assert state_equal(net, twin)


def test_it_stops_where_no_better_epoch_is_in_sight():
    result = fit(network(sizes=(12, 32, 3)), noise(), config(patience=3, epochs=500, lr=0.3))
    kept, done = result.summary["kept_epoch"], len(result.history)
    assert done == kept + 3 < 500 and not result.interrupted
    assert result.config.keep == "best"


@pytest.mark.parametrize("settings", [{}, {"patience": 4}], ids=["best", "patience"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, settings):
    settings = config(**BEST | {"epochs": 40} | settings)
    data = made_data.blobs()
    pair = data.x_train, data.y_train

    def made():
        return network(sizes=(12, 32, 3), dropout=0.2)

    whole = made()
    first = fit(whole, pair, settings, RunOptions(out=tmp_path / "whole"))
    part = fit(made(), pair, settings.replace(epochs=5), RunOptions(out=tmp_path / "part"))
    assert len(part.history) == 5
    again = made()
    options = RunOptions(resume=tmp_path / "part")
    second = fit(again, pair, settings, options)
    assert state_equal(whole, again)
    assert second.summary["kept_epoch"] == first.summary["kept_epoch"]
    names = ("train_loss", "val_loss", "val_accuracy")
    assert [[r[n] for n in names] for r in second.history] == [
        [r[n] for n in names] for r in first.history
    ]
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "part")]
    assert files[0] == files[1]
    # The checkpoint goes on from the last epoch; what is loaded is the best one.
    saved = load_checkpoint(tmp_path / "whole")
    assert saved["best"]["epoch"] == first.summary["kept_epoch"]
    (tmp_path / "whole" / "model.safetensors").unlink()
    assert state_equal(load(tmp_path / "whole").model, whole)
    if "patience" in settings.to_dict() and settings.patience:
        with pytest.raises(UsageError, match="was better, which is its --patience"):
            fit(made(), pair, settings, options)


def test_many_end_as_each_alone_and_leave_when_they_have_stopped():
    data = noise()
    x, y = torch.cat([data.x_train, data.x_val]), torch.cat([data.y_train, data.y_val])
    held = torch.arange(len(data.x_train), len(x))
    flags = [dict(patience=2), dict(keep="best"), dict(patience=5, optimizer="adamw", lr=1e-2)]
    for engine in ("auto", "autograd"):
        members, twins = [], []
        for number, settings in enumerate(flags):
            settings = config(**dict(epochs=15, lr=0.3, seed=number, engine=engine) | settings)
            rows = torch.arange(number, len(data.x_train))
            for into in (members, twins):
                into.append(Member(network(sizes=(12, 16, 3)), settings, rows, held))
        done = []
        found = fit_many(
            members, x, y, loss="cross_entropy", progress=lambda n, _, done=done: done.append(n)
        )
        for member, twin, history in zip(members, twins, found, strict=True):
            alone = fit(
                twin.model,
                Data("d", x[twin.rows], y[twin.rows], x_val=x[held], y_val=y[held],
                     classes=data.classes),
                twin.config,
            )  # fmt: skip
            assert state_equal(member.model, twin.model)
            assert [r["val_loss"] for r in history] == [r["val_loss"] for r in alone.history]
        assert len(found[0]) == best_epoch(found[0]) + 2 < 15 == len(found[1])
        assert done[-1] == 15


def test_without_rows_to_tell_it_is_refused():
    data = made_data.blobs()
    with pytest.raises(UsageError, match="--keep best needs rows held out .* give --val-split"):
        fit(network(sizes=(12, 8, 3)), data, config(keep="best"))
    with pytest.raises(UsageError, match="--keep best needs rows held out"):
        member = Member(network(sizes=(12, 8, 3)), config(patience=2), torch.arange(9))
        fit_many([member], data.x_train, data.y_train, loss="cross_entropy")
    with pytest.raises(UsageError, match="--patience belongs to --keep best"):
        TrainConfig(keep="last", patience=2).check()
    with pytest.raises(UsageError, match="--patience must be at least 1, got 0"):
        TrainConfig(patience=0).check()
    with pytest.raises(UsageError, match="member 0: held must be in"):
        member = Member(member.model, config(keep="best"), torch.arange(9), torch.tensor([999]))
        fit_many([member], data.x_train, data.y_train, loss="cross_entropy")


def test_a_fold_has_no_say_in_the_best_epoch_of_its_networks():
    data = made_data.blobs()
    settings = config(keep="best", epochs=4, val_split=0.2)
    found = crossval(settings, {"lr": [0.1, 0.3]}, data=(data.x_train, data.y_train), folds=3)
    assert found.best.config.keep == "best" and len(found.refit) == 4
    assert all(row["val_loss"] is not None for row in found.refit)
    with pytest.raises(UsageError, match="--val-split belongs to train or --keep best"):
        crossval(config(val_split=0.2), data=(data.x_train, data.y_train))


def test_the_command_says_which_epoch_was_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("--dataset", "digits", "--device", "cpu", "--hidden", 16, "--out", "r")
    assert made_data.command("train", *flags, "--patience", 2, "--lr", 0.5, "--epochs", 60) == 0
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    kept, done = summary["kept_epoch"], summary["epochs"]
    assert f"kept epoch      {kept} of {done}, the best on the rows held out; stopped after" in said
    assert made_data.command("evaluate", "r") == 0
    assert f"accuracy {summary['test_accuracy']:.4f}" in capsys.readouterr().out


def test_parts_hold_every_row_once_and_the_same_share_of_each_class():
    labels = torch.tensor([0] * 32 + [1] * 16)
    parts = parts_of(48, 8, labels)
    assert torch.cat([held for _, held in parts]).sort().values.tolist() == list(range(48))
    for kept, held in parts:
        assert torch.cat([kept, held]).sort().values.tolist() == list(range(48))
        assert torch.bincount(labels[held]).tolist() == [4, 2]


def test_a_network_whose_loss_is_lost_is_named_by_its_rate(tmp_path):
    frame = made_data.mixed_table(100)
    from fusedmlp.train import fit_table

    with pytest.raises(TrainError, match="networks is no longer finite; take a smaller --lr than"):
        fit_table(frame, TrainConfig(target="price", lr=1e30, clip_norm=0.0, optimizer="sgd"))
