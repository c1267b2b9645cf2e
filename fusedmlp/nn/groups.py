"""Finds the groups [Linear] [activation] [Dropout] among the children of a container.

A group becomes one op only where that gives what its modules would give by themselves: exact
classes, no hooks, nothing replaced, parameters that the op has. All else runs through its own
__call__. This file changes no module and runs none.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import compat
from ..spec import activations, philox
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
        or compat.is_compiled(m)
        or "forward" in m.__dict__
    )


def is_fused_module(m: nn.Module) -> bool:
    """True for FusedLinear, FusedSequential, ...: they take the masks of the container around."""
    cls = type(m)
    return hasattr(cls, "_fused_forward") and cls.forward is cls._fused_forward


def is_candidate(m: nn.Module) -> bool:
    """True for classes that can be part of a group, or take its masks."""
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


class LayerGroup:
    """Consecutive children that run as one op.

    index       position of the first one among the children
    modules     all of them, in order
    act, alpha  of the op
    """

    __slots__ = ("_dropping", "act", "activation", "alpha", "dropout", "index", "linear", "modules")

    def __init__(self, index, linear, activation, dropout, act, alpha):
        self.index = index
        self.modules = [m for m in (linear, activation, dropout) if m is not None]
        self.linear, self.activation, self.dropout = linear, activation, dropout
        self.act, self.alpha = act, alpha
        self._dropping = 0.0, 0, 1.0

    @property
    def pays(self) -> bool:
        """False where the op would be no more than its one module."""
        return self.dropout is not None or len(self.modules) > 1

    @property
    def op(self) -> str:
        return "bias_act_dropout" if self.linear is None else "linear_act"

    def dropping(self) -> tuple[int, float] | None:
        """(threshold, scale) at this moment; None for a p that F.dropout would refuse."""
        dropout = self.dropout
        if dropout is None or not dropout.training or dropout.p == 0:
            return 0, 1.0
        p = dropout.p
        if not 0 < p <= 1:
            return None
        if type(p) is not float:
            p = float(p)  # a tensor can be changed in place
        if self._dropping[0] != p:
            self._dropping = p, *philox.threshold_and_scale(p)
        return self._dropping[1:]

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Weight, bias and slope at this moment."""
        w = b = slope = None
        if self.linear is not None:
            # linear.weight is a search in Python; functional_call and others may put it elsewhere.
            own = self.linear._parameters
            w = own["weight"] if "weight" in own else self.linear.weight
            b = own["bias"] if "bias" in own else self.linear.bias
        if self.act == activations.PRELU:
            slope = self.activation.weight
        return w, b, slope

    def run_plain(self, x):
        """The modules one after the other."""
        for module in self.modules:
            x = module(x)
        return x


class Opaque:
    """A child that runs by itself.

    fused   it is a fused module and takes the masks of the container
    layers  how many stream offsets are set aside for it
    """

    __slots__ = ("fused", "index", "layers", "module")

    def __init__(self, index: int, module: nn.Module, fused: bool, layers: int):
        self.index, self.module, self.fused, self.layers = index, module, fused, layers


def find_groups(children: list[nn.Module]) -> list[LayerGroup | Opaque]:
    """The children as groups and single modules, in order.

    A Linear by itself is a group too, so that stream offsets are counted as Linears are.
    """
    groups = []
    i, n = 0, len(children)
    while i < n:
        group = _group_at(children, i)
        if group is None:
            m = children[i]
            fused = m is not None and is_fused_module(m)
            layers = m._layer_count() if fused else 0
            groups.append(Opaque(i, m, fused and not is_tampered(m), layers))
            i += 1
        else:
            groups.append(group)
            i += len(group.modules)
    return groups


def _group_at(children: list[nn.Module], i: int) -> LayerGroup | None:
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
    return LayerGroup(start, linear, activation, dropout, act, alpha)


def _works_in_place(m: nn.Module | None) -> bool:
    return m is not None and bool(getattr(m, "inplace", False))


def reasons_against(m: nn.Module | None) -> list[str]:
    """Why the child m cannot be part of a group; empty where only its neighbours are the reason."""
    if m is None:
        return ["it is None"]
    cls = type(m)
    if is_candidate(m):
        if "forward" in m.__dict__:
            return ["its forward was replaced"]
        if compat.is_compiled(m):
            return ["it was compiled by itself"]
        if is_tampered(m):
            return ["it has hooks"]
        objection = ACTIVATIONS.get(cls, (0, None))[1]
        found = objection(m) if objection is not None else None
        return [found] if found else []
    if parametrize.is_parametrized(m):
        return ["it is parametrised"]
    if hasattr(cls, "_fused_forward"):
        return [f"{cls.__name__} has a forward of its own"]
    for base in CANDIDATES:
        if isinstance(m, base):
            return [f"{cls.__name__} is a subclass of {base.__name__}"]
    return [f"{cls.__name__} has no fused form"]


def reasons_against_container(m: nn.Sequential) -> list[str]:
    """Why the container m is not made a FusedSequential."""
    if type(m) is not nn.Sequential and not is_fused_module(m):
        return [f"left alone: {type(m).__name__} is a subclass of nn.Sequential"]
    if "forward" in m.__dict__:
        return ["left alone: its forward was replaced"]
    return []
