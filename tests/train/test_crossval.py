"""Cross-validation: honest folds, the scores of training each network alone, clear mistakes."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedmlp import cli
from fusedmlp.train import TrainConfig, UsageError, crossval, fit
from fusedmlp.train import build as models
from fusedmlp.train import crossvalidation as cv
from fusedmlp.train.console import Quiet
from fusedmlp.train.data import datasets
from fusedmlp.train.data.types import Data, Scaling
from fusedmlp.train.engines.native_many import NativeMany
from fusedmlp.train.many import fit_many

from .. import made_data

made_data.need(*made_data.TRAIN_EXTRA, "sklearn")
from sklearn.preprocessing import StandardScaler  # noqa: E402

from fusedmlp.train.commands import split_compared  # noqa: E402

QUICK = TrainConfig(dataset="digits", device="cpu", epochs=3, batch_size=64, hidden=(16,), lr=0.5)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # of tyro
        return stop.code


def _digits():
    return datasets.load(QUICK)


def test_each_row_is_held_out_once_and_every_fold_has_each_class():
    data = _digits()
    splits, notes = cv.splits_of(data, 5)
    held = torch.cat([h for _, h in splits])
    assert torch.equal(held.sort().values, torch.arange(len(data.x_train))) and notes == []
    whole = torch.bincount(data.y_train) / 5
    for kept, held in splits:
        assert not set(kept.tolist()) & set(held.tolist())
        assert (torch.bincount(data.y_train[held]) - whole).abs().max() <= 1


def test_scores_are_those_of_training_each_network_alone():
    result = crossval(QUICK, {"hidden": [(16,), (24, 16)], "dropout": [0.0, 0.3]}, folds=3)
    assert len(result.candidates) == 4
    data = _digits()
    splits, _ = cv.splits_of(data, 3)
    for candidate in result.candidates:
        for number, (kept, held) in enumerate(splits):
            net = models.build_network(candidate.config, data)
            parts = data.x_train[kept], data.y_train[kept], data.x_train[held], data.y_train[held]
            given = replace(
                data, x_train=parts[0], y_train=parts[1], x_test=parts[2], y_test=parts[3]
            )
            last = fit(net, given, candidate.config).history[-1]
            assert candidate.val[number].error == pytest.approx(1 - last["test_accuracy"])
            assert candidate.val[number].loss == pytest.approx(last["test_loss"], rel=1e-6)
            _, accuracy = models.evaluate(net, *parts[:2], data.scaling, "cross_entropy")
            assert candidate.train[number].error == pytest.approx(1 - accuracy)


def test_the_best_is_refit_on_all_rows_and_tested():
    result = crossval(QUICK, {"lr": [1e-4, 0.5]}, folds=3)
    assert result.best.settings == {"lr": 0.5}
    assert result.best.mean("val") < result.candidates[0].mean("val")
    data = _digits()
    net = models.build_network(result.best.config, data)
    last = fit(net, data, result.best.config).history[-1]
    assert result.test.error == pytest.approx(1 - last["test_accuracy"])
    for a, b in zip(net.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "test_loss" not in result.refit[-1] or result.refit[-1]["test_loss"] is None


def test_folds_are_scaled_by_their_own_training_rows(monkeypatch):
    """A held-out row that is far off must have no part in the scaling it is evaluated with."""
    seen = []

    def spy(members, x, y, **settings):
        seen.append((members, x, y, settings["scaling"]))
        return fit_many(members, x, y, **settings)

    monkeypatch.setattr(cv, "fit_many", spy)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator)
    y = 100 + 10 * x.sum(1)
    given = 1.7e9 + 100 * x.double()  # fp32 has 128 between two of its numbers there
    config = TrainConfig(standardize=True, epochs=30, lr=0.1, batch_size=16, hidden=(8,))
    result = crossval(config, {"weight_decay": [0.0, 0.1]}, folds=3, data=(given, y))
    assert len(seen) == 3  # a call for each fold, both candidates in it
    for members, inputs, targets, scaling in seen:
        rows = members[0].rows
        assert len(members) == 2 and torch.equal(rows, members[1].rows)
        wanted = StandardScaler().fit(given[rows].numpy()).transform(given.numpy())
        assert torch.allclose(scaling(inputs).double(), torch.from_numpy(wanted), atol=1e-6)
        assert float(targets[rows].mean()) == pytest.approx(0, abs=1e-5)
    # In the target's own units: its variance is about 300.
    assert 0 < result.best.mean("val") < 300
    assert result.test is None


@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("standardize", [False, True])
def test_errors_of_a_regression_are_in_its_own_units(targets, standardize, monkeypatch):
    """Both in one call, and network by network, which two scaled targets need."""
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    y = torch.stack([100 + 10 * x.sum(1), x[:, 0]], 1)[:, :targets]
    config = TrainConfig(standardize=standardize, epochs=3, lr=1e-3, batch_size=16, hidden=(8,))
    compared = {"weight_decay": [0.0, 0.1]}
    here = crossval(config, compared, folds=2, data=(x, y))
    monkeypatch.setattr(cv.native_evaluate, "evaluate", lambda *a, **k: None)
    there = crossval(config, compared, folds=2, data=(x, y))
    for a, b in zip(here.candidates, there.candidates, strict=True):
        for one, other in zip([*a.train, *a.val], [*b.train, *b.val], strict=True):
            assert one.error == pytest.approx(other.error, rel=1e-5)
            assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_all_candidates_share_calls_and_progress_counts_each_epoch(monkeypatch):
    calls, call = [], NativeMany._call
    monkeypatch.setattr(
        NativeMany, "_call", lambda self, shares: (calls.append(len(shares)), call(self, shares))[1]
    )
    told = []

    class Progress(Quiet):
        def start(self, *parts):
            pass

        def trained(self, done, total):
            told.append((done, total))

    compared = {"hidden": [(8,), (4, 4)], "activation": ["relu", "gelu"], "epochs": [2, 3]}
    crossval(QUICK, compared, folds=2, progress=Progress())
    assert calls[0] == 16 and set(calls) <= {16, 8}  # 8 have done their 2 epochs
    assert told == [(16, 40), (32, 40), (40, 40)]


def test_ctrl_c_leaves_no_folder_behind(monkeypatch, capsys):
    """It is seen between two calls; the progress that is told after each stands for it here."""

    def interrupted(*numbers):
        raise KeyboardInterrupt

    monkeypatch.setattr(cv, "_tell", interrupted)
    code = run("crossval", "--dataset", "digits", "--epochs", 2, "--folds", 2, "--out", "found")
    assert code == 130 and "Traceback" not in capsys.readouterr().err
    assert not Path("found").exists()


def test_regression_keeps_units_and_classes_may_be_rare():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    plain = crossval(TrainConfig(epochs=1, hidden=(4,)), {}, folds=2, data=(x, x[:, :2]))
    assert plain.best.label == "as set" and plain.best.deviation("val") >= 0
    y = torch.tensor([0, 1] * 19 + [2, 2])
    data = Data("rare", x, y, classes=("a", "b", "c"), scaling=Scaling())
    _, notes = cv.splits_of(data, 5)
    assert notes == ["class c has only 2 rows, so not every fold has one"]


def test_a_candidate_that_diverges_is_not_chosen():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(2))
    config = TrainConfig(epochs=4, hidden=(8,), init="default", batch_size=16)
    result = crossval(config, {"lr": [1e6, 0.01]}, folds=2, data=(x, 10 * x.sum(1)))
    lost, good = result.candidates
    assert result.best is good and math.isnan(lost.mean("val"))
    with pytest.raises(RuntimeError, match="every candidate diverged"):
        crossval(config, {"lr": [1e6, 1e7]}, folds=2, data=(x, 10 * x.sum(1)))


def test_the_command_compares_and_leaves_a_folder_that_evaluates(capsys):
    code = run(
        "crossval", "--dataset", "digits", "--folds", 3, "--hidden", 16, "/", 24, 16,
        "--lr", 0.1, 0.5, "--epochs", 2, "--device", "cpu", "--out", "found",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0 and "4 candidates: 12 networks" in said and "24 16" in said
    names = {"config.json", "results.csv", "summary.json", "crossval.png", "model.safetensors"}
    assert names <= {path.name for path in Path("found").iterdir()}
    summary = json.loads(Path("found/summary.json").read_text())
    rows = list(csv.DictReader(Path("found/results.csv").read_text().splitlines()))
    assert len(rows) == 12 and {row["hidden"] for row in rows} == {"16", "24 16"}
    best = [row for row in rows if row["candidate"] == str(summary["best"]["candidate"])]
    mean = sum(float(row["val_error"]) for row in best) / 3
    assert summary["best"]["val_error_mean"] == pytest.approx(mean)
    least = min(c["val_error_mean"] for c in summary["candidates"])
    assert summary["best"]["val_error_mean"] == least
    assert Path("found/crossval.png").read_bytes().startswith(b"\x89PNG")
    assert run("evaluate", "found") == 0
    assert f"accuracy {1 - summary['test_error']:.4f}" in capsys.readouterr().out
    again = ("crossval", "--dataset", "digits", "--epochs", 1, "--folds", 2, "--out", "found")
    assert run(*again) == 1 and "already holds a run" in capsys.readouterr().err
    assert run(*again, "--overwrite") == 0


def test_two_hidden_layers_are_learned_with_the_defaults():
    """Weights of deviation 0.01, which one layer begins with, left 20 % wrong here."""
    result = crossval(TrainConfig(dataset="digits", device="cpu"), {"hidden": [(128, 64)]}, folds=3)
    assert result.best.mean("val") < 0.07 and result.best.config.init == "default"


def test_two_runs_give_the_same_bits():
    one, two = (crossval(QUICK, {"dropout": [0.0, 0.5]}, folds=2) for _ in range(2))
    assert [c.val for c in one.candidates] == [c.val for c in two.candidates]


def test_words_become_values():
    words = "--hidden 64 / 128 64 --lr 0.1 0.5 --dropout=0.1 / 0.2 --seed 3"
    rest, found = split_compared(words.split())
    assert rest == ["--seed", "3"]
    assert found == {
        "hidden": [["64"], ["128", "64"]],
        "lr": [["0.1"], ["0.5"]],
        "dropout": [["0.1"], ["0.2"]],
    }
    assert split_compared(["--hidden", "256", "256", "--debug"])[1] == {}  # as train takes it
    made = cv.candidate_configs(TrainConfig(), {"hidden": [64, [128, 64]], "lr": [0.1, 0.5]})
    assert [(c.hidden, c.lr) for c in made][1:3] == [((64,), 0.5), ((128, 64), 0.1)]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--folds 1", "--folds must be at least 2"),
        ("--folds 1000", "--folds must be at most"),
        ("--lr 0.1 0.1", "0.1 is twice in --lr"),
        ("--hidden 64 / 64", "takes one network's layers between two slashes"),
        ("--dataset digits / mnist", "--dataset is the same for all candidates"),
        ("--lr 0.1 / 0.2 --lr 0.3 / 0.4", "--lr is given twice"),
        ("--val-split 0.2", "--val-split belongs to train"),
        ("--resume runs/0001", "--resume belongs to train"),
        ("--momentum 0 / 0.9 --optimizer adamw", "--momentum belongs to --optimizer sgd"),
        ("--hidden 8 / 8 8 --dropout 0.1 0.2", "--dropout must be one number or one for each"),
        ("--lr -1 / 0.1", "--lr must be a number above 0"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(flags, said, capsys):
    assert run("crossval", "--dataset", "digits", "--epochs", 1, *flags.split()) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


def test_settings_that_python_may_get_wrong():
    for compared in ({"dataset": ["a"]}, {"width": [1]}, {"lr": []}, {"lr": 0.1}):
        with pytest.raises(UsageError, match="crossval: "):
            crossval(QUICK, compared)
    with pytest.raises(TypeError, match="in memory"):
        crossval(QUICK, data=iter([]))
