"""Training on a CPU by two calls of a backend a step, without autograd and torch.optim.

Parameters, gradient and moments are one vector each: scikit-learn's coefs, then its intercepts,
then slopes. With scikit-learn's pairs of output activation and loss, the gradient of a row's loss
by the outputs is the prediction minus the target.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import reference, registry
from ..nn import FusedMLP
from ..ops import BY_BACKEND
from ..spec import layers
from ..spec.layers import Epilogue, Layer
from ..train.engines.autograd import Autograd
from ..train.engines.plain_layers import layers_of
from ..train.losses import row_losses
from ..train.task import Task
from .weights import trained


class Passes:
    """A network forward and backward over rows. Its parameters become views of the vector `flat`.

    net      on a CPU, in fp64 or fp32
    kind     of loss: one of train.losses.KINDS
    backend  'native', which computes in fp32, 'reference', or None: native where it can
    """

    def __init__(self, net: FusedMLP, kind: str, backend: str | None):
        self.kind = kind
        weights, rest = trained(net)
        self.ordered = [*weights, *rest]
        self.weights = sum(w.numel() for w in weights)  # so many of the first elements are weights
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.ordered])
        for p, view in zip(self.ordered, self.views(self.flat), strict=True):
            p.data = view
        found = []
        for layer in layers_of(net)[0]:
            w, b, slope = layer.tensors()
            numbers = (layer.act, layer.alpha, *layer.dropping(), layer.stream_offset, 0)
            found.append(Layer(w, Epilogue(b, slope, None, *numbers)))
        params, self.ints, self.numbers = layers.pack(found)
        places = {id(p): place for place, p in enumerate(params)}
        self.places = [places[id(p)] for p in self.ordered]
        self.params = [p.detach() for p in params]
        self.needs = layers.bits_of(self.ints)
        if backend is None and registry.is_usable("native", "cpu", self.flat.dtype, "mlp"):
            backend = "native"
        self.ops = BY_BACKEND["native"] if backend == "native" else reference

    def views(self, vector: Tensor) -> list[Tensor]:
        """The part of each parameter, in the order of `ordered`, of a vector like `flat`."""
        parts = vector.split([p.numel() for p in self.ordered])
        return [part.view(p.shape) for part, p in zip(parts, self.ordered, strict=True)]

    def __call__(
        self, x: Tensor, y: Tensor, weights: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs (n, outputs) before the output activation, and the gradient of the mean loss like
        `flat`: the mean over rows, or weighted by `weights` (n,).

        state  (2,) int64 seed and stream of the dropout masks, or None without dropout
        """
        found = self.ops.mlp_fwd(x, self.params, state, self.ints, self.numbers, 0, True)
        count = len(self.needs)
        ys, preacts = found[:count], found[count:]
        dz = self._output_gradient(ys[-1], y)
        if weights is None:
            dz /= max(1, len(dz))
        else:
            least = torch.finfo(weights.dtype).tiny
            dz *= (weights / weights.sum().clamp_min(least))[:, None]
        given = dz, x, self.params, state, ys, preacts, self.ints, self.numbers, 0
        grads = self.ops.mlp_bwd(*given, self.needs, False)[1:]
        return ys[-1], torch.cat([grads[place].reshape(-1) for place in self.places])

    def _output_gradient(self, z: Tensor, y: Tensor) -> Tensor:
        if self.kind == "cross_entropy":
            dz = torch.softmax(z, 1)
            at = y[:, None]
            return dz.scatter_add_(1, at, dz.new_full((1, 1), -1.0).expand(at.shape))
        if self.kind == "mse":
            return (z - y).mul_(2.0 / z.shape[1])
        return (torch.sigmoid(z) if self.kind == "logistic" else torch.exp(z)).sub_(y)


class Direct(Autograd):
    """The `autograd` engine with forward and backward by Passes, and the updates of its optimizer,
    EpsilonHatAdam or SGD, on whole vectors. The optimizer's state is views of those vectors."""

    name = "direct"

    @torch.no_grad()
    def __init__(self, task: Task):
        super().__init__(task)
        self.passes = Passes(task.model, task.loss, task.backend)
        state, ordered = self.optimizer.state, self.passes.ordered
        self.is_adam = "betas" in self.optimizer.param_groups[0]
        names = ("exp_avg", "exp_avg_sq") if self.is_adam else ("momentum_buffer",)
        self.updates = int(state[ordered[0]].get("step", 0))
        self.moments = []
        for name in names:
            vector = torch.zeros_like(self.passes.flat)
            self.moments.append(vector)
            for p, view in zip(ordered, self.passes.views(vector), strict=True):
                if state[p].get(name) is not None:
                    view.copy_(state[p][name])
                state[p][name] = view

    @torch.no_grad()
    def step_on(
        self,
        inputs: Tensor,
        targets: Tensor,
        first_row: int = 0,
        rows: int | Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        state = self.state if self.layers else None
        outputs, gradient = self.passes(inputs, targets, weights, state)
        self._update(gradient)
        self.number += 1
        if self.layers:
            self.stream.add_(self.layers)
        if weights is None:
            self.meter.add(outputs, targets)
        else:
            total = (row_losses(self.task.loss, outputs, targets) * weights).sum()
            loss = total / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
            self.meter.add_weighted(loss, outputs, targets)

    def _update(self, gradient: Tensor) -> None:
        """One update by the formulas of EpsilonHatAdam and torch.optim.SGD."""
        flat, count, group = self.passes.flat, self.passes.weights, self.optimizer.param_groups[0]
        self.updates += 1
        gradient[:count].add_(flat[:count], alpha=group["weight_decay"])
        if self.is_adam:
            beta1, beta2 = group["betas"]
            mean, square = self.moments
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            corrected = math.sqrt(1 - beta2**self.updates) / (1 - beta1**self.updates)
            flat.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-group["lr"] * corrected)
            return
        momentum = group["momentum"]
        if momentum:
            # torch.optim starts from a copy of the first gradient: 0 * momentum + it.
            buffer = self.moments[0].mul_(momentum).add_(gradient)
            gradient = gradient.add_(buffer, alpha=momentum) if group["nesterov"] else buffer
        flat.add_(gradient, alpha=-group["lr"])

    def sync(self) -> None:
        """The optimizer's state gets the number of updates."""
        if self.is_adam:
            for p in self.passes.ordered:
                self.optimizer.state[p]["step"] = torch.tensor(float(self.updates))
