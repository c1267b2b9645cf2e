"""Presets of tables, ensembles and their run folders."""

from __future__ import annotations

import json

import pytest
import torch

from fusedmlp.train import (
    TrainConfig,
    TrainError,
    UsageError,
    fit_table,
    inference,
    load,
    load_data,
)
from fusedmlp.train.data import defaults
from fusedmlp.train.data.types import Data

from .. import made_data

made_data.need(*made_data.TRAIN_EXTRA, "pandas", "sklearn")
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

command, frame = made_data.command, made_data.mixed_table
SMALL = ("--hidden", 16, "--epochs", 12, "--device", "cpu")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with t.csv and ensembles for classes and for numbers."""
    folder = tmp_path_factory.mktemp("runs")
    frame().to_csv(folder / "t.csv", index=False)
    for target, other in (("kind", "price"), ("price", "kind")):
        flags = ("--dataset", folder / "t.csv", "--target", target, "--leave-out", other, "weight")
        assert command("train", *flags, *SMALL, "--networks", 3, "--out", folder / target) == 0
    return folder


def settings(preset=None, rows: int = 400, several: bool = True, **given) -> TrainConfig:
    data = load_data(TrainConfig(target="kind", preset="plain", val_split=0.0), frame(50))
    x = torch.empty(1, data.in_features).expand(rows, data.in_features)
    y = torch.empty(1, dtype=torch.int64).expand(rows)
    data = Data("t.csv", x, y, classes=("a", "b"), is_table=True, schema=object())
    return defaults.resolved(TrainConfig(preset=preset, **given), data, several)


def test_small_tables_take_the_ensemble_larger_ones_one_network():
    assert settings().preset == "ensemble" and settings().networks == 8
    assert settings().val_split == 0.0 and settings().keep == "best"
    assert settings(rows=20_001).preset == "table" and settings(several=False).preset == "table"
    one = settings(rows=20_001)
    assert one.networks == 1 and one.keep == "best" and one.val_split == defaults.HELD_OUT
    assert one.optimizer == "adamw" and one.lr_schedule == "cosine" and one.label_smoothing == 0.1
    plain = settings("plain")
    assert plain.optimizer == "adam" and plain.keep == "last" and plain.networks == 1
    # What is resolved once stays so.
    for found in (one, plain):
        assert defaults.resolved(found, Data("t", torch.zeros(9, 2), torch.zeros(9, 1))) == found


GIVEN = dict(hidden=(8,), dropout=(0.3,), lr=0.3, weight_decay=0.5, lr_schedule="linear")
GIVEN |= dict(label_smoothing=0.0, clip_norm=0.0, warmup_epochs=0.0, epochs=3, batch_size=32)
GIVEN |= dict(keep="last", standardize=False, networks=2)


@pytest.mark.parametrize("name", GIVEN)
def test_each_flag_decides_over_the_preset(name):
    found = settings(**{name: GIVEN[name]})
    assert getattr(found, name) == GIVEN[name] and found.preset == "ensemble"


def test_another_update_rule_has_rates_of_its_own():
    assert settings(optimizer="sgd").lr == 0.1 and settings(optimizer="sgd").weight_decay == 0.0
    assert settings(epochs=1).warmup_epochs <= 1
    assert settings("table", rows=7).keep == "last" and settings("table", rows=8).keep == "best"
    with pytest.raises(UsageError, match="--momentum belongs to .* the default is adamw"):
        settings(momentum=0.9)


def test_the_command_says_which_preset_and_why(runs, capsys):
    flags = ("--dataset", runs / "t.csv", "--target", "kind", *SMALL, "--networks", 2)
    assert command("train", *flags, "--out", "r") == 0
    said = capsys.readouterr().out
    assert "note: preset ensemble (2 networks): t.csv is a table of 320 training rows, at" in said
    assert "2 networks of " in said and "of 12, each the best on the rows held out" in said
    assert command("train", *flags[:-2], "--preset", "table", "--out", "one") == 0
    said = capsys.readouterr().out
    assert "preset ensemble" not in said and "preset=table" in said and "kept epoch" in said


def test_a_folder_of_an_ensemble_predicts_the_mean_of_its_networks(runs, capsys):
    new = frame(60, seed=1)
    for name in ("kind", "price"):
        trained = load(runs / name)
        data = inference.test_data(trained)
        found = inference.evaluate(trained, data)
        summary = json.loads((runs / name / "summary.json").read_text())
        assert found["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
        assert summary["networks"] == 3 and len(summary["kept_epoch"]) == 3
        rows = trained.preparation(data.x_test, data.schema.columns)
        each = torch.stack([network(rows).detach() for network in trained.model.networks])
        mean = each.mean(0) if name == "price" else each.softmax(-1).mean(0).log()
        assert torch.allclose(trained.outputs(data.x_test, data.schema.columns), mean, atol=1e-5)
        assert not torch.equal(each[0], each[1])
    found = load(runs / "kind").predict(new, proba=True)
    np.testing.assert_allclose(found.iloc[:, 1:].sum(axis=1), 1, atol=1e-6)
    assert command("evaluate", runs / "price") == 0
    assert f"R2 {summary['test_r2']:.4f}" in capsys.readouterr().out
    lines = (runs / "kind" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 13 and (runs / "kind" / "curves.png").exists()


def test_the_same_seed_gives_the_same_ensemble_for_any_number_of_threads(runs):
    files, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        flags = ("--dataset", runs / "t.csv", "--target", "kind", "--leave-out", "price", "weight")
        assert command("train", *flags, *SMALL, "--networks", 3, "--out", f"r{threads}") == 0
        files.append((runs / "x").parent.joinpath("kind", "model.safetensors").read_bytes())
        files.append(open(f"r{threads}/model.safetensors", "rb").read())
    torch.set_num_threads(before)
    assert len(set(files)) == 1


def test_a_frame_becomes_a_network_without_a_folder():
    new = frame(200)
    config = TrainConfig(target="kind", leave_out=("price", "weight"), epochs=15, hidden=(16,))
    for networks in (1, 2):
        trained = fit_table(new, config.replace(networks=networks))
        found = trained.predict(new, proba=True)
        assert (found["prediction"] == new["kind"]).mean() > 0.7
        assert list(found) == ["prediction", "probability_cheap", "probability_dear"]
        assert trained.config.networks == networks and trained.config.keep == "best"
    weighed = fit_table(new, config.replace(networks=2, epochs=2), weights=torch.ones(200))
    assert len(weighed.predict(new)) == 200
    with pytest.raises(TrainError, match="weights must be"):
        fit_table(new, config.replace(networks=1), weights=torch.ones(3))


def test_what_an_ensemble_cannot_be_is_said(runs, capsys):
    flags = ("--dataset", runs / "t.csv", "--target", "kind", *SMALL)
    assert command("train", *flags, "--preset", "ensemble", "--val-split", 0.1) == 2
    assert "--val-split belongs to one network" in capsys.readouterr().err
    assert command("crossval", *flags, "--preset", "ensemble") == 2
    assert "--preset ensemble belongs to a new run of fusedmlp train" in capsys.readouterr().err
    assert command("train", *flags, "--networks", 0) == 2
    assert "--networks must be at least 1, got 0" in capsys.readouterr().err
    pd.DataFrame({"a": [1.0, 2.0], "y": [1.5, 2.5]}).to_csv("two.csv", index=False)
    assert command("train", "--dataset", "two.csv", "--networks", 2, "--out", "t") == 1
    assert not (runs / "t" / "config.json").exists()
