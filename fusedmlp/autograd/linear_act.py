"""The torch.autograd.Function of each op: what is saved and what is returned.

Both call registered ops, of the backend that functional.py has resolved; the gradients of x and w
are PyTorch's own products of dz. With create_graph the gradients are built from plain
differentiable PyTorch (composite.py), so that they can be differentiated again. Never writes to a
saved tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import compat
from ..backends import composite
from ..ops import BY_BACKEND
from ..spec import checks
from ..spec.activations import LEAKY_RELU, SAVE_NOTHING, SAVE_PREACT, SAVE_Y, saves
from ..spec.layers import Epilogue

_NO_MORE = (None,) * 8  # the backend's name, the state and the numbers have no gradients


def is_watched(dy: Tensor) -> bool:
    """True inside a backward whose own steps PyTorch has to see: backward(create_graph=True), and
    one that is batched. A compiled backward is neither."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or compat.is_batched(dy)


def _matmul_grads(dz: Tensor, x: Tensor | None, w: Tensor | None):
    """dx = dz w and dw = dz^T x, each if its operand is given.

    dz (..., N), x (..., K), w (N, K) -> dx (..., K), dw (N, K)
    """
    if dz.dim() == 2 and x is not None and x.dim() == 2:
        # The usual case, without the host cost of the general one.
        return (None if w is None else dz.mm(w)), dz.t().mm(x)
    dx = dw = None
    if w is not None:
        dx = torch.matmul(dz, w)
    if x is not None:
        rows = checks.rows(dz)
        dw = torch.mm(dz.reshape(rows, dz.shape[-1]).t(), x.reshape(rows, x.shape[-1]))
    return dx, dw


def _without_autocast(backward):
    """A backward whose own products are in the dtypes of its tensors, as those of its forward."""

    def run(ctx, dy):
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return backward(ctx, dy)
        return backward(ctx, dy)

    return run


class LinearAct(torch.autograd.Function):
    """y = drop(act(x w^T + b)).

    x (..., K), w (N, K); then the tensors, the backend and the numbers of an Epilogue
    """

    @staticmethod
    def forward(ctx, x, w, b, slope, state, backend, *numbers):
        ops, act = BY_BACKEND[backend], numbers[0]
        kind = saves(act, numbers[1], x.dtype, numbers[2] != 0)
        if kind == SAVE_PREACT:
            y, saved = ops.linear_act_fwd(x, w, b, slope, state, *numbers)
        else:
            y = ops.linear_act_infer(x, w, b, slope, state, *numbers)
            saved = y if kind == SAVE_Y else None
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        # Where the derivative is a function of z, the second derivative needs both operands.
        through_z = kind == SAVE_PREACT and act != LEAKY_RELU
        ctx.save_for_backward(
            x if need_w or (need_x and through_z) else None,
            w if need_x or (need_w and through_z) else None,
            b if need_b or kind == SAVE_PREACT else None,
            slope,
            state,
            saved,
        )
        ctx.backend, ctx.kind, ctx.numbers = backend, kind, numbers
        return y

    @staticmethod
    @_without_autocast
    def backward(ctx, dy):
        x, w, b, slope, state, saved = ctx.saved_tensors
        need_x, need_w, need_b, need_slope = ctx.needs_input_grad[:4]
        if is_watched(dy):
            e = Epilogue(b, slope, state, *ctx.numbers)
            dz, db, dslope = composite.linear_act_bwd(dy, x, w, saved, ctx.kind, e)
        else:
            dz, db, dslope = BY_BACKEND[ctx.backend].bias_act_dropout_bwd(
                dy, saved, b, slope, state, *ctx.numbers, ctx.kind, need_b, need_slope
            )
        dx, dw = _matmul_grads(dz, x if need_w else None, w if need_x else None)
        return (dx, dw, db if need_b else None, dslope if need_slope else None) + _NO_MORE


class BiasActDropout(torch.autograd.Function):
    """y = drop(act(x + b)).

    x (..., N); then the tensors, the backend and the numbers of an Epilogue
    """

    @staticmethod
    def forward(ctx, x, b, slope, state, backend, *numbers):
        kind = saves(numbers[0], numbers[1], x.dtype, numbers[2] != 0)
        y = BY_BACKEND[backend].bias_act_dropout_fwd(x, b, slope, state, *numbers)
        saved = {SAVE_NOTHING: None, SAVE_Y: y, SAVE_PREACT: x}[kind]
        keep_b = ctx.needs_input_grad[1] or kind == SAVE_PREACT
        ctx.save_for_backward(b if keep_b else None, slope, state, saved)
        ctx.backend, ctx.kind, ctx.numbers = backend, kind, numbers
        return y

    @staticmethod
    @_without_autocast
    def backward(ctx, dy):
        b, slope, state, saved = ctx.saved_tensors
        need_x, need_b, need_slope = ctx.needs_input_grad[:3]
        if is_watched(dy):
            e = Epilogue(b, slope, state, *ctx.numbers)
            dz, db, dslope = composite.bias_act_dropout_bwd(dy, saved, ctx.kind, e)
        else:
            dz, db, dslope = BY_BACKEND[ctx.backend].bias_act_dropout_bwd(
                dy, saved, b, slope, state, *ctx.numbers, ctx.kind, need_b, need_slope
            )
        return (
            dz if need_x else None,
            db if need_b else None,
            dslope if need_slope else None,
        ) + _NO_MORE
