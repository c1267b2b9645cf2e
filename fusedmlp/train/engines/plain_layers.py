"""The layers of a network, for the engines that do not run its modules, and the reasons why an
engine cannot train it.

Nothing is run and no module is changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import compat
from ...nn import FusedSequential
from ...nn.groups import LayerGroup, find_groups, is_tampered, reasons_against
from ...spec import activations, philox
from ..optim import EpsilonHatAdam
from ..task import Task

_LOSSES = ("cross_entropy", "mse", "logistic")
# Settings of torch.optim that have another formula, and what they must be.
_PLAIN_ADAM = {"amsgrad": False, "maximize": False, "differentiable": False, "capturable": False}
_PLAIN_SETTINGS = {
    torch.optim.SGD: {"dampening": 0, "maximize": False, "differentiable": False},
    torch.optim.AdamW: _PLAIN_ADAM,
    torch.optim.Adam: _PLAIN_ADAM | {"decoupled_weight_decay": False},
    EpsilonHatAdam: _PLAIN_ADAM | {"decoupled_weight_decay": False},
}
_SHARED_SETTINGS = ("momentum", "nesterov", "betas", "eps")  # the same for all groups
_LAYER_RULE = "only an activation or Dropout that follows a Linear can be part of its layer"


@dataclass
class Layer:
    """y = drop(act(x w^T + b)); its masks have the stream of the step plus `stream_offset`."""

    linear: nn.Linear
    act: int
    alpha: float
    slope: Tensor | None
    dropout: nn.Dropout | None
    stream_offset: int

    def tensors(self) -> tuple[Tensor | None, ...]:
        """(w, b, slope), None where there is none."""
        return self.linear.weight, self.linear.bias, self.slope

    def dropping(self) -> tuple[int, float]:
        """(threshold, scale) of the Dropout as it is set now."""
        dropout = self.dropout
        if dropout is None or not dropout.training:
            return 0, 1.0
        return philox.threshold_and_scale(float(dropout.p))

    def saves(self, dropout: bool) -> int:
        return activations.saves(self.act, self.alpha, torch.float32, dropout)


def layers_of(model: nn.Module) -> tuple[list[Layer], list[str]]:
    """(layers of a chain of Linear, activation, Dropout; reasons why the model is not one)."""
    kind = type(model)
    if kind.forward not in (nn.Sequential.forward, FusedSequential.forward):
        return [], [f"the model must be a Sequential or a FusedMLP, got {kind.__name__}"]
    if is_tampered(model) or compat.has_any_global_hook():
        return [], ["the model has hooks"]
    children = list(model.children())
    while children and type(children[0]) in (nn.Flatten, nn.Identity):
        first = children.pop(0)
        if type(first) is nn.Flatten and (first.start_dim, first.end_dim) != (1, -1):
            return [], ["its Flatten must be one from dimension 1 to the last"]
        if is_tampered(first):
            return [], ["its first module has hooks"]
    layers, reasons = [], []
    offset = model.stream_offset if isinstance(model, FusedSequential) else 0
    for item in find_groups(children):
        if type(item) is not LayerGroup:
            name = type(item.module).__name__
            why = "; ".join(reasons_against(item.module)) or _LAYER_RULE
            reasons.append(f"{name} ({item.index}) is no part of a layer: {why}")
        elif item.linear is None:
            names = ", ".join(type(m).__name__ for m in item.modules)
            reasons.append(f"{names} ({item.index}) does not follow a Linear; {_LAYER_RULE}")
        else:
            slope = item.activation.weight if item.act == activations.PRELU else None
            layer = Layer(item.linear, item.act, item.alpha, slope, item.dropout, offset)
            layers.append(layer)
            offset += 1
    if not layers and not reasons:
        reasons.append("the model has no Linear")
    for before, after in zip(layers, layers[1:], strict=False):
        if before.linear.out_features != after.linear.in_features:
            reasons.append("its Linears do not fit one another")
    if not isinstance(model, FusedSequential) and any(
        layer.dropout is not None and layer.dropout.p > 0 for layer in layers
    ):
        reasons.append(
            "an nn.Sequential draws its dropout masks from torch's generator; make it a "
            "FusedSequential with fusedmlp.fuse"
        )
    return layers, reasons + [r for layer in layers for r in _reasons_against_layer(layer)]


def _reasons_against_layer(layer: Layer) -> list[str]:
    linear, slope = layer.linear, layer.slope
    if linear.in_features == 0 or linear.out_features == 0:
        return ["a Linear without inputs or outputs"]
    if layer.dropout is not None and not 0 <= layer.dropout.p <= 1:
        return [f"dropout must be between 0 and 1, got {layer.dropout.p}"]
    if slope is not None and slope.numel() not in (1, linear.out_features):
        return ["a PReLU must have one slope, or one for each column"]
    return [] if math.isfinite(layer.alpha) else ["a slope is not finite"]


def reasons_against_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: str = "cpu"
) -> list[str]:
    """Reasons why the parameters, in fp32 on devices of this type, cannot be updated in place."""
    named = list(model.named_parameters(remove_duplicate=False))
    reasons = []
    if len({id(p) for _, p in named}) != len(named) or len(
        {p.untyped_storage().data_ptr() for _, p in named}
    ) != len(named):
        reasons.append("parameters share memory")
    for name, p in named:
        if not p.requires_grad:
            reasons.append(f"{name} is frozen")
        elif p.dtype != torch.float32 or p.device.type != device or p.layout != torch.strided:
            reasons.append(f"{name} must be fp32 on {device}, got {p.dtype} on {p.device}")
        elif not p.is_contiguous() or type(p) is not nn.Parameter:
            reasons.append(f"{name} must be a contiguous plain parameter")
        elif p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            reasons.append(f"{name} has hooks")
    optimized = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if sorted(optimized) != sorted({id(p) for _, p in named}):
        reasons.append("the optimiser must hold the parameters of the model, all and no others")
    return reasons


def reasons_against_optimizer(optimizer: torch.optim.Optimizer) -> list[str]:
    plain = _PLAIN_SETTINGS.get(type(optimizer))
    if plain is None:
        return [f"the optimiser must be SGD, Adam or AdamW, got {type(optimizer).__name__}"]
    groups = optimizer.param_groups
    reasons = [
        f"{type(optimizer).__name__} with {name}={group[name]}"
        for group in groups
        for name, wanted in plain.items()
        if group.get(name, wanted) != wanted
    ]
    reasons += [
        f"{type(optimizer).__name__} with a tensor for {name}"
        for name in ("lr", "betas", "weight_decay")
        if any(_has_tensor(group.get(name)) for group in groups)
    ]
    if any(group.get(name) != groups[0].get(name) for group in groups for name in _SHARED_SETTINGS):
        reasons.append("parameter groups may differ in lr and weight_decay only")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        reasons.append("the optimiser has hooks")
    return reasons


def _has_tensor(setting) -> bool:
    settings = setting if isinstance(setting, tuple) else (setting,)
    return any(isinstance(s, Tensor) for s in settings)


def reasons_against_data(task: Task, layers: list[Layer]) -> list[str]:
    if task.x is None:
        return ["its data must be tensors, these come from a loader"]
    reasons = []
    if task.loss not in _LOSSES:
        reasons.append(f"the loss must be one of {', '.join(_LOSSES)}, got {task.loss}")
    return reasons + reasons_against_rows(task, task.x, task.y, layers)


def reasons_against_rows(task: Task, x: Tensor, y: Tensor, layers: list[Layer]) -> list[str]:
    first, last = layers[0].linear, layers[-1].linear
    reasons = []
    plain = task.scaling.divisor == 1.0 and task.scaling.mean is None
    if x.dtype not in (torch.float32, torch.uint8) or (plain and x.dtype == torch.uint8):
        reasons.append(f"rows must be fp32, or uint8 with a divisor, got {x.dtype}")
    if not x.is_contiguous() or not y.is_contiguous():
        reasons.append("data must be contiguous")
    flattens = type(next(task.model.children())) is torch.nn.Flatten
    if len(x) == 0 or x[0].numel() != first.in_features or (x.dim() != 2 and not flattens):
        reasons.append(f"rows must have {first.in_features} values, got {tuple(x.shape[1:])}")
    wanted = (len(x),) if task.loss == "cross_entropy" else (len(x), last.out_features)
    dtype = torch.int64 if task.loss == "cross_entropy" else torch.float32
    if tuple(y.shape) != wanted or y.dtype != dtype:
        reasons.append(f"targets must be {wanted} of {dtype}, got {tuple(y.shape)} of {y.dtype}")
    return reasons
