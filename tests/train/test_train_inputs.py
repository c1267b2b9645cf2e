"""fit: the models, tensors and loaders it takes, and what it says to mistakes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedmlp
from fusedmlp.backends import choice
from fusedmlp.train import RunOptions, TrainConfig, TrainError, UsageError, fit, loop
from fusedmlp.train.process import World

from .. import made_data
from ..native import needs_native
from .test_train import config, network, state_equal


def test_a_users_tensors_and_model():
    data = made_data.blobs()
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    given = (data.x_train, data.y_train, data.x_test, data.y_test)
    result = fit(net, given, config(epochs=8))
    assert result.model is net and len(result.history) == 8
    assert result.history[-1]["test_accuracy"] > 0.9
    assert result.folder is None and result.paths == {}


def test_a_fused_model_of_the_users_own():
    data = made_data.blobs()
    net = fusedmlp.fuse(
        nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
    )
    assert (
        fit(net, (data.x_train, data.y_train), config(epochs=8)).history[-1]["train_accuracy"] > 0.9
    )


def test_regression_with_one_column_and_flat_targets():
    data = made_data.line()
    for y in (data.y_train, data.y_train.flatten()):
        net = network(sizes=(3, 16, 1))
        result = fit(net, (data.x_train, y), config(epochs=30, lr=0.05))
        assert result.history[-1]["train_accuracy"] is None
        assert result.history[-1]["train_loss"] < 0.05


def test_a_model_that_returns_flat_outputs_is_not_broadcast():
    """(B,) against (B, 1) would silently average over all pairs."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x):
            return self.linear(x).flatten()

    data = made_data.line()
    result = fit(Flat(), (data.x_train, data.y_train), config(epochs=40))
    assert result.history[-1]["train_loss"] < 0.02


def test_a_standardized_target_is_learned_whatever_its_size():
    data = made_data.line()
    y = 1e6 * data.y_train + 3e7
    with pytest.raises(TrainError, match="no longer finite.*--standardize"):
        fit(network(sizes=(3, 16, 1)), (data.x_train, y), config(epochs=20))
    result = fit(network(sizes=(3, 16, 1)), (data.x_train, y), config(epochs=20, standardize=True))
    assert result.history[-1]["train_loss"] < 0.05


def test_validation_rows_are_not_trained_on():
    data = made_data.blobs()
    result = fit(network(), (data.x_train, data.y_train), config(val_split=0.5))
    assert result.history[-1]["val_loss"] is not None
    assert result.history[-1]["test_loss"] is None


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_any_batch_size_works(batch):
    result = fit(network(), made_data.blobs(rows=40), config(batch_size=batch, epochs=1))
    assert result.summary["epochs"] == 1


def test_uint8_rows_stay_uint8_and_are_scaled():
    data = made_data.pictures()
    result = fit(
        network(sizes=(64, 16, 4)), (data.x_train, data.y_train), config(epochs=10, lr=0.5)
    )
    assert result.history[-1]["train_accuracy"] > 0.9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bit_arithmetic_keeps_fp32_weights_and_learns(precision):
    net = network(dropout=0.1)
    result = fit(net, made_data.blobs(), config(epochs=10, precision=precision))
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert result.history[-1]["test_accuracy"] > 0.9


def test_an_fp64_model_is_trained_in_fp64():
    net = network().double()
    fit(net, made_data.blobs(), config())
    assert all(p.dtype == torch.float64 for p in net.parameters())


def test_the_backend_asked_for_is_used_and_the_setting_put_back():
    from fusedmlp.backends import registry

    before = registry.explicit(None)
    result = fit(network(dropout=0.5), made_data.blobs(), config(backend="reference"))
    assert result.summary["backend"] == "reference"
    assert registry.explicit(None) == before


@needs_native
@pytest.mark.parametrize("engine, backend", [("native", "native"), ("autograd", "eager")])
def test_the_kernels_named_are_those_that_ran(engine, backend, monkeypatch):
    """The native engine has its own, whatever the ops would choose on their own."""
    monkeypatch.setattr(choice, "select", lambda *_: "eager")
    result = fit(network(), made_data.blobs(), config(engine=engine))
    assert (result.summary["engine"], result.summary["backend"]) == (engine, backend)


# loaders


def _loader(data, **arguments) -> DataLoader:
    return DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=32, **arguments)


def test_a_loader_trains_as_the_tensors_do():
    data = made_data.blobs()
    test = DataLoader(TensorDataset(data.x_test, data.y_test), batch_size=16)
    result = fit(network(dropout=0.1), (_loader(data, shuffle=True), test), config(epochs=8))
    assert result.history[-1]["test_accuracy"] > 0.9
    again = fit(network(dropout=0.1), (_loader(data, shuffle=True), test), config(epochs=8))
    assert state_equal(result.model, again.model)


def test_any_iterable_of_batches_will_do():
    data = made_data.blobs()

    class Batches:
        def __iter__(self):
            yield from zip(data.x_train.split(32), data.y_train.split(32), strict=True)

    assert len(fit(network(), Batches(), config()).history) == 2


# mistakes


def _blob_tensors(**changes):
    data = made_data.blobs()
    parts = {"x": data.x_train, "y": data.y_train}
    for name, change in changes.items():
        parts[name] = change(parts[name])
    return parts["x"], parts["y"]


def _four(**changes):
    data = made_data.blobs()
    parts = {"x": data.x_train, "y": data.y_train, "x_test": data.x_test, "y_test": data.y_test}
    for name, change in changes.items():
        parts[name] = change(parts[name])
    return tuple(parts.values())


MISTAKES = {
    "other_rows": (lambda: _blob_tensors(y=lambda y: y[:-1]), TrainError, "one target a row"),
    "no_rows": (lambda: _blob_tensors(x=lambda x: x[:0], y=lambda y: y[:0]), TrainError, "one row"),
    "nan": (lambda: _blob_tensors(x=lambda x: x / 0 * 0), TrainError, "finite"),
    "class_too_large": (
        lambda: _blob_tensors(y=lambda y: y + 5),
        TrainError,
        "at least 8 outputs for classes 0 to 7, got 3",
    ),
    "negative_class": (lambda: _blob_tensors(y=lambda y: y - 1), TrainError, "classes from 0 on"),
    "other_width": (lambda: _blob_tensors(x=lambda x: x[:, :5]), TrainError, "cannot take rows"),
    "infinite_test": (lambda: _four(x_test=lambda x: x / 0), TrainError, "x_test must hold finite"),
    "other_test_rows": (
        lambda: _four(y_test=lambda y: y[1:]),
        TrainError,
        "y_test must have one target a row of x_test",
    ),
    "test_of_other_width": (
        lambda: _four(x_test=lambda x: x[:, :5]),
        TrainError,
        r"x_test must have rows of \(12,\), as x has, got \(5,\)",
    ),
    "test_of_bytes": (
        lambda: _four(x_test=lambda x: x.byte()),
        TrainError,
        "x_test must be torch.float32, as x is, got torch.uint8",
    ),
    "test_of_floats": (
        lambda: _four(y_test=lambda y: y + 0.5),
        TrainError,
        "y_test must hold integer classes, got torch.float32",
    ),
    "test_class_too_large": (
        lambda: _four(y_test=lambda y: y + 5),
        TrainError,
        "y_test must hold classes 0 to 2, as the model has outputs, got 7",
    ),
    "test_of_other_targets": (
        lambda: (torch.ones(4, 12), torch.ones(4, 3), torch.ones(4, 12), torch.ones(4, 2)),
        TrainError,
        "y_test must have 3 values a row, as y has",
    ),
    "class_beyond_the_names": (
        lambda: replace(made_data.blobs(), y_train=made_data.blobs().y_train + 5),
        TrainError,
        "y_train must hold classes 0 to 2",
    ),
    "data_of_other_rows": (
        lambda: replace(made_data.blobs(), y_train=made_data.blobs().y_train[:9]),
        TrainError,
        "y must have one target a row",
    ),
    "data_of_nan": (
        lambda: replace(made_data.blobs(), x_train=made_data.blobs().x_train / 0),
        TrainError,
        "x must hold finite",
    ),
    "not_data": (lambda: 3, TypeError, "data must be"),
    "empty_loader": (lambda: [], TrainError, "at least one batch"),
    "loader_of_one": (lambda: DataLoader(torch.ones(8, 12)), TypeError, r"\(x, y\) batches"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_the_data_is_named(case):
    make, error, message = MISTAKES[case]
    with pytest.raises(error, match=message):
        fit(network(), make(), config())


SETTINGS = {
    "dropout_count": dict(hidden=(8, 8), dropout=(0.1, 0.2, 0.3)),
    "dropout_range": dict(dropout=(1.5,)),
    "dropout_nan": dict(dropout=(float("nan"),)),
    "width": dict(hidden=(0,)),
    "lr": dict(lr=-1.0),
    "lr_nan": dict(lr=float("nan")),
    "epochs": dict(epochs=0),
    "batch": dict(batch_size=0),
    "val_split": dict(val_split=1.0),
    "seed": dict(seed=2**63),
    "activation": dict(activation="swish"),
    "momentum_of_adamw": dict(optimizer="adamw", momentum=0.9),
    "momentum_of_adam": dict(optimizer="adam", momentum=0.9),
    "std_of_default": dict(init="default", init_std=0.5),
    "tf32_on_cpu": dict(precision="tf32", device="cpu"),
    "target_of_images": dict(target="price"),
    "overwrite_what": dict(overwrite=True),
    "resume_and_out": dict(resume="a", out="b"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_cannot_be_is_a_usage_error(case):
    kind = RunOptions if SETTINGS[case].keys() <= {"out", "overwrite", "resume"} else TrainConfig
    with pytest.raises(UsageError):
        kind(**SETTINGS[case]).check()


def test_a_batch_smaller_than_the_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setattr(loop, "current_world", lambda: World(1, 4))
    with pytest.raises(UsageError, match="--batch-size must be at least .*processes, 4, got 3"):
        fit(network(), made_data.blobs(), config(batch_size=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(TrainError, match="--device cuda was asked for, but .*--device cpu"):
        fit(network(), made_data.blobs(), config(device="cuda"))


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(TrainError, match="no longer finite in epoch 1.*smaller --lr than 1e"):
        fit(network(), made_data.blobs(), config(lr=1e30))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"epochs": 1},), "config must be a TrainConfig, got dict"),
        ((config(), "runs/x"), "options must be a RunOptions, got str"),
        ((config(), RunOptions(out=3)), "--out must be a path, got int"),
        ((config(), RunOptions(resume=[])), "--resume must be a path, got list"),
    ],
)
def test_configs_and_options_are_what_they_must_be(arguments, message):
    net, data = network(sizes=(3, 1)), made_data.line()
    before = net[0].weight.clone()
    with pytest.raises(TypeError, match=message):
        fit(net, (data.x_train, data.y_train), *arguments)
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(dropout="a"), "dropout must be a sequence, got str"),
        (dict(hidden="a"), "hidden must be a sequence, got str"),
        (dict(hidden=(2.5,)), "hidden must be an int, got float"),
        (dict(epochs="5"), "epochs must be an int, got str"),
        (dict(epochs=True), "epochs must be an int, got bool"),
        (dict(lr="fast"), "lr must be a number, got str"),
        (dict(data_dir=3), "data_dir must be a path, got int"),
        (dict(standardize=1), "standardize must be True or False, got int"),
        (dict(dataset=5), "dataset must be a str, got int"),
    ],
)
def test_a_setting_of_another_kind(setting, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        TrainConfig(**setting).check()


def test_one_number_lists_and_paths_are_settings():
    config = TrainConfig(hidden=64, dropout=0.1, dataset=Path("t.csv"), leave_out=["id"]).check()
    assert config.hidden == (64,) and config.dropout == (0.1,)
    assert config.dataset == "t.csv" and config.leave_out == ("id",)
    with pytest.raises(UsageError, match="^--optimizer must be one of sgd, adam, adamw, got 'x'$"):
        TrainConfig(optimizer="x").check()
