"""Batches from the caller's own iterables, for data that does not fit in memory: each is checked as
tensors are, and moved to the device in the form that the model takes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..errors import TrainError
from .rows import (
    as_tensor,
    check_classes,
    check_pair,
    dtype_of,
    loss_for,
    reshaped_targets,
    row_shape,
    type_names,
)
from .types import Scaling

_END = object()


@dataclass(frozen=True)
class Loaders:
    """Iterables of (x, y) batches."""

    train: Iterable
    test: Iterable | None = None
    name: str = "loader"

    @property
    def length(self) -> int | None:
        """Batches an epoch; None where the loader has no length."""
        try:
            return len(self.train)
        except (TypeError, NotImplementedError):
            return None


@dataclass(frozen=True)
class BatchForm:
    """The form of all batches: inputs of scaling.dtype and targets for the loss, on the device."""

    device: torch.device
    scaling: Scaling
    loss: str
    is_bytes: bool  # rows are uint8
    outputs: torch.Size  # shape of the model's output for one row


def _going_on(batch, iterator: Iterator) -> Iterator:
    """batch and the batches after it. iter() is not called on the iterator again: some would begin
    anew."""
    while batch is not _END:
        yield batch
        batch = next(iterator, _END)


class Batches:
    """An iterable of checked (inputs, targets).

    The constructor reads the first batch, which sets the form of all others. The first pass
    continues from there, so that an iterable which can be iterated once loses nothing.
    """

    def __init__(self, loader: Iterable, name: str):
        self.loader, self.name = loader, name
        self.passes = 0
        iterator = iter(loader)
        first = next(iterator, _END)
        if first is _END:
            raise TrainError(f"{name} must give at least one batch, got none")
        self.first = self._pair(first, 1)
        check_pair(*self.first, f"x of batch 1 of {name}", f"y of batch 1 of {name}")
        self.rows = self.first[0].shape[1:]
        self.last = 1, self.rows  # number of the last batch, and the shape of its rows
        self.started = _going_on(first, iterator)
        self.generator = torch.get_rng_state()  # a shuffling loader has drawn from it by now
        self.form: BatchForm | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        batches, self.started = self.started, None
        if batches is None:
            batches = self.loader
        else:
            torch.set_rng_state(self.generator)
        number = 0
        for number, batch in enumerate(batches, 1):  # noqa: B007  it is read below
            pair = self._pair(batch, number)
            self.last = number, pair[0].shape[1:]
            yield self._formed(*pair, number)
        if number == 0:
            raise TrainError(
                f"{self.name} gave no batches in its pass {self.passes}, one of each epoch; "
                "what can be gone through once, as a generator, lasts for epochs=1: pass a "
                "DataLoader or a list"
            )

    def raise_if_rows_differ(self, error: Exception) -> None:
        """Raise a TrainError where the batch at which the model failed has other rows than the
        first."""
        number, rows = self.last
        if rows != self.rows and not isinstance(error, TrainError):
            raise TrainError(
                f"the model cannot take batch {number} of {self.name}, of rows {tuple(rows)} where "
                f"those of batch 1 are {tuple(self.rows)}: {str(error).splitlines()[0]}"
            ) from error

    def set_form(self, form: BatchForm) -> None:
        """Set the form of all batches, and check the first one."""
        self.form = form
        self._formed(*self.first, 1)
        self.first = None

    def _pair(self, batch, number: int) -> tuple[Tensor, Tensor]:
        # A tensor of two rows would unpack into two as well.
        if isinstance(batch, tuple | list) and len(batch) == 2:
            x, y = (as_tensor(part) for part in batch)
            if x is not None and y is not None:
                return x, y
        given = type_names(batch)
        if isinstance(batch, Mapping):
            given += " with the keys " + ", ".join(map(str, batch))
        raise TypeError(
            f"{self.name} must give (x, y) batches of two tensors, got {given} as batch "
            f"{number}; a DataLoader's collate_fn can make them"
        )

    def _formed(self, x: Tensor, y: Tensor, number: int) -> tuple[Tensor, Tensor]:
        form = self.form
        is_classes = form.loss == "cross_entropy"
        # Reading values on a GPU would wait for it in every step.
        with_values = number == 1 or (x.device.type == "cpu" and y.device.type == "cpu")
        y_name = f"y of batch {number} of {self.name}"
        x_name = f"x of batch {number} of {self.name}"
        check_pair(x, y, x_name, y_name, with_values)
        if (x.dtype == torch.uint8) != form.is_bytes:
            raise TrainError(
                f"{x_name} must be bytes in all batches or in none, which are divided by 255, "
                f"got {x.dtype}"
            )
        if is_classes:
            check_classes(y, y_name, form.outputs[0], with_values)
        inputs = form.scaling(x.to(form.device, non_blocking=True))
        y = y.to(form.device, non_blocking=True)
        if is_classes:
            return inputs, y.long()
        return inputs, reshaped_targets(y.to(form.scaling.dtype), form.outputs, y_name)


def checked_loaders(
    loaders: Loaders, model: nn.Module, config: TrainConfig, device: torch.device
) -> tuple[Loaders, Scaling, str]:
    """(loaders of checked batches, scaling, loss), from the first batch of each."""
    train = Batches(loaders.train, "the loader")
    test = None if loaders.test is None else Batches(loaders.test, "the test loader")
    x, y = train.first
    loss = loss_for(y, config)
    is_bytes = x.dtype == torch.uint8
    scaling = Scaling(255.0 if is_bytes else 1.0, dtype=dtype_of(model))
    outputs = row_shape(model, scaling(x[:2].to(device)), loss == "cross_entropy")
    form = BatchForm(device, scaling, loss, is_bytes, outputs)
    train.set_form(form)
    if test is not None:
        if test.rows != train.rows:
            row_shape(model, scaling(test.first[0][:2].to(device)), loss == "cross_entropy")
        test.set_form(form)
    return Loaders(train, test, loaders.name), scaling, loss
