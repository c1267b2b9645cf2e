"""Checkpoints and run folders: exact resume, atomic writes, nothing overwritten or half-done."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fusedmlp.train import (
    RunOptions,
    TrainConfig,
    TrainError,
    UsageError,
    fit,
    run_folder,
)
from fusedmlp.train.run_state import Position

from .. import made_data
from .test_train import network, state_equal

made_data.need("safetensors", "matplotlib")


def config(**settings) -> TrainConfig:
    return TrainConfig(**{"epochs": 4, "batch_size": 4, "device": "cpu", "lr": 0.1} | settings)


def stop_in(net: nn.Module, forward: int) -> nn.Module:
    """Ctrl-C in that forward pass of training."""
    count = [0]

    def hook(module, inputs):
        count[0] += module.training
        if count[0] == forward and module.training:
            signal.raise_signal(signal.SIGINT)

    net.register_forward_pre_hook(hook)
    return net


KINDS = {
    "sgd": dict(),
    "momentum": dict(momentum=0.9, weight_decay=1e-3),
    "adamw": dict(optimizer="adamw", lr=1e-2, weight_decay=0.1),
    "adam": dict(optimizer="adam", lr=1e-2, weight_decay=0.1),
    "bf16": dict(precision="bf16"),
    "fp16": dict(precision="fp16"),
    "validation": dict(val_split=0.2, standardize=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, kind):
    """Stopped in the middle of an epoch, with dropout; the history is the same as well."""
    # The hook that stops it is refused by other engines, which sum in another order.
    settings, data = config(engine="autograd", **KINDS[kind]), made_data.blobs()
    tensors = (data.x_train, data.y_train, data.x_test, data.y_test)
    whole = fit(network(dropout=0.3), tensors, settings)
    net = stop_in(network(dropout=0.3), 60)
    first = fit(net, tensors, settings, RunOptions(out=tmp_path / "run"))
    assert first.interrupted and first.history != whole.history
    held = run_folder.load_checkpoint(tmp_path / "run")["position"]
    assert held["step"] > 0 and "summary.json" not in first.paths
    second = fit(network(9, dropout=0.3), tensors, settings, RunOptions(resume=tmp_path / "run"))
    assert state_equal(second.model, whole.model)
    for ours, theirs in zip(second.history, whole.history, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert "summary.json" in second.paths


@pytest.mark.parametrize("source", ["tensors", "loader"])
def test_a_model_that_draws_from_torchs_generator_goes_on_exactly(tmp_path, source):
    data = made_data.blobs()

    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))

    def rows():
        tensors = (data.x_train, data.y_train)
        return tensors if source == "tensors" else _loader(tensors)

    whole = fit(net(0), rows(), config())
    first = fit(stop_in(net(0), 60), rows(), config(), RunOptions(out=tmp_path / "run"))
    assert first.interrupted
    second = fit(net(1), rows(), config(), RunOptions(resume=tmp_path / "run"))
    assert state_equal(second.model, whole.model)


def _loader(tensors) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size=4, shuffle=True)


def test_more_epochs_go_on_from_a_finished_run(tmp_path):
    data = made_data.blobs()
    whole = fit(network(dropout=0.3), data, config(epochs=5))
    fit(network(dropout=0.3), data, config(epochs=2), RunOptions(out=str(tmp_path / "run")))
    longer = fit(
        network(dropout=0.3), data, config(epochs=5), RunOptions(resume=str(tmp_path / "run"))
    )
    assert state_equal(longer.model, whole.model)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 5
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 6
    with pytest.raises(UsageError, match="has done its 5 epochs; --epochs above 5"):
        fit(network(), data, config(epochs=5), RunOptions(resume=tmp_path / "run"))


def test_a_run_cut_off_before_its_pictures_gets_them_on_resume(tmp_path):
    data = made_data.blobs()
    fit(network(), data, config(epochs=1), RunOptions(out=tmp_path / "run"))
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "curves.png").unlink()
    again = fit(network(), data, config(epochs=1), RunOptions(resume=tmp_path / "run"))
    assert {"summary.json", "curves.png"} <= again.paths.keys() and len(again.history) == 1


def test_a_resumed_run_must_be_the_same_run(tmp_path):
    data = made_data.blobs()
    run = tmp_path / "run"
    fit(network(), data, config(epochs=1), RunOptions(out=run))
    with pytest.raises(UsageError, match="--lr must stay 0.1 as in the run, got 0.2"):
        fit(network(), data, config(lr=0.2), RunOptions(resume=run))
    with pytest.raises(TrainError, match="belongs to another model: 0"):
        fit(network(sizes=(12, 17, 3)), data, config(), RunOptions(resume=run))
    with pytest.raises(TrainError, match="data must be those of the run"):
        fit(network(), made_data.blobs(seed=5), config(), RunOptions(resume=run))


def test_a_run_folder_holds_what_it_should(tmp_path):
    data = made_data.pictures()
    net = network(sizes=(64, 16, 4), dropout=0.1)
    result = fit(net, data, config(epochs=3), RunOptions(out=tmp_path / "run"))
    assert result.paths.keys() == set(run_folder.FILES) - {
        *("residuals.png", "roc.png", "reliability.png", "importance.csv", "importance.png"),
        *("results.csv", "crossval.png"),
    }
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert tuple(rows[0]) == run_folder.METRICS and rows[0]["val_loss"] == ""
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    wanted = (
        "dataset, dims, activation, dropout, epochs, seed, test_accuracy, test_loss, train_loss, "
        "train_seconds, samples_per_second, backend, engine, device, torch"
    )
    assert set(wanted.split(", ")) <= summary.keys()
    assert summary["dims"] == [64, 16, 4] and summary["dropout"] == [0.1]
    assert summary["test_accuracy"] == result.history[-1]["test_accuracy"]
    for name in ("curves", "predictions", "confusion"):
        assert (tmp_path / "run" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_model_file_loads_into_a_plain_sequential(tmp_path):
    from safetensors.torch import load_file

    data = made_data.blobs()
    result = fit(network(dropout=0.3), data, config(epochs=1), RunOptions(out=tmp_path / "run"))
    plain = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    plain.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    assert state_equal(plain, result.model)
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    plain.load_state_dict(content["model"])
    assert Position(**content["position"]).epoch == 1


def test_shared_weights_can_be_saved(tmp_path):
    linear = nn.Linear(12, 12)
    net = nn.Sequential(linear, nn.ReLU(), linear, nn.Linear(12, 3))
    assert (
        "model.safetensors"
        in fit(net, made_data.blobs(), config(), RunOptions(out=tmp_path / "r")).paths
    )


@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_tables_have_pictures_of_their_own(tmp_path, kind):
    data = made_data.blobs() if kind == "classes" else made_data.line()
    sizes = (12, 8, 3) if kind == "classes" else (3, 8, 1)
    result = fit(
        network(sizes=sizes), data, config(epochs=1, lr=0.01), RunOptions(out=tmp_path / "run")
    )
    last = {"confusion.png"} if kind == "classes" else {"residuals.png"}
    assert {"curves.png", "predictions.png"} | last <= result.paths.keys()


# run folders


def test_an_existing_run_is_only_replaced_when_asked(tmp_path):
    run, data = tmp_path / "run", made_data.blobs()
    fit(network(), data, config(epochs=1), RunOptions(out=run))
    before = (run / "checkpoint.pt").read_bytes()
    with pytest.raises(TrainError, match="already holds a run .*--overwrite.*--resume"):
        fit(network(), data, config(epochs=1), RunOptions(out=run))
    assert (run / "checkpoint.pt").read_bytes() == before
    (run / "notes.txt").write_text("mine")
    fit(network(1), data, config(epochs=1), RunOptions(out=run, overwrite=True))
    assert (run / "checkpoint.pt").read_bytes() != before
    assert (run / "notes.txt").read_text() == "mine"


def test_a_folder_of_other_things_is_not_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrainError, match="holds other files"):
        fit(network(), made_data.blobs(), config(), RunOptions(out=tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainError, match="is a file"):
        fit(network(), made_data.blobs(), config(), RunOptions(out=tmp_path / "file"))
    with pytest.raises(TrainError, match="cannot write to .*file.* name another folder"):
        fit(network(), made_data.blobs(), config(), RunOptions(out=tmp_path / "file" / "below"))


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "NUMBERED_RUNS", tmp_path / "runs")
    found, barrier = [], threading.Barrier(8)

    def start():
        barrier.wait()
        found.append(run_folder.create_folder(RunOptions(), TrainConfig()).path.name)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [f"{i:04d}" for i in range(1, 9)]


def test_options_without_a_folder_take_the_next_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fit(network(), made_data.blobs(), config(epochs=1), RunOptions())
    assert result.folder == Path("runs/0001")
    held = json.loads((result.folder / "config.json").read_text())
    kept = RunOptions(out=result.folder).to_dict()
    assert {name: held[name] for name in kept} == kept
    assert TrainConfig.from_dict(held) == result.config
    assert fit(network(), made_data.blobs(), config(epochs=1)).folder is None


def test_two_runs_cannot_take_one_named_folder(tmp_path):
    (tmp_path / "run").mkdir()
    run_folder.create_folder(RunOptions(out=tmp_path / "run"), TrainConfig())
    with pytest.raises(TrainError, match="already holds a run"):
        run_folder.create_folder(RunOptions(out=tmp_path / "run"), TrainConfig())


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(tmp_path):
    with pytest.raises(TrainError, match="no longer finite"):
        fit(network(), made_data.blobs(), config(lr=1e30), RunOptions(out=tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_the_last_good_checkpoint_is_kept_when_the_loss_runs_away(tmp_path, monkeypatch):
    from fusedmlp.train import loop

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    net, data = network(), made_data.blobs()

    def spoil(module, inputs):
        spoil.count += module.training
        if spoil.count == 100:
            module[0].weight.data.fill_(float("nan"))

    spoil.count = 0
    net.register_forward_pre_hook(spoil)
    with pytest.raises(TrainError, match="no longer finite in epoch 3, .*last good checkpoint"):
        fit(net, data, config(), RunOptions(out=tmp_path / "run"))
    held = run_folder.load_checkpoint(tmp_path / "run")
    assert held["position"]["epoch"] == 2
    assert all(torch.isfinite(t).all() for t in held["model"].values())


# writing


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_disk_that_fills_keeps_the_file_of_before(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    run_folder.write_atomically(path, b"before")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "write":
        monkeypatch.setattr(run_folder.os, "fdopen", full)
    else:
        monkeypatch.setattr(run_folder.os, failing, full)
    with pytest.raises(TrainError, match="cannot write .*file: No space left.*; it takes 5 bytes"):
        run_folder.write_atomically(path, b"after")
    monkeypatch.undo()
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "text": lambda content: b"hello",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_a_clear_error(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    run_folder.save_checkpoint(path, {"model": {}})
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(TrainError, match="checkpoint.pt is truncated, corrupted or no checkpoint"):
        run_folder.load_checkpoint(tmp_path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"format": 1, "model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainError, match="no checkpoint"):
        run_folder.load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_run_folder_is_named(tmp_path):
    with pytest.raises(TrainError, match="must be a run folder with a checkpoint.pt"):
        run_folder.load_checkpoint(tmp_path)
    with pytest.raises(TrainError, match="must be an existing run folder"):
        run_folder.load_checkpoint(tmp_path / "none")
    torch.save([1, 2], tmp_path / "checkpoint.pt")
    with pytest.raises(TrainError, match="must be a checkpoint of format 1, got list"):
        run_folder.load_checkpoint(tmp_path)
