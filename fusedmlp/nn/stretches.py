"""Finds the stretches [Linear] [activation] [Dropout] among the children of a container, and runs them.

A stretch becomes one op only where that gives what its modules would give by themselves: their exact
classes, no hooks, nothing replaced, parameters that the op has. All else runs through its own
__call__. Does not change a module.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import activations, checks, dispatch, dtypes, functional, rng
from .layers import ReLUSquared

_NONE, _PRELU = activations.NONE, activations.PRELU
_DENSE = torch.strided
_FLOATING = frozenset(dtypes.SUPPORTED)


def _only(name: str, value: float, wanted: float) -> str | None:
    return None if value == wanted else f"{name} = {value:g}: only {wanted:g} has a fused form"


def _elu(m: nn.ELU) -> str | None:
    return _only("alpha", m.alpha, 1)


def _softplus(m: nn.Softplus) -> str | None:
    return _only("beta", m.beta, 1) or _only("threshold", m.threshold, 20)


def _leaky_relu(m: nn.LeakyReLU) -> str | None:
    return None if math.isfinite(m.negative_slope) else "negative_slope is not finite"


def _gelu(m: nn.GELU) -> str | None:
    return None if m.approximate in ("none", "tanh") else f"approximate = {m.approximate!r}"


# Class -> (id, what its present parameters stand against being fused, or None if it has none).
ACTIVATIONS = {
    nn.ReLU: (activations.RELU, None),
    nn.LeakyReLU: (activations.LEAKY_RELU, _leaky_relu),
    nn.PReLU: (_PRELU, None),
    nn.ELU: (activations.ELU, _elu),
    nn.Sigmoid: (activations.SIGMOID, None),
    nn.Tanh: (activations.TANH, None),
    nn.Softplus: (activations.SOFTPLUS, _softplus),
    nn.GELU: (activations.GELU, _gelu),
    nn.SiLU: (activations.SILU, None),
    ReLUSquared: (activations.RELU_SQUARED, None),
}
# Activations whose plain PyTorch derivative does not read the output, while the op's does.
_READS_Y_UNLIKE_TORCH = frozenset(
    {activations.LEAKY_RELU, activations.ELU, activations.SOFTPLUS, activations.RELU_SQUARED}
)


class Masks:
    """What one forward of a container draws its masks from: one state, and the next layer's number."""

    __slots__ = ("state", "row_offset", "layer")

    def __init__(self, layer: int):
        self.state: Tensor | None = None
        self.row_offset = 0
        self.layer = layer

    def draw(self, like: Tensor) -> Tensor:
        """The state on like's device, drawn when it is first needed."""
        if self.state is None or self.state.device != like.device:
            self.state, self.row_offset = functional.draw_state(like)
        return self.state


def is_tampered(m: nn.Module) -> bool:
    """True if calling m does more, or other things, than the forward of its class."""
    return bool(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or m._compiled_call_impl is not None
        or "forward" in m.__dict__
    )


def is_fused_module(m: nn.Module) -> bool:
    """True for FusedLinear, FusedSequential, ...: they take the masks of the container they are in."""
    cls = type(m)
    return hasattr(cls, "fused_forward") and cls.forward is cls.fused_forward


def activation_of(m: nn.Module) -> tuple[int, float] | None:
    """(act, alpha) of the op that m is, or None."""
    entry = ACTIVATIONS.get(type(m))
    if entry is None:
        return None
    act, objection = entry
    if objection is not None and objection(m) is not None:
        return None
    if act == activations.GELU and m.approximate == "tanh":
        return activations.GELU_TANH, 0.0
    return act, (m.negative_slope if act == activations.LEAKY_RELU else 0.0)


def why_not(m: nn.Module) -> str:
    """Why m, a child of a container, is not part of a stretch."""
    if m is None:
        return "it is None"
    cls = type(m)
    candidates = (nn.Linear, nn.Dropout, *ACTIVATIONS)
    if cls in candidates or is_fused_module(m):
        if m._compiled_call_impl is not None:
            return "it was compiled by itself"
        if "forward" in m.__dict__:
            return "its forward was replaced"
        if is_tampered(m):
            return "it has hooks"
        objection = ACTIVATIONS.get(cls, (0, None))[1]
        reason = objection(m) if objection is not None else None
        if reason is None and getattr(m, "inplace", False):
            reason = "it works in place on what comes from outside of the stretch"
        return reason or "there is nothing here to fuse it with"
    if torch.nn.utils.parametrize.is_parametrized(m):
        return "it is parametrised"
    for base in candidates:
        if isinstance(m, base):
            return f"{cls.__name__} is a subclass of {base.__name__}"
    return f"{cls.__name__} has no fused form"


class Single:
    """A child that runs through its own __call__, or a fused module, which takes our masks."""

    __slots__ = ("module", "index", "fused", "layers")

    def __init__(self, module: nn.Module, index: int, fused: bool, layers: int):
        self.module, self.index, self.fused, self.layers = module, index, fused, layers

    def run(self, x, masks: Masks):
        if self.fused:
            return self.module.run_fused(x, masks)
        masks.layer += self.layers
        return self.module(x)


class Stretch:
    """Consecutive children that are one op.

    index, stop  positions of its children in the container
    pays         False where the op would only be what its one module is
    """

    __slots__ = (
        "index", "stop", "modules", "linear", "activation", "dropout", "act", "alpha", "pays", "memo"
    )

    def __init__(self, index, modules, linear, activation, dropout, act, alpha):
        self.index, self.stop = index, index + len(modules)
        self.modules = modules
        self.linear, self.activation, self.dropout = linear, activation, dropout
        self.act, self.alpha = act, alpha
        self.pays = len(modules) > 1 or dropout is not None
        self.memo = None

    def drops(self) -> bool:
        return self.dropout is not None and self.dropout.training and self.dropout.p != 0

    def run_plain(self, x):
        for module in self.modules:
            x = module(x)
        return x

    def run(self, x, masks: Masks):
        layer = masks.layer
        masks.layer = layer + 1
        dropout = self.dropout
        threshold, scale = 0, 1.0
        if dropout is not None and dropout.training:
            p = dropout.p
            if p != 0:
                if not 0 <= p <= 1:
                    return self.run_plain(x)
                threshold, scale = rng.threshold_and_scale(float(p))
        if not self.pays or (self.act == _NONE and threshold == 0):
            return self.run_plain(x)
        linear = self.linear
        if linear is None:
            w, b, like = None, None, x
        else:
            parameters = linear._parameters
            w = parameters["weight"] if "weight" in parameters else linear.weight
            b = parameters["bias"] if "bias" in parameters else linear.bias
        slope = self.activation.weight if self.act == _PRELU else None
        if not can_run(x, w, b, slope):
            self.refuse(x)
            return self.run_plain(x)
        state, row_offset = None, 0
        if threshold:
            state = masks.draw(x)
            row_offset = masks.row_offset
        numbers = (self.act, self.alpha, threshold, scale, layer, row_offset, None)
        if linear is None:
            return functional.run_bias_act_dropout(x, None, slope, state, *numbers)
        return functional.run_linear_act(x, w, b, slope, state, *numbers)
