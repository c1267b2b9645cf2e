"""Training steps as a fixed sequence of calls on tensors that keep their addresses, which the
`graph` engine captures. Nothing here reads a value back, so nothing waits for the GPU.

once for all steps of a call:
    gather     rows of the data by `order`, from `offset` on; scaled as the data's scaling says
    rates      of the steps, where a schedule changes them
    totals     losses and hits of all steps are added up
    advance    stream, offset and index move on by as many steps
for each step:
    cast       the weights, where products are not in fp32: one call for all
    forward    the op mlp_fwd, masks from (seed, stream) in `state`
    loss       the op cross_entropy, or another loss and its gradient, times the weights of rows
    backward   the op mlp_bwd
    update     clip_grad_norm_, then torch's fused SGD, Adam or AdamW with the rate in a tensor

The ops are those of any backend, on any device: run one by one they are the same steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import compat
from ...backends import choice, registry
from ...ops import BY_BACKEND
from ...spec import activations, layers
from ..task import Task
from .plain_layers import layers_of

# Inputs gathered for one call, or outputs of one layer in an evaluation: 64 MiB in fp32.
MAX_VALUES = 1 << 24
_DTYPES = {"bf16": torch.bfloat16}
# cross_entropy leaves out rows of this label: none of a data set has it.
_IGNORED = -(1 << 63)
# Updates of the optimisers with two moments and a count.
_ADAMS = {torch.optim.Adam: compat.fused_adam_, torch.optim.AdamW: compat.fused_adamw_}


class Calls:
    """The tensors of a task's steps; capacity: rows of the longest `order` that is loaded."""

    def __init__(self, task: Task, capacity: int):
        self.task, self.capacity = task, capacity
        self.layers, _ = layers_of(task.model)
        self.dtype = _DTYPES.get(task.precision, torch.float32)
        device = task.device
        # seed, stream, offset, index: one addition moves them all on
        self.place = torch.tensor([task.seed, 0, 0, 0], dtype=torch.int64, device=device)
        self.state, self.stream = self.place[:2], self.place[1:2]
        self.offset, self.index = self.place[2:3], self.place[3:]
        self.moves: dict[tuple[int, int], Tensor] = {}  # additions to place
        self.order = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.places = torch.arange(capacity, device=device)
        groups = task.optimizer.param_groups
        self.rates = torch.zeros((len(groups), capacity), device=device)
        self.given_rates: list[float] = []
        self.step_rates: list[Tensor] = []  # learning rates of the present step, one a group
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self.evaluated = torch.zeros(3, dtype=torch.float64, device=device)
        self.parameters = [t for layer in self.layers for t in layer.tensors() if t is not None]
        self.is_cast = self.dtype != torch.float32
        with torch.no_grad():
            self.cast = [t.to(self.dtype) for t in self.parameters]
            self.grads = [torch.empty_like(t) for t in self.parameters] if self.is_cast else []
        self.adam = _ADAMS.get(type(task.optimizer))
        self.counts: dict[int, Tensor] = {}  # Adam's updates of each parameter, on the device

    def load(self, order: Tensor, factors: Tensor | None) -> None:
        """Set the rows of the next steps, (n,) with n <= capacity, and the factors of their
        learning rates; None where all factors of the run are 1."""
        self.order[: len(order)].copy_(order)
        self.place[2:].zero_()
        rates = [float(group["lr"]) for group in self.task.optimizer.param_groups]
        if factors is not None:
            made = torch.tensor(rates, dtype=torch.float64).unsqueeze(1) * factors
            self.rates[:, : len(factors)].copy_(made.float())
        elif rates != self.given_rates:
            self.rates.copy_(torch.tensor(rates).unsqueeze(1))
        self.given_rates = rates

    def run(self, rows: int, count: int) -> None:
        """Run the next `count` steps, on `rows` rows each."""
        task = self.task
        with torch.no_grad():
            at = self.order.index_select(0, self.offset + self.places[: rows * count])
            x = self.inputs(task.x.index_select(0, at))
            targets, weights = task.y.index_select(0, at), [None] * count
            if task.row_weights is not None:
                weights = task.row_weights.index_select(0, at).split(rows)
            rates = self.rates
            if not task.schedule.is_constant:
                rates = rates.index_select(1, self.index + self.places[:count])
            outputs, losses = [], []
            parts = zip(x.split(rows), targets.split(rows), weights, strict=True)
            for i, (mine, wanted, weigh) in enumerate(parts):
                self.step_rates = list(rates[:, 0 if task.schedule.is_constant else i])
                found = self._step(mine, wanted, weigh, i)
                for list_, t in zip((outputs, losses), found, strict=True):
                    list_.append(t)
            self.step_rates = []
            self._add_up(self.totals, _joined(outputs), _joined(losses), targets)
            self.place.add_(self._move(rows, count))

    def _move(self, rows: int, count: int) -> Tensor:
        """The addition to `place` after `count` steps. The first call makes it: a capture could not
        copy it from the host."""
        key = rows, count
        if key not in self.moves:
            by = [0, count * self.task.mask_layers, count * rows, count]
            self.moves[key] = torch.tensor(by, dtype=torch.int64, device=self.place.device)
        return self.moves[key]

    def inputs(self, x: Tensor) -> Tensor:
        """Rows (B, ...) as stored -> (B, K) in the dtype of the products."""
        return self.task.scaling(x).flatten(1).to(self.dtype)

    def _step(
        self, x: Tensor, targets: Tensor, weights: Tensor | None, number: int
    ) -> tuple[Tensor, Tensor]:
        """x (B, K), targets (B,) or (B, C), weights (B,) or None; number: of the step in its call.
        Returns the outputs and what `loss` returns first."""
        ops = BY_BACKEND[self.backend(len(x))]
        params, count = self._params(), len(self.layers)
        ints, numbers = self.network(number * self.task.mask_layers)
        state = self.state if any(ints[1 :: layers.INTS]) else None
        kept = ops.mlp_fwd(x, params, state, ints, numbers, 0, True)
        outputs = kept[count - 1]
        losses, dy = self.loss(outputs, targets, self.task.label_smoothing)
        if weights is not None:
            losses, dy = self._weighted(losses, dy, weights)
        needs = layers.bits_of(ints)
        _, *grads = ops.mlp_bwd(
            dy, x, params, state, kept[:count], kept[count:], ints, numbers, 0, needs, False
        )
        if self.is_cast:
            compat.foreach_copy_(self.grads, grads)
            grads = self.grads
        self.clip(grads)
        self.update(dict(zip(map(id, self.parameters), grads, strict=True)))
        return outputs, losses

    def _params(self) -> list[Tensor]:
        if not self.is_cast:
            return self.parameters
        compat.foreach_copy_(self.cast, self.parameters)
        return self.cast

    def network(self, streams: int, is_training: bool = True) -> tuple[list[int], list[float]]:
        """ints and numbers as in spec/layers.py; streams: added to the number of each layer."""
        ints: list[int] = []
        numbers: list[float] = []
        for layer in self.layers:
            threshold, scale = layer.dropping() if is_training else (0, 1.0)
            pairs = zip(layers.BITS, layer.tensors(), strict=True)
            bits = sum(bit for bit, t in pairs if t is not None)
            ints += [layer.act, threshold, layer.stream_offset + streams, bits]
            numbers += [layer.alpha, scale]
        return ints, numbers

    def backend(self, rows: int) -> str:
        """The backend of the whole network, by its first layer."""
        layer, kind = self.layers[0], self.task.device.type
        n, k = layer.linear.weight.shape
        drops = any(one.dropping()[0] for one in self.layers)
        named = choice.named_for_engine(kind, self.dtype, "linear_act")
        chosen = choice.select("linear_act", kind, self.dtype, layer.act, drops, rows, k, n, named)
        # Plain PyTorch's kernels, called by the names of the ops. The extension's op for a CPU is
        # in fp32 only.
        lacks = chosen == "native" and not choice.has_mlp(chosen, kind, self.dtype)
        return "reference" if lacks or chosen == registry.EAGER else chosen

    def loss_backend(self, rows: int) -> str:
        kind, classes = self.task.device.type, self.layers[-1].linear.out_features
        if kind == "cpu" and registry.explicit(None) != "triton":
            return "reference"  # as in autograd/cross_entropy.py
        none = activations.NONE
        op = "cross_entropy"
        named = choice.named_for_engine(kind, self.dtype, op)
        chosen = choice.select(op, kind, self.dtype, none, False, rows, 0, classes, named)
        return "reference" if chosen == registry.EAGER else chosen

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """The values that the loss sums, and the gradient (B, C) of its mean over the rows.

        outputs (B, C), targets (B,) int64 or (B, C) fp32; the first result is the losses (B,) of
        cross_entropy, or the differences (B, C) of mse
        """
        rows = len(outputs)
        if self.task.loss == "mse":
            gap = outputs.float() - targets
            return gap, (gap * (2 / gap.numel())).to(self.dtype)
        if self.task.loss == "logistic":
            z = outputs.float()
            losses = F.binary_cross_entropy_with_logits(z, targets, reduction="none").sum(1)
            return losses, ((z.sigmoid() - targets) / rows).to(self.dtype)
        ops = BY_BACKEND[self.loss_backend(rows)]
        return ops.cross_entropy(outputs, targets, smoothing, _IGNORED, 1 / rows)

    def _weighted(self, losses: Tensor, dy: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the weighted mean; rows that all weigh nothing have no gradient."""
        total = weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
        factors = weights / total * len(weights)
        # The differences of mse are squared later.
        losses = losses * (factors.sqrt().unsqueeze(1) if self.task.loss == "mse" else factors)
        return losses, (dy * factors.unsqueeze(1)).to(dy.dtype)

    def _add_up(self, totals: Tensor, outputs: Tensor, losses: Tensor, targets: Tensor) -> None:
        """Add the sum of losses and the number right to the first two of totals."""
        if self.task.loss == "mse":
            totals[0].add_(losses.square().mean(1).sum(dtype=torch.float64))
        else:
            totals[0].add_(losses.sum(dtype=torch.float64))
        if self.task.loss == "cross_entropy":
            totals[1].add_((outputs.argmax(1) == targets).sum())

    def evaluate(self, x: Tensor, y: Tensor) -> None:
        """Write (sum of losses, number right, rows) to `evaluated`: in evaluation mode and without
        label smoothing, over rows x (n, ...) as stored and their targets."""
        widest = max(max(layer.linear.weight.shape) for layer in self.layers)
        part = max(1, MAX_VALUES // widest)
        with torch.no_grad():
            self.evaluated.zero_()
            params, (ints, numbers) = self._params(), self.network(0, is_training=False)
            for rows, targets in zip(x.split(part), y.split(part), strict=True):
                ops = BY_BACKEND[self.backend(len(rows))]
                inputs = self.inputs(rows)
                (outputs,) = ops.mlp_fwd(inputs, params, None, ints, numbers, 0, False)
                losses, _ = self.loss(outputs, targets, 0.0)
                self._add_up(self.evaluated, outputs, losses, targets)
            self.evaluated[2].fill_(len(x))

    def clip(self, grads: list[Tensor]) -> None:
        """The same as torch.nn.utils.clip_grad_norm_, without a wait."""
        if self.task.clip_norm:
            norm = torch.linalg.vector_norm(torch.stack(compat.foreach_norm(grads)))
            factor = torch.clamp(self.task.clip_norm / (norm + 1e-6), max=1.0)
            compat.foreach_mul_(grads, factor)

    def update(self, grads: dict[int, Tensor]) -> None:
        """One update by torch.optim's fused kernels, with the step's learning rate in a tensor."""
        for group, lr in zip(self.task.optimizer.param_groups, self.step_rates, strict=True):
            parameters = group["params"]
            mine = [grads[id(p)] for p in parameters]
            decay = float(group["weight_decay"])
            common = dict(weight_decay=decay, maximize=False, grad_scale=None, found_inf=None)
            if self.adam is None:
                compat.fused_sgd_(
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
            compat.foreach_add_(counts, 1)
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
        """Make the missing entries of the optimizer's state; return the tensors that steps read and
        write beside those of this object. A graph is valid as long as they exist."""
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
        """Set the device's counts of Adam's updates to those of the optimizer's state."""
        for p in (p for group in self.task.optimizer.param_groups for p in group["params"]):
            if id(p) in self.counts:
                self.counts[id(p)].copy_(self.task.optimizer.state[p]["step"])


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
