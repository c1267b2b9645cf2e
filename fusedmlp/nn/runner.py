"""Runs the items of a container one after the other.

Every choice here falls to the modules themselves where an op cannot do what they would do, unless a
backend was asked for by name. Which child belongs to which stretch is decided in groups.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..backends import choice, registry
from ..spec import activations, checks, dtypes, philox
from . import direct, network
from .groups import Single, Stretch, is_candidate, is_fused_module, is_tampered
from .masks import Masks

_NONE, _PRELU, _SOFTPLUS = activations.NONE, activations.PRELU, activations.SOFTPLUS
_TENSORS = functional.TENSORS


def run(items: list[Stretch | Single], x, masks: Masks, steps: list | None = None):
    """The items one after the other; what is called for each goes to `steps`, as plan.py has it."""
    at = 0
    while at < len(items):
        item = items[at]
        at += 1
        if type(item) is Single:
            x = _run_single(item, x, masks, steps)
            continue
        layer = masks.layer
        net = None if masks.traced else network.find(items, at - 1, x, masks)
        if net is not None:
            at += len(net.stretches) - 1
            x = net(x, masks)
            masks.layer = layer + len(net.stretches)
        else:
            x, fused = run_stretch(item, x, masks)
        if steps is None:
            continue
        if net is not None:
            steps.append((True, net))
        elif fused:
            steps.append((True, _Again(item, layer)))
        else:
            steps += [(False, _as_function(m)) for m in item.modules if not _does_nothing(m)]
    return x


def _run_single(item: Single, x, masks: Masks, steps: list | None):
    m, layer = item.module, masks.layer
    if item.fused:
        if steps is not None:
            steps.append((True, _Nested(m, layer)))
        return m.run_fused(x, masks)
    masks.layer = layer + item.layers
    if steps is not None:
        steps.append((False, _as_function(m)))
    return m(x)


def _does_nothing(m: nn.Module) -> bool:
    return type(m) is nn.Dropout and not (m.training and m.p)


def _as_function(m: nn.Module):
    known = is_candidate(m) and not is_fused_module(m) and not is_tampered(m)
    return direct.function(m) if known else m


class _Again:
    """A stretch as a step of a program."""

    __slots__ = ("layer", "stretch")

    def __init__(self, stretch: Stretch, layer: int):
        self.stretch, self.layer = stretch, layer

    def __call__(self, x, masks: Masks):
        masks.layer = self.layer
        return run_stretch(self.stretch, x, masks)[0]


class _Nested:
    """A fused module inside, as a step of a program."""

    __slots__ = ("layer", "module")

    def __init__(self, module: nn.Module, layer: int):
        self.module, self.layer = module, layer

    def __call__(self, x, masks: Masks):
        masks.layer = self.layer
        return self.module.run_fused(x, masks)


def _run_plain(stretch: Stretch, x):
    for module in stretch.modules:
        x = module(x)
    return x


def run_stretch(stretch: Stretch, x, masks: Masks) -> tuple[Tensor, bool]:
    """Its output, and whether an op made it."""
    layer = masks.layer
    masks.layer = layer + 1
    act, linear, dropout = stretch.act, stretch.linear, stretch.dropout
    threshold, scale = 0, 1.0
    if dropout is not None and dropout.training:
        p = dropout.p
        if p != 0:
            if not 0 < p <= 1:
                return _run_plain(stretch, x), False  # F.dropout says what is wrong.
            if stretch.dropping[0] != p:
                stretch.dropping = p, *philox.threshold_and_scale(float(p))
            _, threshold, scale = stretch.dropping
    if act == _NONE and threshold == 0:
        stretch.memo = None
        return _run_plain(stretch, x), False
    w = b = slope = None
    if linear is not None:
        # linear.weight is a search in Python; functional_call and others may put it elsewhere.
        own = linear._parameters
        w = own["weight"] if "weight" in own else linear.weight
        b = own["bias"] if "bias" in own else linear.bias
    if act == _PRELU:
        slope = stretch.activation.weight
    if masks.traced:
        if not _can_run(x, w, b, act, slope, traced=True):
            _refuse(x, linear, masks.named)
            return _run_plain(stretch, x), False
    else:
        named = masks.named
        if type(x) not in _TENSORS or x.is_nested:
            _refuse(x, linear, named)
            return _run_plain(stretch, x), False
        # The tensors of a module by identity: a changed dtype or shape is found by the op itself.
        what = (x.shape, x.dtype, x.layout, x.device, torch.is_grad_enabled())
        key = (*what, threshold != 0, named, id(w), id(b), id(slope))
        memo = stretch.memo
        if memo is None or memo[0] != key:
            memo = stretch.memo = key, _choose(x, w, b, act, slope, threshold != 0, named)
        route = memo[1]
        if route is None:
            return _run_plain(stretch, x), False
    state = masks.draw(x) if threshold else None
    numbers = (act, stretch.alpha, threshold, scale, layer, masks.row_offset)
    if masks.traced or masks.row_offset:
        if linear is None:
            y = functional.run_bias_act_dropout(x, None, slope, state, *numbers, masks.named)
        else:
            y = functional.run_linear_act(x, w, b, slope, state, *numbers, masks.named)
        return y, True
    if linear is None:
        return functional.bias_act_dropout_on(route, (x, None, slope, state, *numbers)), True
    return functional.linear_act_on(route, (x, w, b, slope, state, *numbers)), True


def _choose(x, w, b, act: int, slope, drops: bool, named: str | None) -> str | None:
    """The backend for a stretch, or None where its modules do as well or better."""
    op = "bias_act_dropout" if w is None else "linear_act"
    if not _can_run(x, w, b, act, slope, traced=False):
        _refuse(x, w, named)
        return None
    rows = checks.rows(x)
    if w is None:
        columns, k = (x.shape[-1] if x.dim() else 1), 0
    else:
        columns, k = w.shape
    if drops:
        checks.row_range(op, rows, columns, 0)
    route = choice.select(op, x.device.type, x.dtype, act, drops, rows, k, columns, named)
    return None if route == registry.EAGER else route


def _can_run(x, w, b, act: int, slope, *, traced: bool) -> bool:
    """True if the op takes these tensors and gives what the modules would give, errors included."""
    if functional.is_foreign(x, w, b, slope) or x.is_nested:
        return False
    if x.dtype not in dtypes.SUPPORTED or x.layout != torch.strided:
        return False
    device = x.device
    if device.type == "meta":
        return False
    cast = dtypes.autocast_dtype(device.type) if traced else None
    if cast is not None and x.dtype == torch.float64:
        return False
    if act == _SOFTPLUS and cast is not None and device.type != "cpu":
        return False  # Autocast runs softplus in fp32 there.
    if w is None:
        if act == _PRELU and cast is not None:
            return False  # Autocast casts for prelu, but not for our op.
        return slope is None or _slope_fits(x, slope, x.shape[-1] if x.dim() else 1, cast)
    if x.dim() == 0 or w.dim() != 2 or w.shape[1] != x.shape[-1]:
        return False
    for t in (w, b):
        if t is not None and not _belongs(x, t, cast):
            return False
    if b is not None and (b.dim() != 1 or b.shape[0] != w.shape[0]):
        return False
    return slope is None or _slope_fits(x, slope, w.shape[0], cast)


def _belongs(x: Tensor, t: Tensor, cast: torch.dtype | None) -> bool:
    """Parameters in the dtype of x, as PyTorch wants them, or about to be cast."""
    if t.layout != torch.strided or t.device != x.device:
        return False
    return t.dtype == x.dtype if cast is None else t.dtype in dtypes.KERNEL


def _slope_fits(x: Tensor, slope: Tensor, columns: int, cast: torch.dtype | None) -> bool:
    # nn.PReLU's slopes belong to dimension 1, ours to the last.
    if slope.numel() != 1 and (x.dim() != 2 or slope.numel() != columns):
        return False
    return _belongs(x, slope, cast)


def _refuse(x, linear, named: str | None) -> None:
    """BackendError if a backend was asked for by name that does not take x; else nothing."""
    if named is None or not isinstance(x, Tensor):
        return
    op = "bias_act_dropout" if linear is None else "linear_act"
    registry.require(named, x.device.type, x.dtype, op)
    if type(x) not in _TENSORS or x.layout != torch.strided or x.is_nested:
        raise registry.BackendError(
            f"{op}: backend {named!r} was asked for but cannot be used:\n"
            f"    input is a {type(x).__name__} of layout {x.layout}, not a dense torch.Tensor"
        )
