"""The `autograd` engine: any model and any optimizer, as PyTorch runs them."""

import torch
from torch import Tensor, nn

from ... import context
from ...functional import dropout_state
from ..losses import LossMeter, aligned, batch_loss
from ..task import Task, autocast


class Autograd:
    """Forward, loss, backward and update of one step after the other."""

    name = "autograd"
    automatic = True

    @staticmethod
    def reasons_against(task: Task) -> list[str]:
        return []

    def __init__(self, task: Task):
        self.task = task
        self.meter = LossMeter(task.loss, task.label_smoothing, task.device, task.world)
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
        backend = self.task.backend or context.now().backend
        settings = context.Settings(backend, (self.masks[first_row],))
        return self.forward(inputs, settings)

    def steps(self, order: Tensor, batch: int) -> None:
        for indices in order.split(batch):
            self.step(indices)

    def step(self, indices: Tensor) -> None:
        """indices (B,) of the global batch; this process takes its share of it."""
        task = self.task
        first, last = task.world.rows(len(indices))
        mine = indices[first:last]
        inputs, targets = task.scaling(task.x.index_select(0, mine)), task.y.index_select(0, mine)
        weights = None if task.row_weights is None else task.row_weights.index_select(0, mine)
        total = len(indices)
        if weights is not None and task.world.size > 1:
            total = task.row_weights.index_select(0, indices).sum().clamp_min(1e-30)
        self.step_on(inputs, targets, first, total, weights)

    def step_on(
        self,
        inputs: Tensor,
        targets: Tensor,
        first_row: int = 0,
        rows: int | Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """inputs (b, ...), targets, weights (b,) or None: this process's rows, first_row on, of a
        batch of `rows`, or of that sum of weights."""
        task = self.task
        if not task.schedule.is_constant:
            self._set_rates(task.schedule.factor(self.number))
        with autocast(task.device, task.precision):
            outputs = aligned(task.loss, self._outputs(inputs, first_row), targets)
            if task.world.size == 1:
                loss = batch_loss(
                    task.loss, outputs, targets, "mean", task.label_smoothing, weights
                )
            else:
                # DDP averages over processes, whose shares may differ: weigh by rows.
                share = batch_loss(
                    task.loss, outputs, targets, "sum", task.label_smoothing, weights
                )
                loss = share * (task.world.size / rows)
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
        if weights is None:
            self.meter.add(outputs, targets)
        else:
            self.meter.add_weighted(loss, outputs, targets)

    def _clip(self) -> None:
        if self.task.clip_norm:
            nn.utils.clip_grad_norm_(self.task.model.parameters(), self.task.clip_norm)

    def read(self) -> tuple[float, float, int]:
        return self.meter.read()

    def evaluate(self, x: Tensor, y: Tensor) -> None:
        return None

    def sync(self) -> None:
        """The optimizer's groups get back the rates that the schedule multiplies."""
        if not self.task.schedule.is_constant:
            self._set_rates(1.0)

    def scaler_state(self) -> dict | None:
        return None if self.scaler is None else self.scaler.state_dict()

    def load_scaler_state(self, state: dict | None) -> None:
        if self.scaler is not None and state is not None:
            self.scaler.load_state_dict(state)
