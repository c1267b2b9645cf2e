"""fit on loaders: the values of a plain PyTorch loop over the same batches, and every check that
tensors get."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fusedmlp.train import RunOptions, Scaling, TrainConfig, TrainError, UsageError, evaluate, fit

from .. import made_data
from .test_train import config, network, state_equal

ROWS = 97  # three batches of 32 and one of a single row


class Shaped(nn.Module):
    """A network whose outputs go through `shape`."""

    def __init__(self, shape, outputs: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, outputs))
        self.shape = shape

    def forward(self, x):
        return self.shape(self.net(x))


SHAPES = {
    "flat": lambda outputs: outputs.flatten(),
    "squeezed": lambda outputs: outputs.squeeze(),
    "column": lambda outputs: outputs,
}


def numbers(column: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 12, generator=generator)
    y = x[:, 0] - 2 * x[:, 1] + 0.5
    return x, y[:, None] if column else y


def classes() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = numbers()
    return x, (y > 0).long() + (y > 1).long()


def loader(x, y) -> DataLoader:
    """Shuffled by a generator of its own, which looking at a batch would move on."""
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=generator)


def plain(net: nn.Module, batches, epochs: int, lr: float) -> list[float]:
    """The textbook loop, with targets in the shape of the outputs; its mean losses."""
    optimizer = torch.optim.SGD(net.parameters(), lr)
    losses = []
    for _ in range(epochs):
        total = rows = 0
        for x, y in batches:
            outputs = net(x)
            if y.is_floating_point():
                loss = F.mse_loss(outputs.reshape(-1), y.reshape(-1))
            else:
                loss = F.cross_entropy(outputs.reshape(len(y), -1), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, rows = total + loss.item() * len(y), rows + len(y)
        losses.append(total / rows)
    return losses


@pytest.mark.parametrize("column", [False, True], ids=["y_flat", "y_column"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_targets_of_any_shape_are_trained_as_in_a_plain_loop(shape, column):
    """(B,) outputs against (B, 1) targets once gave the loss of all pairs: nothing was learned."""
    x, y = numbers(column)
    ours, theirs = (Shaped(SHAPES[shape]) for _ in range(2))
    result = fit(ours, (loader(x, y), loader(x, y)), config(epochs=30))
    losses = plain(theirs, loader(x, y), 30, 0.1)
    for row, loss in zip(result.history, losses, strict=True):
        assert row["train_loss"] == pytest.approx(loss, rel=1e-4)
    wanted = F.mse_loss(theirs(x).reshape(-1), y.reshape(-1)).item()
    assert result.history[-1]["test_loss"] == pytest.approx(wanted, rel=1e-3) and wanted < 0.5


@pytest.mark.parametrize("shape", ["squeezed", "column"])
def test_a_last_batch_of_one_row_keeps_its_classes(shape):
    x, y = classes()
    ours, theirs = (Shaped(SHAPES[shape], 3) for _ in range(2))
    result = fit(ours, (loader(x, y), loader(x, y)), config(epochs=5))
    losses = plain(theirs, loader(x, y), 5, 0.1)
    assert result.history[-1]["train_loss"] == pytest.approx(losses[-1], rel=1e-4)
    right = (theirs(x).argmax(1) == y).float().mean().item()
    assert result.history[-1]["test_accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_with_a_last_batch_of_one_row(shape):
    """The dimension that `squeeze` takes from a single row was missed in training and testing."""
    x, y = numbers()
    net = Shaped(SHAPES[shape])
    result = fit(net, (x, y, x[:1], y[:1]), config(epochs=30))
    wanted = F.mse_loss(net(x[:1]).reshape(-1), y[:1]).item()
    assert result.history[-1]["test_loss"] == pytest.approx(wanted, rel=1e-4)
    assert result.history[-1]["train_loss"] < 0.5
    loss, accuracy = evaluate(net, x, y[:, None], Scaling(), "mse")
    assert loss == pytest.approx(F.mse_loss(net(x).reshape(-1), y).item()) and accuracy is None


# what may be given


def batches(x, y) -> list:
    return list(zip(x.split(32), y.split(32), strict=True))


class Again:
    """Its own iterator, which begins anew."""

    def __init__(self, given):
        self.given = given

    def __iter__(self):
        self.left = iter(self.given)
        return self

    def __next__(self):
        return next(self.left)


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.rows = list(zip(x, y, strict=True))

    def __iter__(self):
        return iter(self.rows)


KINDS = {
    "pair_with_none": lambda x, y: (batches(x, y), None),
    "generator": lambda x, y: (batch for batch in batches(x, y)),
    "own_iterator": lambda x, y: Again(batches(x, y)),
    "numpy": lambda x, y: [(a.numpy(), b.numpy()) for a, b in batches(x, y)],
    "reversed_numpy": lambda x, y: [
        (numpy.flip(a.flip(0).numpy(), 0), b.numpy()) for a, b in batches(x, y)
    ],
    "fp64": lambda x, y: [(a.double(), b.int()) for a, b in batches(x, y)],
    "lists_as_pairs": lambda x, y: [[a, b] for a, b in batches(x, y)],
    "stream": lambda x, y: DataLoader(Stream(x, y), batch_size=32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_batch_is_lost_whatever_it_comes_from(kind):
    x, y = classes()
    ours, theirs = Shaped(SHAPES["column"], 3), Shaped(SHAPES["column"], 3)
    fit(ours, KINDS[kind](x, y), config(epochs=1))
    plain(theirs, batches(x, y), 1, 0.1)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["own_iterator", "stream"])
def test_what_can_be_gone_through_again_is(kind):
    x, y = classes()
    ours, theirs = Shaped(SHAPES["column"], 3), Shaped(SHAPES["column"], 3)
    fit(ours, (KINDS[kind](x, y), KINDS[kind](x, y)), config(epochs=3))
    plain(theirs, batches(x, y), 3, 0.1)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["the loader", "the test loader"])
def test_a_generator_does_not_train_or_test_on_nothing(part):
    x, y = classes()
    given = [batches(x, y), batches(x, y)]
    place = part == "the test loader"
    given[place] = (batch for batch in given[place])
    with pytest.raises(TrainError, match=f"{part} gave no batches in its pass 2.*epochs=1"):
        fit(network(), tuple(given), config(epochs=2))


def test_a_run_on_a_loader_that_is_resumed_between_epochs_goes_on_exactly(tmp_path):
    """The loader is opened before the loop seeds the generators of the first epoch."""
    made_data.need("safetensors")
    x, y = classes()

    def rows():
        return DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.4), nn.Linear(8, 3))

    whole, part = net(), net()
    fit(whole, rows(), config(epochs=4))
    fit(part, rows(), config(epochs=2), RunOptions(out=tmp_path / "run"))
    fit(part, rows(), config(epochs=4), RunOptions(resume=tmp_path / "run"))
    assert state_equal(whole, part)


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_of_batches_is_a_loader(count):
    x, y = classes()
    result = fit(network(), batches(x, y)[:count], config(epochs=1))
    assert len(result.history) == 1


def test_two_pairs_of_tensors_are_not_guessed_at():
    x, y = classes()
    for given in ([(x, y), (x, y)], ((x, y), (x, y))):
        with pytest.raises(TypeError, match=r"two batches.*\(batches, None\).*\(x, y, x_test"):
            fit(network(), given, config())


NO_DATA = {
    "dict": {"x": torch.ones(2, 12), "y": torch.ones(2)},
    "path": "rows.csv",
    "dataset": TensorDataset(torch.ones(2, 12), torch.ones(2)),
    "nothing": None,
}


@pytest.mark.parametrize("case", NO_DATA)
def test_what_is_no_data_is_named(case):
    name = type(NO_DATA[case]).__name__
    with pytest.raises(TypeError, match=f"data must be .*needs a DataLoader.*got {name}"):
        fit(network(), NO_DATA[case], config())


# batches that cannot be


def _dict(x, y):
    return {"pixels": x, "label": y}


BAD = {
    "dict": (_dict, TypeError, "got dict with the keys pixels, label as batch {n}; .*collate_fn"),
    "three": (lambda x, y: (x, y, y), TypeError, "got .Tensor, Tensor, Tensor. as batch {n}"),
    "one_tensor": (lambda x, y: x[:2], TypeError, "of two tensors, got Tensor as batch {n}"),
    "lists": (lambda x, y: (x.tolist(), y.tolist()), TypeError, "got .list, list. as batch {n}"),
    "words": (lambda x, y: (numpy.array(["a"]), y[:1]), TypeError, "arrays of numbers"),
    "too_large": (
        lambda x, y: (x, y + 5),
        TrainError,
        "y of batch {n} of .* classes 0 to 2.*got 7",
    ),
    "negative": (lambda x, y: (x, y - 100), TrainError, "y of batch {n} of .*got -100"),
    "nan": (lambda x, y: (x / 0 * 0, y), TrainError, "x of batch {n} of .* finite"),
    "infinite": (lambda x, y: (x / 0, y), TrainError, "x of batch {n} of .* finite"),
    "no_rows": (lambda x, y: (x[:0], y[:0]), TrainError, "x of batch {n} of .* at least one row"),
    "other_rows": (lambda x, y: (x, y[1:]), TrainError, "y of batch {n} of .* one target a row"),
    "single_row": (lambda x, y: (x[0], y[0]), TrainError, "y of batch {n} .*one target a row"),
    "matrix": (lambda x, y: (x, y[:, None]), TrainError, r"y of batch {n} .* must be \(n,\)"),
    "other_width": (lambda x, y: (x[:, :5], y), TrainError, "the model cannot take .*mat1"),
}


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("part", ["the loader", "the test loader"])
@pytest.mark.parametrize("case", BAD)
def test_a_batch_gets_the_checks_that_tensors_get(case, part, number):
    spoil, error, message = BAD[case]
    given = [batches(*classes()), batches(*classes())]
    where = given[part == "the test loader"]
    where[number - 1] = spoil(*where[number - 1])
    net = network()
    before = copy.deepcopy(net)
    with pytest.raises(error, match=message.replace("{n}", str(number))) as raised:
        fit(net, tuple(given), config())
    if case not in ("words", "other_width"):
        assert part in str(raised.value)
    if number == 1:
        assert state_equal(net, before)  # said before the first step


BAD_NUMBERS = {
    "nan": (lambda x, y: (x, y / 0 * 0), "y of batch {n} of the loader must hold finite"),
    "two_columns": (
        lambda x, y: (x, torch.stack([y, y], 1)),
        "2 values a row to match .*batch {n}",
    ),
    "bytes": (lambda x, y: (x.byte(), y), "x of batch {n} of the loader .*got torch.uint8"),
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_a_batch_of_numbers_gets_them_too(case):
    spoil, message = BAD_NUMBERS[case]
    given = batches(*numbers())
    given[1] = spoil(*given[1])
    with pytest.raises(TrainError, match=message.replace("{n}", "2")):
        fit(Shaped(SHAPES["flat"]), given, config())


def test_float_targets_are_no_classes():
    x, y = classes()
    with pytest.raises(
        UsageError, match="cross_entropy needs integer classes, but y is torch.float"
    ):
        fit(network(), batches(x, y.float()), TrainConfig(loss="cross_entropy", device="cpu"))
    given = batches(x, y)
    given[2] = given[2][0], given[2][1].float()
    with pytest.raises(TrainError, match="y of batch 3 of the loader must hold integer classes"):
        fit(network(), given, config())
