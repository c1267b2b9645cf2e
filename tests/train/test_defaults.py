"""Defaults that come from the data, and what a run on a table says in its target's own units."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
import torch

from fusedmlp import cli
from fusedmlp.train import RunOptions, TrainConfig, TrainError, UsageError, build, fit
from fusedmlp.train.data import datasets, defaults, inputs, types

from .. import made_data
from .test_train import network

made_data.need(*made_data.TRAIN_EXTRA, "sklearn", "pandas")
import numpy as np  # noqa: E402
from sklearn import datasets as sets  # noqa: E402
from sklearn import metrics  # noqa: E402


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # of tyro
        return stop.code


def table(rows: int = 400, **changes) -> types.Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    y = x.sum(1, keepdim=True)
    return types.Data("table.csv", x, y, is_table=True, **changes)


def settings_of(given, **settings) -> dict:
    found = defaults.resolved(TrainConfig(**settings), given).to_dict()
    names = ("init", "init_std", "optimizer", "lr", "standardize", "epochs", "batch_size")
    return {name: found[name] for name in names}


COURSE = {
    "init": "normal",
    "init_std": 0.01,
    "optimizer": "sgd",
    "lr": 0.1,
    "standardize": False,
    "epochs": 10,
    "batch_size": 256,
}
PLAIN = ("--preset", "plain", "--device", "cpu")
OF_TABLES = {
    "init": "default",
    "init_std": None,
    "optimizer": "adam",
    "lr": 1e-3,
    "standardize": True,
    "epochs": 50,
    "batch_size": 16,
}


def test_image_sets_keep_the_courses_settings():
    assert settings_of(made_data.pictures()) == COURSE
    digits = settings_of(datasets.read(TrainConfig(dataset="digits")))
    assert digits == COURSE | {"epochs": 30, "batch_size": 32}


@pytest.mark.parametrize(
    "hidden, init",
    [((), "normal"), ((64,), "normal"), ((256, 256), "normal"), ((128, 64), "default"),
     ((256, 256, 256), "default")],
)  # fmt: skip
def test_several_hidden_layers_take_pytorchs_weights_but_for_the_courses(hidden, init):
    assert settings_of(made_data.pictures(), hidden=hidden)["init"] == init
    assert settings_of(table(), hidden=hidden)["init"] == "default"


@pytest.mark.parametrize(
    "rows, batch, epochs",
    [(20, 16, 50), (400, 16, 50), (1_900, 32, 50), (9_999, 256, 50), (10_000, 256, 30),
     (10**6, 256, 30)],
)  # fmt: skip
def test_tables_are_scaled_and_small_ones_take_small_steps(rows, batch, epochs):
    x = torch.empty(1, 3).expand(rows, 3)  # in no more memory than a row
    given = types.Data("t", x, torch.empty(1, 1).expand(rows, 1), is_table=True)
    assert settings_of(given) == OF_TABLES | {"batch_size": batch, "epochs": epochs}


def test_tensors_and_loaders_of_the_caller_are_taken_as_they_are():
    x = torch.randn(20, 3)
    for y, lr in ((torch.arange(20) % 2, 0.1), (x.sum(1), 0.01)):
        assert settings_of(inputs.as_data((x, y), TrainConfig())) == COURSE | {"lr": lr}
    assert settings_of(inputs.Loaders([]))["optimizer"] == "sgd"


FLAGS = {
    "init": dict(init="normal"),
    "init_std": dict(init_std=0.02),
    "optimizer": dict(optimizer="sgd", momentum=0.9),
    "lr": dict(lr=0.5),
    "standardize": dict(standardize=False),
    "epochs": dict(epochs=3),
    "batch_size": dict(batch_size=5),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_setting_that_is_given_decides(name):
    for given in (table(), made_data.pictures()):
        found = defaults.resolved(TrainConfig(**FLAGS[name]), given)
        for setting, value in FLAGS[name].items():
            assert getattr(found, setting) == value
    assert settings_of(table(), init_std=0.02)["init"] == "normal"
    assert settings_of(table(), optimizer="sgd")["lr"] == 0.01


def test_what_a_default_contradicts_is_said():
    with pytest.raises(UsageError, match="--momentum belongs to .*table.csv the default is adam"):
        settings_of(table(), momentum=0.9)
    with pytest.raises(UsageError, match="--warmup-epochs must be at most --epochs, 10"):
        settings_of(made_data.pictures(), warmup_epochs=11.0)


def _stamped(path) -> str:
    """A regression on seconds since 1970, and prices with an offset."""
    generator = np.random.default_rng(0)
    lines = []
    for second in range(600):
        noise = generator.normal()
        price = 250_000 + 40 * second + 3_000 * np.sin(second / 40) + 200 * noise
        lines.append(f"{1_700_000_000 + second},{generator.normal():.6f},{price:.2f}")
    path.write_text("time,noise,price\n" + "\n".join(lines) + "\n")
    return str(path)


def test_a_table_is_learned_and_reported_in_its_own_units(tmp_path, capsys):
    assert run("train", "--dataset", _stamped(tmp_path / "P.CSV"), *PLAIN) == 0
    said = capsys.readouterr().out
    assert "note: losses are in units of the variance of price" in said
    assert "optimizer=adam" in said and "standardize=True" in said and "init=default" in said
    summary = json.loads((tmp_path / "runs" / "0001" / "summary.json").read_text())
    config = json.loads((tmp_path / "runs" / "0001" / "config.json").read_text())
    assert {name: config[name] for name in OF_TABLES} == OF_TABLES
    assert summary["optimizer"] == "adam" and summary["standardize"] is True
    assert run("predict", "runs/0001", "--rows", "0") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    true, predicted = ([float(row[name]) for row in rows] for name in ("true", "predicted"))
    assert all(round(value, 2) == value for value in true) and len(true) == 120
    r2 = metrics.r2_score(true, predicted)
    rmse = metrics.root_mean_squared_error(true, predicted)
    assert r2 > 0.95
    assert summary["test_r2"] == pytest.approx(r2, abs=1e-6)
    assert summary["test_rmse"] == pytest.approx(rmse, rel=1e-4)
    assert re.search(rf"test r2 +{r2:.4f}\n.*test rmse +{summary['test_rmse']:.6g}\n", said)
    assert run("evaluate", "runs/0001") == 0
    found = capsys.readouterr().out
    assert f"RMSE {summary['test_rmse']:.6g}, R2 {r2:.4f}" in found
    assert f"120 test rows, loss {summary['test_loss']:.6g}," in found


def test_a_cross_validation_of_a_table_takes_its_defaults(tmp_path, capsys):
    file = _stamped(tmp_path / "a.csv")
    flags = ("--hidden", 8, "/", 16, "--folds", 2, "--epochs", 20, "--out", "found")
    assert run("crossval", "--dataset", file, *PLAIN, *flags) == 0
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "found" / "summary.json").read_text())
    config = json.loads((tmp_path / "found" / "config.json").read_text())
    assert {name: config[name] for name in OF_TABLES} == OF_TABLES | {"epochs": 20}
    assert run("predict", "found", "--rows", "0") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    true, predicted = ([float(row[name]) for row in rows] for name in ("true", "predicted"))
    assert summary["test_r2"] == pytest.approx(metrics.r2_score(true, predicted), abs=1e-6)
    assert summary["test_r2"] > 0.9 and f"R2 {summary['test_r2']:.4f}" in said
    mean = metrics.mean_squared_error(true, predicted)
    assert summary["test_error"] == pytest.approx(mean, rel=1e-4)


def test_a_table_run_goes_on_with_its_settings(tmp_path, capsys):
    file = _stamped(tmp_path / "a.csv")
    common = ("--dataset", file, *PLAIN)
    assert run("train", *common, "--epochs", 4, "--out", "whole") == 0
    assert run("train", *common, "--epochs", 2, "--out", "part") == 0
    assert run("train", "--resume", "part", "--epochs", 4) == 0
    whole, part = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "part")
    )
    assert part["test_loss"] == whole["test_loss"] and part["epochs"] == 4
    capsys.readouterr()
    assert run("train", "--resume", "part", "--epochs", 5, "--no-standardize") == 2
    assert "--standardize must stay True as in the run, got False" in capsys.readouterr().err


def test_a_run_on_scaled_tensors_goes_on_scaled(tmp_path):
    """The continuation names no setting: all are those of the run."""
    given = table()
    parts = given.x_train, given.y_train
    first = TrainConfig(epochs=2, batch_size=32, device="cpu", standardize=True)
    fit(network(sizes=(3, 8, 1)), parts, first, RunOptions(out=tmp_path / "run"))
    options = RunOptions(resume=tmp_path / "run")
    found = fit(network(sizes=(3, 8, 1)), parts, TrainConfig(epochs=4), options)
    whole = fit(network(sizes=(3, 8, 1)), parts, first.replace(epochs=4))
    assert found.config.standardize and found.history[-1]["train_loss"] == pytest.approx(
        whole.history[-1]["train_loss"]
    )


def test_both_ways_to_say_standardize_are_flags():
    from fusedmlp.train import commands

    for words, wanted in (
        ((), None),
        (("--standardize",), True),
        (("--no-standardize",), False),
        (("--standardize", "--seed", "3"), True),
        (("--standardize", "False"), False),
    ):
        assert commands.parse_train([*words])[0].standardize is wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_time_stamps_as_tensors_are_learned_when_standardized(dtype):
    x = (1_700_000_000 + torch.arange(160)).reshape(-1, 1).to(dtype)
    y = ((x - x[0]) // 40).flatten().long()
    config = TrainConfig(
        epochs=200, batch_size=16, optimizer="adam", lr=0.01, device="cpu", standardize=True
    )
    result = fit(network(sizes=(1, 32, 4)), (x, y), config)
    assert result.summary["engine"] == "native"
    assert result.history[-1]["train_accuracy"] > 0.9


def test_an_npz_of_floats_is_a_table_and_pictures_are_not(tmp_path):
    x = 1.7e9 + np.arange(60.0).reshape(20, 3)
    np.savez("t.npz", x_train=x, y_train=np.arange(20) / 7)
    np.savez("p.npz", x_train=np.random.rand(20, 4, 4), y_train=np.arange(20) % 2)
    np.savez("b.npz", x_train=x.astype(np.uint8), y_train=np.arange(20) % 2)
    for file, is_table in (("t.npz", True), ("p.npz", False), ("b.npz", False)):
        config = TrainConfig(dataset=file)
        assert defaults.resolved(config, datasets.read(config)).standardize is is_table
    found = datasets.load(TrainConfig(dataset="t.npz"))
    assert len(found.x_train[:, 0].unique()) == len(found.x_train)


def test_the_error_of_a_diverging_run_names_what_is_left_to_try():
    given = table()
    parts = given.x_train, 1e9 * given.y_train
    config = TrainConfig(epochs=5, lr=1e30, device="cpu")
    with pytest.raises(TrainError, match="smaller --lr than 1e.30, or --standardize$"):
        fit(network(sizes=(3, 8, 1)), parts, config)
    with pytest.raises(TrainError, match="smaller --lr than 1e.30$"):
        fit(network(sizes=(3, 8, 1)), parts, config.replace(standardize=True))


@pytest.mark.parametrize("targets", [1, 3])
def test_r2_and_rmse_are_scikit_learns(targets):
    generator = torch.Generator().manual_seed(0)
    y = 1e6 + 300 * torch.randn(50, targets, generator=generator, dtype=torch.float64)
    made = types.prepared(types.Data("t", y, y, y, y), True)
    outputs = made.y_test + 0.3 * torch.randn(50, targets, generator=generator)
    found = build.regression(outputs, made)
    predicted = made.target_scaling.undo(outputs)
    assert found["test_r2"] == pytest.approx(metrics.r2_score(y, predicted), abs=1e-6)
    mean = metrics.mean_squared_error(y, predicted)
    assert found["test_rmse"] == pytest.approx(mean**0.5, rel=1e-6)


ORDINARY = {
    "iris": (sets.load_iris, True, 0.85),
    "wine": (sets.load_wine, True, 0.9),
    "breast_cancer": (sets.load_breast_cancer, True, 0.93),
    "diabetes": (sets.load_diabetes, False, 0.1),
    "friedman": (
        lambda return_X_y: sets.make_friedman1(2000, random_state=0),
        False,
        0.95,
    ),
    "large_numbers": (
        lambda return_X_y: sets.make_regression(
            3000, 8, bias=1e8, coef=False, noise=1.0, random_state=0
        ),
        False,
        0.99,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_tables_are_learned_with_the_defaults(name, tmp_path):
    make, is_classes, wanted = ORDINARY[name]
    x, y = make(return_X_y=True)
    names = ",".join(f"c{i}" for i in range(x.shape[1])) + ",y"
    cells = np.column_stack([1e6 * x, y.astype(float)])
    formats = ["%.9g"] * x.shape[1] + ["%d" if is_classes else "%.3f"]
    np.savetxt("t.csv", cells, formats, delimiter=",", header=names, comments="")
    assert run("train", "--dataset", "t.csv", "--device", "cpu") == 0
    summary = json.loads((tmp_path / "runs" / "0001" / "summary.json").read_text())
    assert summary["test_accuracy" if is_classes else "test_r2"] >= wanted, summary
