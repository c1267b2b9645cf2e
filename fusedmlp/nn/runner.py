"""Runs the stretches of a container, and keeps what one call has found out for the next.

Every choice here falls to the modules themselves where an op cannot do what they would do, unless a
backend was asked for by name. Which child belongs to which stretch is decided in stretches.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .. import activations, checks, dispatch, dtypes, functional, rng
from .masks import Masks
from .stretches import (
    ACTIVATIONS,
    Single,
    Stretch,
    activation_of,
    find,
    is_candidate,
    is_fused_module,
    is_tampered,
)

_NONE, _PRELU, _SOFTPLUS = activations.NONE, activations.PRELU, activations.SOFTPLUS
# Other subclasses of Tensor (DTensor, quantised weights) bring functions of their own.
_TENSORS = frozenset({Tensor, nn.Parameter, FakeTensor, FunctionalTensor})
_WITH_PARAMETERS = frozenset(cls for cls, (_, objection) in ACTIVATIONS.items() if objection)


class Plan:
    """How a container's present children are run.

    quiet  (shape, dtype, device, grad mode) of an input for which no op is faster than the modules
           themselves, or None
    calls  the children as functions; what is no more than its forward, by its forward
    """

    __slots__ = (
        "calls",
        "children",
        "dropouts",
        "items",
        "nested",
        "others",
        "quiet",
        "types",
        "watched",
    )

    def __init__(self, children: list[nn.Module]):
        self.children = children
        self.types = list(map(type, children))
        self.items = find(children)
        self.dropouts = [m for m in children if type(m) is nn.Dropout]
        self.nested = any(type(item) is Single and item.layers for item in self.items)
        self.quiet = None
        present = [m for m in dict.fromkeys(children) if m is not None]
        self.watched = [
            (m, type(m), is_tampered(m), m.__dict__.get("inplace"), _parameters_of(m))
            for m in present
            if is_candidate(m)
        ]
        self.calls = [
            m.forward if is_candidate(m) and not is_tampered(m) and not is_fused_module(m) else m
            for m in children
            if m is not None
        ]
        self.others = [
            (m, type(m), m.__dict__.get("inplace")) for m in present if not is_candidate(m)
        ]

    def is_stale(self) -> bool:
        """True if a child is no longer what it was when its stretch was found."""
        for m, cls, tampered, inplace, parameters in self.watched:
            d = m.__dict__
            if (
                type(m) is not cls
                or d.get("inplace") is not inplace
                # is_tampered(m), without its searches.
                or tampered
                is not bool(
                    d["_forward_hooks"]
                    or d["_forward_pre_hooks"]
                    or d["_backward_hooks"]
                    or d["_backward_pre_hooks"]
                    or "forward" in d
                    or d.get("_compiled_call_impl") is not None
                )
                or (parameters is not None and parameters != _parameters_of(m))
            ):
                return True
        for m, cls, inplace in self.others:
            if type(m) is not cls or m.__dict__.get("inplace") is not inplace:
                return True
        return False

    def is_quiet(self, x: object) -> bool:
        """True if the children may simply be called one after the other."""
        quiet = self.quiet
        if (
            quiet is None
            or type(x) is not Tensor
            or (
                x.shape,
                x.dtype,
                x.device,
                torch.is_grad_enabled(),
            )
            != quiet
        ):
            return False
        for m in self.dropouts:
            if m.training and m.p:
                return False
        return dispatch.explicit(None) is None and list(map(type, self.children)) == self.types

    def run(self, x, masks: Masks):
        y = run(self.items, x, masks)
        if type(x) is Tensor and not self.nested and not masks.traced:
            for item in self.items:
                if type(item) is Stretch and item.memo is not None and item.memo[1] is not None:
                    return y
            self.quiet = (x.shape, x.dtype, x.device, torch.is_grad_enabled())
        return y


def _parameters_of(m: nn.Module) -> object:
    """What besides its class and its hooks decides what m is; None for most classes."""
    return (activation_of(m),) if type(m) in _WITH_PARAMETERS else None


def run(items: list[Stretch | Single], x, masks: Masks):
    for item in items:
        if type(item) is Stretch:
            x = _run_stretch(item, x, masks)
        elif item.fused:
            x = item.module.run_fused(x, masks)
        else:
            masks.layer += item.layers
            x = item.module(x)
    return x


def _run_plain(stretch: Stretch, x):
    for module in stretch.modules:
        x = module(x)
    return x


def _run_stretch(stretch: Stretch, x, masks: Masks):
    layer = masks.layer
    masks.layer = layer + 1
    act, linear, dropout = stretch.act, stretch.linear, stretch.dropout
    threshold, scale = 0, 1.0
    if dropout is not None and dropout.training:
        p = dropout.p
        if p != 0:
            if not 0 < p <= 1:
                return _run_plain(stretch, x)  # F.dropout says what is wrong.
            if stretch.dropping[0] != p:
                stretch.dropping = p, *rng.threshold_and_scale(float(p))
            _, threshold, scale = stretch.dropping
    if act == _NONE and threshold == 0:
        stretch.memo = None
        return _run_plain(stretch, x)
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
            _refuse(x, linear)
            return _run_plain(stretch, x)
    else:
        if type(x) not in _TENSORS:
            _refuse(x, linear)
            return _run_plain(stretch, x)
        named = dispatch.explicit(None)
        # The tensors of a module by identity: a changed dtype or shape is found by the op itself.
        what = (x.shape, x.dtype, x.layout, x.device, torch.is_grad_enabled())
        key = (*what, threshold != 0, named, id(w), id(b), id(slope))
        memo = stretch.memo
        if memo is None or memo[0] != key:
            memo = stretch.memo = key, _choose(x, w, b, act, slope, threshold != 0, named)
        route = memo[1]
        if route is None:
            return _run_plain(stretch, x)
    state = masks.draw(x) if threshold else None
    numbers = (act, stretch.alpha, threshold, scale, layer, masks.row_offset)
    if masks.traced or masks.row_offset:
        if linear is None:
            return functional.run_bias_act_dropout(x, None, slope, state, *numbers, None)
        return functional.run_linear_act(x, w, b, slope, state, *numbers, None)
    if linear is None:
        return functional.bias_act_dropout_on(route, (x, None, slope, state, *numbers))
    return functional.linear_act_on(route, (x, w, b, slope, state, *numbers))


def _choose(x, w, b, act: int, slope, drops: bool, named: str | None) -> str | None:
    """The backend for a stretch, or None where its modules do as well or better."""
    op = "bias_act_dropout" if w is None else "linear_act"
    if not _can_run(x, w, b, act, slope, traced=False):
        _refuse(x, w)
        return None
    rows = checks.rows(x)
    if w is None:
        columns, k = (x.shape[-1] if x.dim() else 1), 0
    else:
        columns, k = w.shape
    if drops:
        checks.row_range(op, rows, columns, 0)
    route = dispatch.select(op, x.device.type, x.dtype, act, drops, rows, k, columns, named)
    return None if route == dispatch.EAGER else route


def _can_run(x, w, b, act: int, slope, *, traced: bool) -> bool:
    """True if the op takes these tensors and gives what the modules would give, errors included."""
    if type(x) not in _TENSORS or x.dtype not in dtypes.SUPPORTED or x.layout != torch.strided:
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
    if type(t) not in _TENSORS or t.layout != torch.strided or t.device != x.device:
        return False
    return t.dtype == x.dtype if cast is None else t.dtype in dtypes.KERNEL


def _slope_fits(x: Tensor, slope: Tensor, columns: int, cast: torch.dtype | None) -> bool:
    # nn.PReLU's slopes belong to dimension 1, ours to the last.
    if slope.numel() != 1 and (x.dim() != 2 or slope.numel() != columns):
        return False
    return _belongs(x, slope, cast)


def _refuse(x, linear) -> None:
    """BackendError if a backend was asked for by name that does not take x; else nothing."""
    named = dispatch.explicit(None)
    if named is None or not isinstance(x, Tensor):
        return
    op = "bias_act_dropout" if linear is None else "linear_act"
    dispatch.require(named, x.device.type, x.dtype, op)
    if type(x) not in _TENSORS or x.layout != torch.strided:
        raise dispatch.BackendError(
            f"{op}: backend {named!r} was asked for but cannot be used:\n"
            f"    input is a {type(x).__name__} of layout {x.layout}, not a dense torch.Tensor"
        )
