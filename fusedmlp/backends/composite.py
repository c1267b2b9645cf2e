"""The ops as compositions of differentiable PyTorch functions.

Used where PyTorch has to differentiate through an op: gradients of gradients, functorch transforms,
and calls for which plain PyTorch is the fastest route. Same values and masks as the ops. Nothing
here decides when.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import activations, checks, dtypes, philox
from ..spec.activations import LEAKY_RELU, PRELU, RELU, SAVE_NOTHING, SAVE_Y, TABLE


def _keep(like: Tensor, state, threshold: int, layer: int, row_offset: int) -> Tensor | None:
    """Mask in the shape of `like` (..., N), None when nothing is dropped."""
    if threshold == 0:
        return None
    if threshold == philox.TWO32:
        return torch.zeros_like(like, dtype=torch.bool)
    columns = like.shape[-1] if like.dim() else 1
    mask = philox.keep_mask(state, layer, checks.rows(like), columns, threshold, row_offset)
    return mask.reshape(like.shape)


def _plain(act: int, z: Tensor, slope: Tensor | None, alpha: float) -> Tensor:
    """act(z) by PyTorch's own function, with PyTorch's own derivative."""
    if act == LEAKY_RELU:
        return F.leaky_relu(z, alpha)
    if act == PRELU and slope.numel() == 1 and slope.dtype == z.dtype:
        return F.prelu(z, slope.reshape(1))
    if act == PRELU:
        return torch.where(z > 0, z, (slope * z).to(z.dtype))
    return TABLE[act].forward(z, alpha)


def epilogue(z, slope, state, act, alpha, threshold, scale, layer, row_offset) -> Tensor:
    """drop(act(z)) for z (..., N), differentiable any number of times."""
    y = z if act == activations.NONE else _plain(act, z, slope, alpha)
    keep = _keep(z, state, threshold, layer, row_offset)
    return y if keep is None else torch.where(keep, y * scale, 0.0)


def linear_act(x, w, b, slope, state, act, alpha, threshold, scale, layer, row_offset) -> Tensor:
    """x (..., K), w (N, K), b (N,) or None -> y (..., N), in x's dtype throughout."""
    if b is not None and b.dtype != x.dtype:
        b = b.to(x.dtype)
    z = F.linear(x, w, b)
    return epilogue(z, slope, state, act, alpha, threshold, scale, layer, row_offset)


def bias_act_dropout(x, b, slope, state, act, alpha, threshold, scale, layer, row_offset) -> Tensor:
    """x (..., N), b (N,) or None -> y (..., N), in x's dtype throughout."""
    z = x if b is None else x + b.to(x.dtype)
    y = epilogue(z, slope, state, act, alpha, threshold, scale, layer, row_offset)
    # Never the input itself: changing the result in place must not change x.
    return y.clone() if y is x else y


def _backward(
    dy, z, y, b, slope, state, act, alpha, threshold, scale, layer, row_offset
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz, db, dslope as differentiable functions of dy, slope and z (or y, with its graph)."""
    dtype = dtypes.compute(dy.dtype)
    g = dy.to(dtype) * scale if threshold else dy.to(dtype)
    slope_ = slope.to(dtype) if act == PRELU else alpha
    keep = _keep(dy, state, threshold, layer, row_offset)
    dslope = None
    if act == RELU:
        dz, keep = torch.where(y <= 0, 0.0, g), None
    elif y is not None:
        a = y.to(dtype) / scale if threshold else y.to(dtype)
        if keep is not None:
            # 1 is inside the domain of every derivative that is read off y.
            a = torch.where(keep, a, 1.0)
        dz = activations.times_from_y(act, g, a, slope_)
    elif z is not None:
        dz = g * TABLE[act].from_z(z, slope_)
    else:
        dz = g
    if keep is not None:
        dz = torch.where(keep, dz, 0.0)
    if act == PRELU:
        terms = torch.where(z > 0, 0.0, g * z)
        terms = terms if keep is None else torch.where(keep, terms, 0.0)
        columns = dy.shape[-1] if dy.dim() else 1
        terms = terms.reshape(-1, columns) if terms.numel() else terms.new_zeros(1, columns)
        dslope = terms.sum() if slope.numel() == 1 else terms.sum(0)
        dslope = dslope.reshape(slope.shape).to(slope.dtype)
    db = None
    if b is not None:
        db = dz.sum_to_size(b.shape) if dz.numel() else dz.new_zeros(b.shape)
        db = db.to(b.dtype)
    return dz.to(dy.dtype), db, dslope


def linear_act_bwd(dy, x, w, b, slope, state, saved, kind, *numbers):
    """dz (..., N), db and dslope of linear_act, differentiable with respect to all its inputs.

    saved  y, or h = x w^T without a graph, or None, as `kind` says
    """
    z = y = None
    act = numbers[0]
    if kind == SAVE_Y:
        y = saved
    elif kind != SAVE_NOTHING:
        dtype = dtypes.compute(dy.dtype)
        if act == LEAKY_RELU:
            # Piecewise linear: only the sign of z matters, and that has no derivative.
            z = saved.to(dtype)
        else:
            z = F.linear(x.to(dtype), w.to(dtype))
        z = z if b is None else z + b.to(dtype)
    return _backward(dy, z, y, b, slope, state, *numbers)


def bias_act_dropout_bwd(dy, b, slope, state, saved, kind, *numbers):
    """dz (..., N), db and dslope of bias_act_dropout, differentiable in all its inputs.

    saved  y, or the input x, or None, as `kind` says
    """
    z = y = None
    if kind == SAVE_Y:
        y = saved
    elif kind != SAVE_NOTHING:
        dtype = dtypes.compute(dy.dtype)
        z = saved.to(dtype) if b is None else saved.to(dtype) + b.to(dtype)
    return _backward(dy, z, y, b, slope, state, *numbers)
