"""fit_many: several networks on the same data at once, for sweeps, folds and ensembles.

Every member ends with the bits that training it alone gives. Writes no files, changes no setting of
the process, and does not test: whoever wants a test after each epoch passes `on_epoch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import schedule, source, step
from .config import TrainConfig
from .data import Data, Scaling, permutation, resolved
from .distributed import ALONE
from .errors import TrainError, UsageError
from .model import optimizer_for
from .state import rng_seed
from .surroundings import borrowed, pick_device

MOST = 64  # networks in one call
LOSSES = ("cross_entropy", "mse")


@dataclass(frozen=True)
class Member:
    """One network of a sweep: trained in place, on rows of the common data.

    model   any nn.Module that `fit` takes
    config  as `fit` reads it: optimiser, rates, epochs, batch size, seed, precision, engine, ...
            What describes data, network or run folder is not read
    rows    (n,) int64, numbers of the rows of x to train on
    """

    model: nn.Module
    config: TrainConfig
    rows: Tensor


@dataclass
class _Training:
    """A member that is under way."""

    config: TrainConfig
    device: torch.device
    engine: object
    rows: Tensor  # (n,) on the CPU
    epoch: int = 0
    history: list[dict] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.epoch == self.config.epochs

    def order(self) -> Tensor:
        """(n,) rows of x in the order of the epoch under way: that of `fit` on x[rows]."""
        return self.rows[permutation(self.config.seed, self.epoch, len(self.rows))]

    def train_epoch(self) -> None:
        with borrowed(self.config, self.device):
            torch.manual_seed(rng_seed(self.config, ALONE, self.epoch))
            self.engine.task.model.train()
            self.engine.steps(self.order().to(self.device), self.config.batch_size)
            self.close_epoch(*self.engine.read())

    def close_epoch(self, loss: float, right: float, rows: int) -> None:
        """Note what the epoch came to; the sums are those of engine.read()."""
        self.engine.sync()
        self.epoch += 1
        is_classes = self.engine.task.loss == "cross_entropy"
        if math.isfinite(loss):
            self.history.append(_row(loss / rows, right / rows if is_classes else None))
            return
        lost = _row(math.nan, math.nan if is_classes else None)
        self.history += [dict(lost) for _ in range(self.epoch, self.config.epochs + 1)]
        self.epoch = self.config.epochs


def _row(loss: float, accuracy: float | None) -> dict:
    # 9 digits, as in the history of `fit`: beyond them the grouping of a sum can be seen.
    rounded = None if accuracy is None else float(f"{accuracy:.9g}")
    return {"train_loss": float(f"{loss:.9g}"), "train_accuracy": rounded}


def refuses_many(members: Sequence[Member], x: Tensor, y: Tensor, loss: str) -> list[str]:
    """Reasons why these members cannot be trained in one call; empty where they can.

    Arguments as for fit_many, which trains them one after the other where there are any.
    """
    return ["this version has no engine for several networks"]


def fit_many(
    members: Sequence[Member],
    x: Tensor,
    y: Tensor,
    *,
    loss: str,
    scaling: Scaling = Scaling(),  # noqa: B008  frozen
    progress: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> list[list[dict]]:
    """Train each member's model in place for its config.epochs; the same bits as each alone.

    members   of any shapes; where refuses_many has no reasons, all are trained in one call
    x         (n, ...) rows as stored, not checked for finite numbers
    y         (n,) int64 classes, or (n,) or (n, k) float targets
    loss      cross_entropy or mse
    scaling   of rows of x to inputs; the same for all
    progress  called with (epochs done, epochs in all) after each epoch
    on_epoch  called with the number of epochs that are done, 1 after the first: the models then
              hold that epoch's weights. It may change their mode, not their parameters
    returns   for each member one dict an epoch: train_loss, and train_accuracy (None for mse)
    raises    UsageError, TrainError for arguments that `fit` would not take; TypeError

    A member whose loss is no longer finite does not end the others: the rest of its rows, that
    epoch's among them, say nan, and it is not trained further. A member with fewer epochs than
    another keeps its last weights. Settings that are None are those of `fit`.
    """
    trainings = [_training(number, m, x, y, loss, scaling) for number, m in enumerate(members)]
    epochs = max((t.config.epochs for t in trainings), default=0)
    for done in range(1, epochs + 1):
        for training in trainings:
            if not training.is_done:
                training.train_epoch()
        if on_epoch is not None:
            on_epoch(done)
        if progress is not None:
            progress(done, epochs)
    return [training.history for training in trainings]


def _training(
    number: int, member: Member, x: Tensor, y: Tensor, loss: str, scaling: Scaling
) -> _Training:
    """The member with its engine, as `fit` would set it up; raises for what it would not take."""
    _check(number, member, x, y, loss)
    model, config = member.model, member.config.check()
    device = pick_device(config)
    model.to(device)
    classes = range(int(y.max()) + 1) if loss == "cross_entropy" else None
    data = Data("tensors", x, y, classes=classes and tuple(map(str, classes)), scaling=scaling)
    config = resolved(config, data)
    data = source.on_device(data, model, device)
    task = step.Task(model, optimizer_for(model, config, loss), loss, device, scaling=data.scaling)
    task.x, task.y = data.x_train, data.y_train
    task.precision, task.seed = config.precision, config.seed
    task.label_smoothing, task.clip_norm = config.label_smoothing, config.clip_norm
    task.schedule = schedule.of(config, -(-len(member.rows) // config.batch_size))
    engine = step.choose(config.engine, task)
    engine.set_step(0)
    return _Training(config, device, engine, member.rows.cpu())


def _check(number: int, member: Member, x: Tensor, y: Tensor, loss: str) -> None:
    name = f"fit_many: member {number}"
    rows = member.rows
    if loss not in LOSSES:
        raise UsageError(f"fit_many: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if x.dim() < 1 or y.dim() < 1 or len(x) != len(y) or len(x) == 0:
        raise UsageError(
            f"fit_many: y must have one target a row of x {tuple(x.shape)}, got {tuple(y.shape)}"
        )
    if loss == "cross_entropy" and (y.dtype != torch.int64 or y.dim() != 1 or int(y.min()) < 0):
        raise UsageError(
            f"fit_many: y must be (n,) int64 classes from 0 on, got {tuple(y.shape)} of {y.dtype}"
        )
    if loss == "mse" and not y.is_floating_point():
        raise UsageError(f"fit_many: y must be float targets for mse, got {y.dtype}")
    if rows.dtype != torch.int64 or rows.dim() != 1 or len(rows) == 0:
        raise UsageError(
            f"{name}: rows must be (n,) int64 with n > 0, got {tuple(rows.shape)} of {rows.dtype}"
        )
    if int(rows.min()) < 0 or int(rows.max()) >= len(x):
        raise UsageError(
            f"{name}: rows must be in [0, {len(x)}), got {int(rows.min())} to {int(rows.max())}"
        )
    if not any(p.requires_grad for p in member.model.parameters()):
        raise TrainError(f"{name}: its model must have parameters that require gradients, got none")
