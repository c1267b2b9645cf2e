"""The `native` engine: whole epochs in one call of C++, for networks of plain layers on a CPU.

Parameters are updated in place and the optimizer's state is in the torch.optim object, so its
checkpoints are those of the `autograd` engine and either continues from the other's. The updates
have the formulas and the order of operations of torch.optim.SGD, Adam and AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import compat
from ..data.types import Scaling
from ..optim import EpsilonHatAdam
from ..task import Task
from . import native_op
from .plain_layers import (
    layers_of,
    reasons_against_data,
    reasons_against_optimizer,
    reasons_against_parameters,
    reasons_against_rows,
)

# Optimisers with two moments and a count of updates.
_ADAMS = {
    torch.optim.AdamW: native_op.ADAMW,
    torch.optim.Adam: native_op.ADAM,
    EpsilonHatAdam: native_op.ADAM_EPSILON_HAT,
}
_NONE = torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class Share:
    """The work of one network in a call: epochs of its own data order and batch size."""

    engine: Native
    order: Tensor  # (epochs * rows,) int64 rows of the data
    batch: int
    epochs: int = 1

    @property
    def rows(self) -> int:
        return len(self.order) // self.epochs

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return -(-self.rows // self.batch)


@dataclass
class Call:
    """The arguments of one network in a call of native_op.train, whose docstring describes them."""

    lr_scale: Tensor
    first: list[Tensor]
    second: list[Tensor]
    layer_ints: list[int]
    layer_floats: list[float]
    ints: tuple[int, ...]
    floats: tuple[float, ...]


@torch.no_grad()
def train(
    shares: Sequence[Share],
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    scaling: Scaling,
    totals: Tensor,
    work: Tensor,
) -> Tensor:
    """native_op.train for networks whose rows are those of x and y: adds to totals (epochs of all
    networks, 3) and returns the work memory for the next call."""
    engines = [share.engine for share in shares]
    calls = [s.engine.call(s.steps * s.epochs) for s in shares]

    def moments(name: str) -> list[Tensor]:
        found = [getattr(call, name) for call in calls]
        if not any(found):
            return []
        empty = ([native_op.EMPTY] * len(engine.parameters) for engine in engines)
        return [t for mine, none in zip(found, empty, strict=True) for t in mine or none]

    place = [(len(s.engine.layers), s.batch, s.epochs) for s in shares]
    first, second = moments("first"), moments("second")
    while True:
        needed = native_op.train(
            x,
            y,
            [share.order for share in shares],
            scaling.mean,
            scaling.std,
            weights,
            [call.lr_scale for call in calls],
            [p for engine in engines for p in engine.parameters],
            first,
            second,
            totals,
            work,
            [n for call in calls for n in call.layer_ints],
            [n for call in calls for n in call.layer_floats],
            [n for call, more in zip(calls, place, strict=True) for n in (*call.ints, *more)],
            [n for call in calls for n in call.floats],
            float(scaling.divisor),
            native_op.LOSSES[engines[0].task.loss],
            engines[0].task.precision == "bf16",
        )
        if needed <= work.shape[1]:
            return work
        work = native_op.work_of(len(shares), needed)


class Native:
    """Forward, loss, backward and update of whole epochs in one call, without Python."""

    name = "native"
    automatic = True

    @staticmethod
    def reasons_against(task: Task) -> list[str]:
        if task.device.type != "cpu":
            return [f"it runs on a CPU, the device is {task.device.type}"]
        found = native_op.unavailable(task.backend), native_op.reason_against(task.precision)
        reasons = [reason for reason in found if reason is not None]
        if task.world.size > 1:
            reasons.append("it runs in one process")
        reasons += reasons_against_optimizer(task.optimizer)
        layers, against = layers_of(task.model)
        reasons += against
        reasons += reasons_against_parameters(task.model, task.optimizer)
        return reasons + (reasons_against_data(task, layers) if layers and not against else [])

    def __init__(self, task: Task):
        self.task = task
        self.layers, _ = layers_of(task.model)
        self.mask_layers = task.mask_layers
        self.number = 0
        self.totals = torch.zeros(1, 3, dtype=torch.float64)
        self.work = torch.empty(1, 0)
        self.every = torch.arange(0)
        self.parameters = native_op.tensors_of(self.layers)
        self.present = [p for p in self.parameters if p is not native_op.EMPTY]
        self.adam = _ADAMS.get(type(task.optimizer))

    def set_step(self, number: int) -> None:
        self.number = number

    def step(self, indices: Tensor) -> None:
        self.steps(indices, max(1, len(indices)))

    def steps(self, order: Tensor, batch: int) -> None:
        task = self.task
        if len(order) == 0:
            return
        share, data = Share(self, order.contiguous(), batch), (task.x, task.y, task.row_weights)
        self.work = train([share], *data, task.scaling, self.totals, self.work)
        self.advance(share.steps)

    def call(self, steps: int) -> Call:
        """The arguments of this network for its next steps."""
        task = self.task
        group = task.optimizer.param_groups[0]
        momentum = float(group.get("momentum", 0.0))
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        rule = native_op.NESTEROV if group.get("nesterov") else native_op.SGD
        first, second, updates = [], [], 0
        if self.adam is not None:
            rule = self.adam
            first, second = self._state("exp_avg"), self._state("exp_avg_sq")
            updates = int(task.optimizer.state[self.present[0]]["step"])
        elif momentum:
            first = self._state("momentum_buffer")
        schedule = task.schedule
        lr_scale = _NONE if schedule.is_constant else schedule.factors(self.number, steps)
        ints = (rule, updates, task.seed, self.number, self.mask_layers)
        floats = (
            float(task.label_smoothing),
            momentum,
            float(beta1),
            float(beta2),
            float(group.get("eps", 0.0)),
            float(task.clip_norm),
        )
        return Call(lr_scale, first, second, *self._numbers(), ints, floats)

    def advance(self, steps: int) -> None:
        """Count steps that are done."""
        if self.adam is not None:
            compat.foreach_add_([self.task.optimizer.state[p]["step"] for p in self.present], steps)
        torch.autograd.graph.increment_version(self.present)
        self.number += steps

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor | None:
        """(sum of losses, number right, rows) in fp64 over rows x (n, ...) as stored and their
        targets, in evaluation mode and without label smoothing; None where it cannot take them."""
        task = self.task
        if x.device.type != "cpu" or reasons_against_rows(task, x, y, self.layers):
            return None
        if len(self.every) != len(x):
            self.every = torch.arange(len(x))
        totals, self.work = native_op.evaluate(
            [self.layers],
            x,
            y,
            [self.every],
            task.scaling,
            task.loss,
            task.precision,
            self.work,
        )
        return totals[0]

    def _numbers(self) -> tuple[list[int], list[float]]:
        groups = self.task.optimizer.param_groups
        rates = {
            id(p): (float(group["lr"]), float(group["weight_decay"]))
            for group in groups
            for p in group["params"]
        }
        ints: list[int] = []
        numbers: list[float] = []
        for layer in self.layers:
            threshold, scale = layer.dropping()
            ints += (layer.act, layer.saves(threshold != 0), threshold, layer.stream_offset)
            numbers += (layer.alpha, scale)
            for t in layer.tensors():
                numbers += rates.get(id(t), (0.0, 0.0))
        return ints, numbers

    def _state(self, name: str) -> list[Tensor]:
        """One entry of the optimizer's state for each parameter, made as torch.optim would."""
        state, found = self.task.optimizer.state, []
        for p in self.parameters:
            if p is native_op.EMPTY:
                found.append(p)
                continue
            mine = state[p]
            if mine.get(name) is None:
                # torch.optim starts momentum as a copy of the first gradient: 0 * momentum + it.
                mine[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if self.adam is not None and "step" not in mine:
                mine["step"] = torch.tensor(0.0)
            found.append(mine[name])
        return found

    def read(self) -> tuple[float, float, int]:
        loss, right, rows = self.totals[0].tolist()
        self.totals.zero_()
        return loss, right, int(rows)

    def sync(self) -> None:
        """Nothing to do: parameters and state are the task's own tensors."""

    def scaler_state(self) -> dict | None:
        return None

    def load_scaler_state(self, state: dict | None) -> None:
        pass
