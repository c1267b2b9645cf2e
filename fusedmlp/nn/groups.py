"""Finds the stretches [Linear] [activation] [Dropout] among the children of a container.

A stretch becomes one op only where that gives what its modules would give by themselves: exact
classes, no hooks, nothing replaced, parameters that the op has. All else runs through its own
__call__. Does not change a module, and does not run anything.
"""

from __future__ import annotations

import math

from torch import nn
from torch.nn.utils import parametrize

from ..spec import activations
from .modules import ReLUSquared


def _only(name: str, value: float, wanted: float) -> str | None:
    return None if value == wanted else f"{name} is {value:g}, only {wanted:g} has a fused form"


def _elu(m: nn.ELU) -> str | None:
    return _only("alpha", m.alpha, 1)


def _softplus(m: nn.Softplus) -> str | None:
    return _only("beta", m.beta, 1) or _only("threshold", m.threshold, 20)


def _leaky_relu(m: nn.LeakyReLU) -> str | None:
    return None if math.isfinite(m.negative_slope) else "negative_slope is not finite"


def _gelu(m: nn.GELU) -> str | None:
    return None if m.approximate in ("none", "tanh") else f"approximate is {m.approximate!r}"


# Exact class -> (id, what its present parameters have against being fused; None: no parameters).
ACTIVATIONS = {
    nn.ReLU: (activations.RELU, None),
    nn.LeakyReLU: (activations.LEAKY_RELU, _leaky_relu),
    nn.PReLU: (activations.PRELU, None),
    nn.ELU: (activations.ELU, _elu),
    nn.Sigmoid: (activations.SIGMOID, None),
    nn.Tanh: (activations.TANH, None),
    nn.Softplus: (activations.SOFTPLUS, _softplus),
    nn.GELU: (activations.GELU, _gelu),
    nn.SiLU: (activations.SILU, None),
    ReLUSquared: (activations.RELU_SQUARED, None),
}
CANDIDATES = (nn.Linear, nn.Dropout, *ACTIVATIONS)

# PyTorch's derivative reads the input of these, the op's reads the output: nobody may change it.
_ONLY_WE_READ_Y = (
    activations.LEAKY_RELU,
    activations.ELU,
    activations.SOFTPLUS,
    activations.RELU_SQUARED,
)


def is_tampered(m: nn.Module) -> bool:
    """True if calling m is more, or something else, than the forward of its class."""
    return bool(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or m._compiled_call_impl is not None
        or "forward" in m.__dict__
    )


def is_fused_module(m: nn.Module) -> bool:
    """True for FusedLinear, FusedSequential, ...: they take the masks of the container around."""
    cls = type(m)
    return hasattr(cls, "fused_forward") and cls.forward is cls.fused_forward


def is_candidate(m: nn.Module) -> bool:
    """True for classes that can be part of a stretch, or take its masks."""
    return type(m) in CANDIDATES or is_fused_module(m)


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
    return act, (float(m.negative_slope) if act == activations.LEAKY_RELU else 0.0)


class Stretch:
    """Consecutive children that run as one op.

    index       position of the first one among the children
    modules     all of them, in order
    act, alpha  of the op
    dropping    (p, threshold, scale) of the last call that dropped
    memo        (what a call was like, the backend that suits it or None for plain PyTorch)
    """

    __slots__ = (
        "act",
        "activation",
        "alpha",
        "dropout",
        "dropping",
        "index",
        "linear",
        "memo",
        "modules",
    )

    def __init__(self, index, linear, activation, dropout, act, alpha):
        self.index = index
        self.modules = [m for m in (linear, activation, dropout) if m is not None]
        self.linear, self.activation, self.dropout = linear, activation, dropout
        self.act, self.alpha = act, alpha
        self.dropping = 0.0, 0, 1.0
        self.memo = None

    @property
    def pays(self) -> bool:
        """False where the op would be no more than its one module."""
        return self.dropout is not None or len(self.modules) > 1


class Single:
    """A child that runs by itself.

    fused   it is a fused module and takes the masks of the container
    layers  how many layer numbers are set aside for it
    """

    __slots__ = ("fused", "index", "layers", "module")

    def __init__(self, index: int, module: nn.Module, fused: bool, layers: int):
        self.index, self.module, self.fused, self.layers = index, module, fused, layers


def find(children: list[nn.Module]) -> list[Stretch | Single]:
    """The children as stretches and single modules, in order.

    A Linear by itself is a stretch too, so that layers are numbered as Linears are.
    """
    items = []
    i, n = 0, len(children)
    while i < n:
        stretch = _stretch_at(children, i)
        if stretch is None:
            m = children[i]
            fused = m is not None and is_fused_module(m)
            layers = m.layer_count() if fused else 0
            items.append(Single(i, m, fused and not is_tampered(m), layers))
            i += 1
        else:
            items.append(stretch)
            i += len(stretch.modules)
    return items


def _stretch_at(children: list[nn.Module], i: int) -> Stretch | None:
    linear = activation = dropout = None
    act, alpha = activations.NONE, 0.0
    n = len(children)
    if type(children[i]) is nn.Linear and not is_tampered(children[i]):
        linear = children[i]
        i += 1
    start = i - (linear is not None)
    if i < n:
        found = activation_of(children[i])
        if found is not None and not is_tampered(children[i]):
            activation = children[i]
            act, alpha = found
            i += 1
    if i < n and type(children[i]) is nn.Dropout and not is_tampered(children[i]):
        dropout = children[i]
        i += 1
    if linear is None and _works_in_place(activation if activation is not None else dropout):
        # Its input belongs to someone else, who may count on its being changed.
        return None
    if activation is not None and i < n and _works_in_place(children[i]):
        # The next module overwrites our output: leave apart what needs it in backward.
        apart, dropout = dropout, None
        if act in _ONLY_WE_READ_Y and (apart is None or _works_in_place(apart)):
            activation, act, alpha = None, activations.NONE, 0.0
    if linear is None and dropout is None:
        return None
    return Stretch(start, linear, activation, dropout, act, alpha)


def _works_in_place(m: nn.Module | None) -> bool:
    return m is not None and bool(getattr(m, "inplace", False))


def why_not(m: nn.Module | None, alone: str) -> str:
    """Why the child m runs by itself; `alone` if nothing but its neighbours is the reason."""
    if m is None:
        return "it is None"
    cls = type(m)
    if is_candidate(m):
        if "forward" in m.__dict__:
            return "its forward was replaced"
        if m._compiled_call_impl is not None:
            return "it was compiled by itself"
        if is_tampered(m):
            return "it has hooks"
        objection = ACTIVATIONS.get(cls, (0, None))[1]
        return (objection(m) if objection is not None else None) or alone
    if parametrize.is_parametrized(m):
        return "it is parametrised"
    if hasattr(cls, "fused_forward"):
        return f"{cls.__name__} has a forward of its own"
    for base in CANDIDATES:
        if isinstance(m, base):
            return f"{cls.__name__} is a subclass of {base.__name__}"
    return f"{cls.__name__} has no fused form"


def why_left_alone(m: nn.Sequential) -> str | None:
    """Why the container m is not made a FusedSequential, or None."""
    if type(m) is not nn.Sequential and not is_fused_module(m):
        return f"left alone: {type(m).__name__} is a subclass of nn.Sequential"
    if "forward" in m.__dict__:
        return "left alone: its forward was replaced"
    return None
