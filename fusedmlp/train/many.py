"""fit_many: several networks on the same data at once, for sweeps, folds and ensembles.

Every member ends with the bits that training it alone gives. Nothing is written, no setting of the
process changes, and nothing is tested: `on_epoch` is for a test after each epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import FusedMLP
from . import engines
from .best import best_for
from .build import evaluate, task_for
from .config import TrainConfig
from .data import inputs
from .data.defaults import resolved
from .data.rows import type_names
from .data.types import Data, Scaling, permutation
from .data.weights import check_weights
from .engines import native_op
from .engines.native import Native
from .engines.native_many import NativeMany, Share
from .errors import UsageError
from .losses import mean_figures, rounded
from .process import ALONE, pick_device, run_settings, seed_epoch
from .task import Task

MAX_TOGETHER = 64  # networks in one call
LOSSES = ("cross_entropy", "mse")


@dataclass(frozen=True)
class Member:
    """One network of a sweep: trained in place, on rows of the common data.

    model   any nn.Module that `fit` takes
    config  as `fit` reads it: optimiser, rates, epochs, batch size, seed, precision, engine, ...
            What describes data, network or run folder is not read
    rows    (n,) int64, numbers of the rows of x to train on
    held    (m,) int64, numbers of the rows that tell the best epoch, with config.keep "best"
    """

    model: nn.Module
    config: TrainConfig
    rows: Tensor
    held: Tensor | None = None


def reasons_against_many(members: Sequence[Member], x: Tensor, y: Tensor, loss: str) -> list[str]:
    """Reasons why these members cannot be trained in one call; empty where they can.

    In one call go up to 64 networks on a CPU that the `native` engine takes, each with layers,
    rows and settings of its own. Arguments and errors as for fit_many, which trains one after the
    other where there are reasons; bytes are taken to be scaled.
    """
    scaling = Scaling(255.0) if x.dtype == torch.uint8 else Scaling()
    _check(members, x, y, loss)
    reasons = _reasons_against_devices(members)
    return reasons or _reasons_against(_tasks(members, x, y, loss, scaling))


def fit_many(
    members: Sequence[Member],
    x: Tensor,
    y: Tensor,
    *,
    loss: str,
    scaling: Scaling = Scaling(),  # noqa: B008  frozen
    weights: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> list[list[dict]]:
    """Train each member's model in place for its config.epochs; the same bits as each alone.

    members   of any shapes; where reasons_against_many has no reasons, all are trained in one call
    x         (n, ...) rows as stored, not checked for finite numbers
    y         (n,) int64 classes, or (n,) or (n, k) float targets
    loss      cross_entropy or mse
    scaling   of rows of x to inputs; the same for all
    weights   (n,) of the rows of x in the loss of their batch, or None: all are equal
    progress  called with (epochs done, epochs in all) after each epoch; of epochs so short that
              several are trained in one call, after the call
    on_epoch  called with the number of epochs that are done, 1 after the first: the models then
              hold that epoch's weights. It may change their mode, not their parameters
    returns   for each member one dict an epoch: train_loss, and train_accuracy (None for mse)
    raises    UsageError, TrainError for arguments that `fit` would not take; TypeError

    With config.keep "best" a member ends with the weights of its best epoch, and with
    config.patience it leaves the others when no better one is in sight; its rows then have val_loss
    and val_accuracy too, and best.best_epoch tells which it was.
    A member whose loss is no longer finite does not end the others: the rest of its rows, that
    epoch's among them, say nan, and it is not trained further. A member with fewer epochs than
    another keeps its last weights. Settings that are None are those of `fit`.
    """
    _check(members, x, y, loss)
    if weights is not None:
        check_weights(weights, len(x))
    tasks = _tasks(members, x, y, loss, scaling)
    for _, task in tasks:
        task.row_weights = None if weights is None else weights.float().to(task.device)
    together = bool(members) and not (_reasons_against_devices(members) or _reasons_against(tasks))
    trainings = [
        _Training(config, task, m, together)
        for (config, task), m in zip(tasks, members, strict=True)
    ]
    for training in trainings:
        training.engine.task.model.train()
    many = NativeMany()
    epochs, done = max((t.config.epochs for t in trainings), default=0), 0
    while done < epochs:
        under_way, count = [t for t in trainings if not t.is_done], 1
        if not under_way:  # all are over early
            if progress is not None:
                progress(epochs, epochs)
            break
        if together:
            if on_epoch is None and not any(t.best for t in under_way):
                count = min(many.epochs_ahead(max(t.steps for t in under_way)), epochs - done)
            _train_epochs(many, under_way, count)
        else:
            for training in under_way:
                training.train_epoch()
        _validate([t for t in under_way if t.best is not None], together)
        for _ in range(count):
            done += 1
            if on_epoch is not None:
                on_epoch(done)
                for training in trainings:
                    training.engine.task.model.train()
            if progress is not None:
                progress(done, epochs)
    for training in trainings:
        if training.best is not None:
            training.best.put_back(training.engine.task.model)
    return [training.history for training in trainings]


class _Training:
    """A member in training."""

    def __init__(self, config: TrainConfig, task: Task, member: Member, is_native: bool):
        self.config, self.device = config, task.device
        self.rows = member.rows.cpu()
        self.held = None if member.held is None else member.held.cpu()
        self.best = best_for(config, self.held is not None)
        with run_settings(config, task.device):
            self.engine = Native(task) if is_native else engines.choose(config.engine, task)
        self.engine.set_step(0)
        self.epoch = 0
        self.history: list[dict] = []

    @property
    def is_done(self) -> bool:
        is_over = self.best is not None and self.best.is_over(self.epoch)
        return is_over or self.epoch == self.config.epochs

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return -(-len(self.rows) // self.config.batch_size)

    def order(self, epoch: int) -> Tensor:
        """(n,) rows of x in the order of this epoch: that of `fit` on x[rows]."""
        return self.rows[permutation(self.config.seed, epoch, len(self.rows))]

    def train_epoch(self) -> None:
        with run_settings(self.config, self.device):
            seed_epoch(self.config, ALONE, self.epoch, self.device)
            self.engine.steps(self.order(self.epoch).to(self.device), self.config.batch_size)
            loss, right, rows = self.engine.read()
            self.close_epoch(loss, right, rows)

    def close_epoch(self, loss: float, right: float, rows: int) -> None:
        """Append the epoch to the history; a loss that is not finite ends the training."""
        epochs, kind = 1, self.engine.task.loss
        if not math.isfinite(loss):
            epochs, loss, right = self.config.epochs - self.epoch, math.nan, math.nan
        mean, accuracy = map(rounded, mean_figures(kind, (loss, right, rows)))
        row = {"train_loss": mean, "train_accuracy": accuracy}
        if self.best is not None:
            row |= {"val_loss": math.nan, "val_accuracy": None}
        self.history += [dict(row) for _ in range(epochs)]
        self.epoch += epochs

    def validate(self) -> None:
        task, rows = self.engine.task, self.held.to(self.device)
        with run_settings(self.config, self.device):
            figures = evaluate(
                task.model,
                task.x[rows],
                task.y[rows],
                task.scaling,
                task.loss,
                precision=task.precision,
            )
        self.close_validation(*figures)

    def close_validation(self, loss: float, accuracy: float | None) -> None:
        """Complete the row of the last epoch."""
        if math.isfinite(self.history[-1]["train_loss"]):
            self.history[-1] |= {"val_loss": rounded(loss), "val_accuracy": rounded(accuracy)}
        self.best.see(self.history, self.engine.task.model)


def _train_epochs(many: NativeMany, trainings: list[_Training], count: int) -> None:
    """Train `count` epochs of each, or as many as it has left."""
    orders: dict[tuple, Tensor] = {}
    shares = []
    for t in trainings:
        epochs = min(count, t.config.epochs - t.epoch)
        # Candidates of one fold see its rows in the same order.
        key = (id(t.rows), t.config.seed, t.epoch, epochs)
        if key not in orders:
            orders[key] = torch.cat([t.order(t.epoch + i) for i in range(epochs)])
        shares.append(Share(t.engine, orders[key], t.config.batch_size, epochs))
    for training, sums in zip(trainings, many.run(shares), strict=True):
        for each in sums:
            training.close_epoch(*each)


def _validate(trainings: list[_Training], together: bool) -> None:
    """Look at the rows that these hold out, after an epoch."""
    if not trainings:
        return
    task = trainings[0].engine.task
    if together:
        layers, held = [t.engine.layers for t in trainings], [t.held for t in trainings]
        sums, _ = native_op.evaluate(
            layers, task.x, task.y, held, task.scaling, task.loss, task.precision, torch.empty(1, 0)
        )
        for training, each in zip(trainings, sums.tolist(), strict=True):
            training.close_validation(*mean_figures(task.loss, each))
        return
    for training in trainings:
        training.validate()


def _kind(model: nn.Module) -> tuple:
    """Equal for models that all take a row of the data if one of them does."""
    if type(model) is not FusedMLP:
        return (id(model),)
    return (*map(type, model), *((tuple(p.shape), p.dtype) for p in model.parameters()))


def _tasks(
    members: Sequence[Member], x: Tensor, y: Tensor, loss: str, scaling: Scaling
) -> list[tuple[TrainConfig, Task]]:
    """Each member's config, with all settings filled in, and its task as in `fit`."""
    classes = None
    if loss == "cross_entropy":
        classes = tuple(str(i) for i in range(int(y.max()) + 1))
    given = Data("tensors", x, y, classes=classes, scaling=scaling)
    tasks: list[tuple[TrainConfig, Task]] = []
    moved: dict[torch.device, Data] = {}
    fitted: dict[tuple, Data] = {}
    for member in members:
        model, config = member.model, resolved(member.config, given)
        device = pick_device(config)
        model.to(device)
        if device not in moved:
            moved[device] = given.to(device)
        key = device, config.backend, _kind(model)
        if key not in fitted:
            with run_settings(config, device):
                fitted[key] = inputs.on_device(moved[device], model, device)
        data = fitted[key]
        steps = -(-len(member.rows) // config.batch_size)
        task = task_for(model, config, loss, device, data.scaling, steps)
        task.x, task.y = data.x_train, data.y_train
        tasks.append((config, task))
    return tasks


def _reasons_against_devices(members: Sequence[Member]) -> list[str]:
    if any(pick_device(m.config).type != "cpu" for m in members):
        return ["several networks are trained in one call on a CPU only"]
    return []


def _reasons_against(tasks: list[tuple[TrainConfig, Task]]) -> list[str]:
    reasons = []
    if len(tasks) > MAX_TOGETHER:
        reasons.append(f"at most {MAX_TOGETHER} networks are trained in one call, got {len(tasks)}")
    precisions = sorted({task.precision for _, task in tasks})
    if len(precisions) > 1:
        reasons.append(f"one call has one precision, got {' and '.join(precisions)}")
    for number, (config, task) in enumerate(tasks):
        with run_settings(config, task.device):
            found = Native.reasons_against(task)
        if config.engine not in ("auto", Native.name):
            found = [f"engine {config.engine} was asked for"]
        reasons += [f"member {number}: {reason}" for reason in found]
    return reasons


def _check(members: Sequence[Member], x: Tensor, y: Tensor, loss: str) -> None:
    if loss not in LOSSES:
        raise UsageError(f"fit_many: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"fit_many: x and y must be tensors, got {type_names((x, y))}")
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
    owner: dict[int, int] = {}
    for number, member in enumerate(members):
        _check_member(f"fit_many: member {number}", member, len(x))
        for p in filter(Tensor.numel, member.model.parameters()):
            other = owner.setdefault(p.untyped_storage().data_ptr(), number)
            if other != number:
                raise UsageError(
                    f"fit_many: each member must have a model of its own, but {other} and "
                    f"{number} share parameters"
                )


def _check_member(name: str, member: Member, count: int) -> None:
    if member.config.check().time_limit is not None:
        raise UsageError(f"{name}: --time-limit belongs to fit, which trains one network")
    for what, rows in (("rows", member.rows), ("held", member.held)):
        if rows is None:
            continue
        if rows.dtype != torch.int64 or rows.dim() != 1 or len(rows) == 0:
            given = f"{tuple(rows.shape)} of {rows.dtype}"
            raise UsageError(f"{name}: {what} must be (n,) int64 with n > 0, got {given}")
        if int(rows.min()) < 0 or int(rows.max()) >= count:
            given = f"{int(rows.min())} to {int(rows.max())}"
            raise UsageError(f"{name}: {what} must be in [0, {count}), got {given}")
    if not any(p.requires_grad for p in member.model.parameters()):
        raise UsageError(f"{name}: its model must have parameters that require gradients, got none")
