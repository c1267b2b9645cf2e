"""Weights of rows and classes in the loss: against plain PyTorch, and what they change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedmlp import FusedMLP
from fusedmlp.train import (
    Data,
    Member,
    TrainConfig,
    TrainError,
    UsageError,
    crossval,
    explain,
    fit,
    fit_many,
)
from fusedmlp.train.data.types import permutation, replace
from fusedmlp.train.data.weights import row_weights
from fusedmlp.train.engines import native_op

from .. import made_data

CONFIG = TrainConfig(
    epochs=2, batch_size=50, lr=0.2, optimizer="sgd", device="cpu", init="default", engine="auto"
)


def _net(outputs: int, seed: int = 0) -> FusedMLP:
    torch.manual_seed(seed)
    return FusedMLP(12, [16], outputs)


def _unequal() -> Data:
    """Blobs of which the second class has few rows."""
    data = made_data.blobs(rows=240)
    kept = (data.y_train != 1) | (torch.arange(len(data.y_train)) % 5 == 1)
    return replace(data, x_train=data.x_train[kept], y_train=data.y_train[kept])


def _plain(net: nn.Module, data: Data, weights, class_weights=None) -> nn.Module:
    """The loop that people write: the weighted mean of the losses of each batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=CONFIG.lr)
    for epoch in range(CONFIG.epochs):
        for rows in permutation(0, epoch, len(data.x_train)).split(CONFIG.batch_size):
            outputs, y = net(data.x_train[rows]), data.y_train[rows]
            if class_weights is not None:
                loss = F.cross_entropy(outputs, y, weight=class_weights)
            elif data.is_classes:
                each = F.cross_entropy(outputs, y, reduction="none")
                loss = (each * weights[rows]).sum() / weights[rows].sum()
            else:
                each = (outputs - y).square().mean(1)
                loss = (each * weights[rows]).sum() / weights[rows].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def _assert_same(found: nn.Module, wanted: nn.Module) -> None:
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_balanced_classes_are_torchs_class_weights():
    data = _unequal()
    counts = torch.bincount(data.y_train).float()
    wanted = _plain(_net(3), data, None, len(data.y_train) / (3 * counts))
    net = _net(3)
    fit(net, data, CONFIG.replace(class_weight="balanced"))
    _assert_same(net, wanted)
    from sklearn.utils.class_weight import compute_sample_weight

    found = row_weights(data, "balanced")
    expected = compute_sample_weight("balanced", data.y_train.numpy())
    torch.testing.assert_close(found, torch.from_numpy(expected).float())


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_rows_weigh_what_they_are_given(kind):
    data = made_data.blobs() if kind == "classes" else made_data.line(seed=3)
    if kind == "numbers":
        x = torch.randn(len(data.x_train), 12)
        data = replace(data, x_train=x, y_train=x[:, :1] * 2, x_test=None, y_test=None)
    weights = torch.rand(len(data.x_train), generator=torch.Generator().manual_seed(1)).double()
    weights[::7] = 0
    wanted = _plain(_net(data.out_features), data, weights.float())
    net = _net(data.out_features)
    fit(net, replace(data, weights=weights), CONFIG)
    _assert_same(net, wanted)


def test_a_row_of_weight_two_counts_as_two_rows():
    data = made_data.blobs()
    twice = torch.cat([torch.arange(len(data.x_train)), torch.arange(50)])
    weights = torch.ones(len(data.x_train), dtype=torch.float64)
    weights[:50] = 2
    whole = CONFIG.replace(batch_size=1000)
    first, second = _net(3), _net(3)
    fit(first, replace(data, weights=weights), whole)
    fit(second, replace(data, x_train=data.x_train[twice], y_train=data.y_train[twice]), whole)
    _assert_same(first, second)


def test_weights_times_class_weights_and_a_batch_without_weight():
    data = _unequal()
    weights = torch.zeros(len(data.x_train), dtype=torch.float64)
    weights[:3] = 1.0
    found = row_weights(replace(data, weights=weights), "balanced")
    assert found[3:].sum() == 0 and (found[:3] > 0).all()
    net = _net(3)
    history = fit(net, replace(data, weights=weights), CONFIG.replace(batch_size=5)).history
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert history[-1]["train_loss"] >= 0


def test_a_small_class_is_found_more_often_when_classes_are_balanced():
    generator = torch.Generator().manual_seed(0)
    y = (torch.arange(2000) % 20 == 0).long()
    x = torch.randn(2000, 12, generator=generator) + 0.5 * y[:, None]
    data = Data("rare", x[:1500], y[:1500], x[1500:], y[1500:], classes=("often", "rarely"))
    recall = {}
    for weight in (None, "balanced"):
        net = _net(2)
        history = fit(net, data, CONFIG.replace(class_weight=weight, epochs=5)).history
        hits = net.eval()(data.x_test).argmax(1)[data.y_test == 1]
        recall[weight] = hits.float().mean().item()
        # Hits are counted by rows, whatever they weigh.
        assert 0.5 < history[-1]["train_accuracy"] <= 1
    assert recall["balanced"] > recall[None] + 0.2


@pytest.mark.skipif(
    native_op.unavailable() is not None, reason=f"native engine: {native_op.unavailable()}"
)
@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_the_native_engine_takes_weights_and_tells_what_autograd_tells(kind):
    data = _unequal() if kind == "classes" else made_data.line(seed=3)
    weights = torch.arange(len(data.x_train)).double() % 3
    weights[:60] = 0.0  # the whole of some batches of the unshuffled kind
    data = replace(data, weights=weights)
    sizes = data.x_train.shape[1], [16], data.out_features
    config = CONFIG.replace(batch_size=20, class_weight="balanced" if kind == "classes" else None)
    assert "native: taken" in explain(FusedMLP(*sizes), data, config).splitlines()
    told = {}
    for engine in ("native", "autograd"):
        torch.manual_seed(3)
        net = FusedMLP(*sizes)
        told[engine] = fit(net, data, config.replace(engine=engine)).history
    for mine, theirs in zip(told["native"], told["autograd"], strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert mine["train_accuracy"] == theirs["train_accuracy"]
        assert mine["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-5)


def test_several_networks_and_cross_validation_take_weights():
    data = made_data.blobs()
    weights = torch.rand(len(data.x_train), generator=torch.Generator().manual_seed(1)).double()
    rows = torch.arange(0, len(data.x_train), 2)
    part = replace(
        data, x_train=data.x_train[rows], y_train=data.y_train[rows], weights=weights[rows]
    )
    alone, together = _net(3), _net(3)
    fit(alone, part, CONFIG)
    fit_many(
        [Member(together, CONFIG, rows)],
        data.x_train,
        data.y_train,
        loss="cross_entropy",
        weights=weights,
    )
    assert all(map(torch.equal, together.parameters(), alone.parameters()))
    pytest.importorskip("sklearn")
    config = CONFIG.replace(class_weight="balanced")
    found = crossval(config, {"hidden": [4, 8]}, folds=2, data=_unequal())
    assert found.best.mean("val") < 0.5


def test_what_cannot_be_weighed_is_said():
    data = made_data.blobs()
    with pytest.raises(UsageError, match="--class-weight needs classes, but the target of line"):
        fit(FusedMLP(3, [4], 1), made_data.line(), CONFIG.replace(class_weight="balanced"))
    with pytest.raises(UsageError, match="--class-weight belongs to --loss cross_entropy"):
        CONFIG.replace(class_weight="balanced", loss="mse").check()
    with pytest.raises(UsageError, match="fit: class_weight needs data in memory"):
        loader = [(data.x_train, data.y_train)]
        fit(_net(3), (loader, None), CONFIG.replace(class_weight="balanced"))
    for weights, message in (
        (torch.ones(3), r"weights must be \(180,\), one a training row, got \(3,\)"),
        (-torch.ones(180), "weights must be finite numbers of at least 0"),
        (torch.zeros(180), "and not all of them 0"),
    ):
        with pytest.raises(TrainError, match=message):
            fit(_net(3), replace(data, weights=weights), CONFIG)


@pytest.mark.parametrize(
    "weights, error, message",
    [
        ([1.0, 2.0], TypeError, "weights must be a tensor, got list"),
        (torch.ones(2), TrainError, r"weights must be \(3,\), one a training row, got \(2,\)"),
        (
            torch.tensor([1.0, -1.0, 1.0]),
            TrainError,
            "weights must be finite numbers of at least 0",
        ),
    ],
)
def test_weights_of_another_kind_are_refused_by_fit_many(weights, error, message):
    with pytest.raises(error, match=message):
        fit_many(
            [], torch.zeros(3, 2), torch.zeros(3).long(), loss="cross_entropy", weights=weights
        )
