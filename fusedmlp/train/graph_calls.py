"""One training step as a fixed sequence of calls on tensors that stay where they are: what the
`graph` engine captures. Nothing here reads a value back, so on a GPU nothing waits for it.

    gather     rows of the data by `order`, from `offset` on; scaled as the data's scaling says
    forward    linear_act of each layer, masks from (seed, stream) in `state`
    loss       that of step.loss_of and its gradient; sums go to `totals`
    backward   bias_act_dropout_bwd and two products of each layer
    update     clip_grad_norm_, then torch's fused SGD, Adam or AdamW with the rate in a tensor
    advance    state, offset and index move on to the next step

The ops are those of any backend, on any device: run one by one they are the same step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations, dispatch
from ..activations import SAVE_NOTHING, SAVE_Y, SAVE_Z
from ..ops import BY_BACKEND
from .network import Layer, layers_of

if TYPE_CHECKING:
    from .step import Task

_DTYPES = {"bf16": torch.bfloat16}
# Updates of the optimisers with two moments and a count.
_ADAMS = {torch.optim.Adam: torch._fused_adam_, torch.optim.AdamW: torch._fused_adamw_}


class Calls:
    """The tensors of a task's steps; capacity: rows of the longest `order` that is loaded."""

    def __init__(self, task: Task, capacity: int):
        self.task, self.capacity = task, capacity
        self.layers, _ = layers_of(task.model)
        self.dtype = _DTYPES.get(task.precision, torch.float32)
        device = task.device
        self.state = torch.tensor([task.seed, 0], dtype=torch.int64, device=device)
        self.stream = self.state[1:]
        self.order = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.offset = torch.zeros(1, dtype=torch.int64, device=device)
        self.factors = torch.ones(capacity, dtype=torch.float64, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        self.places = torch.arange(capacity, device=device)
        self.classes = torch.arange(self.layers[-1].linear.out_features, device=device)
        self.adam = _ADAMS.get(type(task.optimizer))
        self.counts: dict[int, Tensor] = {}  # Adam's updates of each parameter, on the device

    def load(self, order: Tensor, factors: Tensor | None) -> None:
        """The rows that the next steps take, (n,) with n <= capacity, and the factors of their
        learning rates; None where all are 1 and always were."""
        self.order[: len(order)].copy_(order)
        self.offset.zero_()
        self.index.zero_()
        if factors is not None:
            self.factors[: len(factors)].copy_(factors)

    def step(self, rows: int) -> None:
        """The next step, on that many rows."""
        task = self.task
        with torch.no_grad():
            at = self.order.index_select(0, self.offset + self.places[:rows])
            inputs = task.scaling(task.x.index_select(0, at)).flatten(1)
            outputs, kept = self.forward(inputs)
            dy = self.loss(outputs, task.y.index_select(0, at))
            grads = self.backward(dy.to(self.dtype), kept)
            self.clip(list(grads.values()))
            self.update(grads)
            self.offset.add_(rows)
            self.index.add_(1)
            self.stream.add_(task.mask_layers)

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple]]:
        """x (B, K) fp32 -> outputs (B, C) fp32, and of each layer what its backward takes."""
        kept = []
        x = x.to(self.dtype)
        for layer in self.layers:
            tensors = [None if t is None else t.to(self.dtype) for t in layer.tensors()]
            w, b, slope = tensors
            threshold, scale = layer.dropping()
            kind = activations.saves(layer.act, layer.alpha, self.dtype, threshold != 0)
            ops = BY_BACKEND[self._backend(layer, len(x), threshold != 0)]
            state = self.state if threshold else None
            numbers = (layer.act, layer.alpha, threshold, scale, layer.number, 0)
            if kind == SAVE_Z:
                y, saved = ops.linear_act_fwd(x, w, b, slope, state, *numbers)
            else:
                y = ops.linear_act_infer(x, w, b, slope, state, *numbers)
                saved = {SAVE_Y: y, SAVE_NOTHING: None}[kind]
            kept.append((layer, ops, x, w, (saved, b, slope, state, *numbers, kind)))
            x = y
        return x.float(), kept

    def _backend(self, layer: Layer, rows: int, dropout: bool) -> str:
        n, k = layer.linear.weight.shape
        route = dispatch.select(
            "linear_act", self.task.device.type, self.dtype, layer.act, dropout, rows, k, n
        )
        # Plain PyTorch's kernels, called by the names of the ops.
        return "reference" if route == dispatch.EAGER else route

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Adds to the totals; returns the gradient (B, C) of the mean over the rows.

        outputs (B, C) fp32, targets (B,) int64 or (B, C) fp32
        """
        rows = len(outputs)
        if self.task.loss == "mse":
            gap = outputs - targets
            each = gap.square().mean(1)
            right = torch.zeros_like(self.totals[1])
            dy = gap * (2 / gap.numel())
        elif self.task.loss == "logistic":
            each = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1)
            right = torch.zeros_like(self.totals[1])
            dy = (outputs.sigmoid() - targets) / rows
        else:
            smoothing = self.task.label_smoothing
            log_p = outputs.log_softmax(1)
            each = -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
            if smoothing:
                each = (1 - smoothing) * each - smoothing * log_p.mean(1)
            right = (outputs.argmax(1) == targets).sum().double()
            dy = log_p.exp() - smoothing / outputs.shape[1]
            hit = self.classes == targets.unsqueeze(1)
            dy = torch.where(hit, dy - (1 - smoothing), dy) / rows
        self.totals[0].add_(each.double().sum())
        self.totals[1].add_(right)
        self.totals[2].add_(rows)
        return dy

    def backward(self, dy: Tensor, kept: list[tuple]) -> dict[int, Tensor]:
        """The gradient of each parameter in fp32, by id of the parameter."""
        grads = {}
        for number, (layer, ops, x, w, (saved, b, slope, *rest)) in enumerate(reversed(kept)):
            needs = b is not None, slope is not None
            dz, db, dslope = ops.bias_act_dropout_bwd(dy, saved, b, slope, *rest, *needs)
            found = dz.t().mm(x), db, dslope
            for parameter, grad in zip(layer.tensors(), found, strict=True):
                if parameter is not None:
                    grads[id(parameter)] = grad.float()
            if number + 1 < len(kept):
                dy = dz.mm(w)
        return grads

    def clip(self, grads: list[Tensor]) -> None:
        """torch.nn.utils.clip_grad_norm_."""
        if self.task.clip_norm:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            factor = torch.clamp(self.task.clip_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(grads, factor)

    def update(self, grads: dict[int, Tensor]) -> None:
        """torch.optim's own kernels, with the learning rate of the step in a tensor."""
        factor = self.factors.index_select(0, self.index).squeeze(0)
        for group in self.task.optimizer.param_groups:
            parameters = group["params"]
            mine = [grads[id(p)] for p in parameters]
            lr = (factor * float(group["lr"])).float()
            decay = float(group["weight_decay"])
            common = dict(weight_decay=decay, maximize=False, grad_scale=None, found_inf=None)
            if self.adam is None:
                torch._fused_sgd_(
                    parameters,
                    mine,
                    self.moments(parameters, "momentum_buffer") if group["momentum"] else [],
                    momentum=float(group["momentum"]),
                    lr=lr,
                    dampening=0.0,
                    nesterov=bool(group["nesterov"]),
                    is_first_step=False,  # the buffers begin as zeros
                    **common,
                )
                continue
            counts = [self.counts[id(p)] for p in parameters]
            torch._foreach_add_(counts, 1)
            beta1, beta2 = group["betas"]
            self.adam(
                parameters,
                mine,
                self.moments(parameters, "exp_avg"),
                self.moments(parameters, "exp_avg_sq"),
                [],
                counts,
                lr=lr,
                beta1=float(beta1),
                beta2=float(beta2),
                eps=float(group["eps"]),
                amsgrad=False,
                **common,
            )

    def moments(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        return [self.task.optimizer.state[p][name] for p in parameters]

    def prepare(self) -> list[Tensor]:
        """Makes what is not there yet of the optimiser's state; returns the tensors that steps
        read and write beside those of this object. A graph lives as long as they do."""
        task, held = self.task, []
        for group in task.optimizer.param_groups:
            names = ("exp_avg", "exp_avg_sq")
            if self.adam is None:
                names = ("momentum_buffer",) if group["momentum"] else ()
            for p in group["params"]:
                state = task.optimizer.state[p] if names else {}
                for name in names:
                    if state.get(name) is None:
                        state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
                held += [p, *(state[name] for name in names)]
                if self.adam is None:
                    continue
                if "step" not in state:
                    state["step"] = torch.tensor(0.0)
                if id(p) not in self.counts:
                    self.counts[id(p)] = torch.zeros((), device=task.device)
        return held

    def count_updates(self) -> None:
        """The device's counts of Adam are set to those of the optimiser's state."""
        for p in (p for group in self.task.optimizer.param_groups for p in group["params"]):
            if id(p) in self.counts:
                self.counts[id(p)].copy_(self.task.optimizer.state[p]["step"])
