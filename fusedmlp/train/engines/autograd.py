"""Step engines: how one training step is run. One interface; `choose` picks, `why` says why.

An engine is made from a Task and has
    name                 as in --engine
    automatic            whether `auto` may take it
    refuses(task)        reasons why it cannot run this task, empty where it can (static)
    step(indices)        one step on these rows of the task's data; waits for nothing
    steps(order, batch)  one step for each slice of `batch` rows of order; an engine that runs many
                         steps in one call does it here
    step_on(x, y)        one step on inputs and targets from elsewhere (a loader), where it does not
                         refuse them
    set_step(number)     the global step that comes next: it decides masks and learning rates
    read()               (sum of losses, number right, rows) since the last read; waits for them
    judge(x, y)          (sum of losses, number right, rows) over rows that are not trained on, in
                         evaluation mode; None where the model itself has to be run
    sync()               parameters and optimiser state, written back into the task's objects
    scaler_state(), load_scaler_state(state)   of fp16's loss scale, None without one
Every engine gives the trajectory of plain PyTorch with the same masks.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import context
from ...functional import dropout_state
from ...nn import FusedSequential
from ...nn.groups import is_fused_module
from ..data.types import Scaling
from ..distributed import ALONE, World
from ..errors import TrainError
from ..schedule import Schedule
from .graph import Graph
from .native import Native

HELD = 1 << 20  # output values that wait on the device before their losses are summed up


@dataclass
class Task:
    """What there is to train, on its device."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: str  # cross_entropy, mse or logistic
    device: torch.device
    x: Tensor | None = None  # (n, ...) rows as stored; None where batches come from a loader
    y: Tensor | None = None  # (n,) int64 for cross_entropy, else (n, k) fp32
    scaling: Scaling = field(default_factory=Scaling)
    precision: str = "fp32"
    seed: int = 0
    world: World = ALONE
    label_smoothing: float = 0.0  # of cross_entropy
    clip_norm: float = 0.0  # largest norm of all gradients together; 0: any
    schedule: Schedule = field(default_factory=Schedule)  # of the learning rates

    @property
    def mask_layers(self) -> int:
        """Streams that a step takes, or 0 where masks do not come from the state of the run.

        Only one fused network can be handed a state; other models draw from torch's generator,
        which `fit` seeds.
        """
        is_one = isinstance(self.model, FusedSequential) and is_fused_module(self.model)
        return self.model._layer_count() if is_one else 0


def autocast(device: torch.device, precision: str):
    """The context of bf16 and fp16 arithmetic; a context without effect for fp32 and tf32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def loss_of(
    kind: str, outputs: Tensor, targets: Tensor, reduction: str = "mean", smoothing: float = 0.0
) -> Tensor:
    """Mean or sum over the rows. The squared error of a row is the mean over its outputs, the
    logistic loss the sum: F.binary_cross_entropy_with_logits of each.

    outputs (B, C), targets (B,) for cross_entropy; both (B, k) for mse and logistic
    """
    if kind == "cross_entropy":
        return F.cross_entropy(outputs, targets, reduction=reduction, label_smoothing=smoothing)
    if kind == "logistic":
        each = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1)
        return each if reduction == "none" else getattr(each, reduction)()
    loss = F.mse_loss(outputs, targets, reduction=reduction)
    return loss if reduction == "mean" else loss / max(1, targets[0].numel() if len(targets) else 1)


def aligned(kind: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs in the shape that the loss takes: a model that squeezes them loses the dimension of
    a single row, and (B,) against (B, 1) would be the loss of all pairs."""
    if kind == "cross_entropy":
        return outputs if outputs.dim() > 1 else outputs.reshape(len(targets), -1)
    if outputs.shape == targets.shape:
        return outputs
    if outputs.numel() != targets.numel():
        raise TrainError(
            f"the model must return {tuple(targets.shape)} to match the targets, got "
            f"{tuple(outputs.shape)}"
        )
    return outputs.reshape(targets.shape)


class Meter:
    """Losses and hits on the device. Outputs are kept as they are and judged many steps at a time:
    argmax, comparison and sums of each step would cost 2 % of a step of 784-256-10 on a CPU."""

    def __init__(self, task: Task):
        self.task = task
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.held = 0
        self.total = torch.zeros(3, dtype=torch.float64, device=task.device)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        self.pending.append((outputs.detach(), targets))
        self.held += outputs.numel()
        if self.held >= HELD:
            self._settle()

    def _settle(self) -> None:
        if not self.pending:
            return
        outputs = torch.cat([pair[0] for pair in self.pending])
        targets = torch.cat([pair[1] for pair in self.pending])
        self.pending, self.held = [], 0
        self.total += judge(self.task.loss, outputs, targets, self.task.label_smoothing)

    def read(self) -> tuple[float, float, int]:
        self._settle()
        loss, right, rows = self.task.world.sum(self.total).tolist()  # the one wait for the device
        self.total = torch.zeros_like(self.total)
        return loss, right, int(rows)


def judge(loss: str, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """(sum of losses, number right, rows) in fp64: the grouping of rows leaves no trace in it."""
    with torch.no_grad():
        outputs = aligned(loss, outputs, targets)
        if outputs.dtype in (torch.float16, torch.bfloat16):
            outputs = outputs.float()
        if loss == "cross_entropy":
            each = loss_of(loss, outputs, targets, "none", smoothing)
            right = (outputs.argmax(1) == targets).sum()
        elif loss == "logistic":
            each = loss_of(loss, outputs, targets, "none")
            right = torch.zeros((), device=outputs.device)
        else:
            each = (outputs - targets).square()
            each = each if each.dim() == 1 else each.flatten(1).mean(1)
            right = torch.zeros((), device=outputs.device)
        rows = torch.tensor(len(targets), device=outputs.device)
        return torch.stack([each.double().sum(), right.double(), rows.double()])


class Autograd:
    """Any model and any optimiser: forward, loss, backward and update as PyTorch runs them."""

    name = "autograd"
    automatic = True

    @staticmethod
    def refuses(task: Task) -> list[str]:
        return []

    def __init__(self, task: Task):
        self.task = task
        self.meter = Meter(task)
        self.optimizer = task.optimizer
        self.forward = task.model
        if task.world.size > 1:
            devices = [task.device] if task.device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(task.model, device_ids=devices)
        fp16 = task.precision == "fp16"
        # Its step() asks on the host whether gradients are finite: fp16 waits for the device there.
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=fp16) if fp16 else None
        self.layers = task.mask_layers
        self.state = torch.tensor([task.seed, 0], dtype=torch.int64, device=task.device)
        self.stream = self.state[1:]
        self.masks: dict[int, dropout_state] = {}
        self.number = 0
        # Without the schedule. A rate that is a tensor is changed in place, as graphs need it.
        self.rates = [float(group["lr"]) for group in task.optimizer.param_groups]

    def set_step(self, number: int) -> None:
        self.number = number
        self.stream.fill_(number * self.layers)

    def _set_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def _outputs(self, inputs: Tensor, first_row: int) -> Tensor:
        if not self.layers:
            return self.forward(inputs)
        if first_row not in self.masks:
            self.masks[first_row] = dropout_state(self.state, row_offset=first_row)
        settings = context.Settings(context.now().backend, (self.masks[first_row],))
        return self.forward(inputs, settings)

    def steps(self, order: Tensor, batch: int) -> None:
        for indices in order.split(batch):
            self.step(indices)

    def step(self, indices: Tensor) -> None:
        """indices (B,) of the global batch; this process takes its share of it."""
        task = self.task
        first, last = task.world.rows(len(indices))
        mine = indices[first:last]
        inputs = task.scaling(task.x.index_select(0, mine))
        self.step_on(inputs, task.y.index_select(0, mine), first, len(indices))

    def step_on(
        self, inputs: Tensor, targets: Tensor, first_row: int = 0, rows: int | None = None
    ) -> None:
        """inputs (b, ...), targets: this process's rows, first_row on, of a batch of `rows`."""
        task = self.task
        if not task.schedule.is_constant:
            self._set_rates(task.schedule.factor(self.number))
        with autocast(task.device, task.precision):
            outputs = aligned(task.loss, self._outputs(inputs, first_row), targets)
            if task.world.size == 1:
                loss = loss_of(task.loss, outputs, targets, "mean", task.label_smoothing)
            else:
                # DDP averages over processes, whose shares may differ: weigh by rows.
                loss = loss_of(task.loss, outputs, targets, "sum", task.label_smoothing)
                loss = loss * (task.world.size / rows)
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
            self._clip()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            if task.clip_norm:
                self.scaler.unscale_(self.optimizer)
            self._clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.number += 1
        if self.layers:
            self.stream.add_(self.layers)
        self.meter.add(outputs, targets)

    def _clip(self) -> None:
        if self.task.clip_norm:
            nn.utils.clip_grad_norm_(self.task.model.parameters(), self.task.clip_norm)

    def read(self) -> tuple[float, float, int]:
        return self.meter.read()

    def judge(self, x: Tensor, y: Tensor) -> None:
        return None

    def sync(self) -> None:
        """The optimiser's groups get back the rates that the schedule multiplies."""
        if not self.task.schedule.is_constant:
            self._set_rates(1.0)

    def scaler_state(self) -> dict | None:
        return None if self.scaler is None else self.scaler.state_dict()

    def load_scaler_state(self, state: dict | None) -> None:
        if self.scaler is not None and state is not None:
            self.scaler.load_state_dict(state)


ENGINES = (Native, Graph, Autograd)  # fastest first


def choose(name: str, task: Task):
    """The engine that was asked for by name, or for auto the first that can run the task."""
    reasons = {engine.name: engine.refuses(task) for engine in ENGINES}
    for engine in ENGINES:
        is_meant = engine.automatic if name == "auto" else engine.name == name
        if is_meant and not reasons[engine.name]:
            return engine(task)
    asked = [r for n, why in reasons.items() if name in ("auto", n) for r in why]
    if not asked:
        raise TrainError(f"unknown engine {name!r}; known: auto, {', '.join(reasons)}")
    raise TrainError(f"engine {name!r} was asked for but cannot be used: {'; '.join(asked)}")


def why(name: str, task: Task) -> Iterable[str]:
    """One line an engine, in the order of choice: what it says to this task."""
    taken = None
    for engine in ENGINES:
        reasons = engine.refuses(task)
        is_meant = engine.automatic if name == "auto" else engine.name == name
        if reasons:
            yield f"{engine.name}: {'; '.join(reasons)}"
        elif is_meant and taken is None:
            taken = engine
            yield f"{engine.name}: taken" + ("" if name == "auto" else ", asked for by name")
        elif name == "auto" and not engine.automatic:
            yield f"{engine.name}: only when asked for by name; nobody has measured it yet"
        else:
            yield f"{engine.name}: can run it"
