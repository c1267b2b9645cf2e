"""The ops as compositions of differentiable PyTorch functions.

Used where PyTorch has to differentiate through an op: gradients of gradients, functorch transforms,
and calls for which plain PyTorch is fastest. Same values and masks as the ops. Nothing
here decides when.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import activations, checks, dtypes, philox
from ..spec.activations import LEAKY_RELU, PRELU, RELU, SAVE_NOTHING, SAVE_Y, TABLE
from ..spec.layers import Epilogue


def keep_mask(like: Tensor, e: Epilogue) -> Tensor | None:
    """Mask in the shape of `like` (..., N), None when nothing is dropped; 0-D and 1-D are row 0."""
    if e.threshold == 0:
        return None
    if e.threshold == philox.TWO32:
        return torch.zeros_like(like, dtype=torch.bool)
    columns, rows = like.shape[-1] if like.dim() else 1, checks.rows(like)
    mask = philox.keep_mask(e.state, e.stream_offset, rows, columns, e.threshold, e.row_offset)
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


def _epilogue(z: Tensor, e: Epilogue) -> Tensor:
    """drop(act(z)) for z (..., N), differentiable any number of times."""
    y = z if e.act == activations.NONE else _plain(e.act, z, e.slope, e.alpha)
    keep = keep_mask(z, e)
    return y if keep is None else torch.where(keep, y * e.scale, 0.0)


def linear_act(x: Tensor, w: Tensor, e: Epilogue) -> Tensor:
    """x (..., K), w (N, K) -> y (..., N), in x's dtype throughout."""
    b = e.bias
    if b is not None and b.dtype != x.dtype:
        b = b.to(x.dtype)
    return _epilogue(F.linear(x, w, b), e)


def bias_act_dropout(x: Tensor, e: Epilogue) -> Tensor:
    """x (..., N) -> y (..., N), in x's dtype throughout."""
    z = x if e.bias is None else x + e.bias.to(x.dtype)
    y = _epilogue(z, e)
    # Never the input itself: changing the result in place must not change x.
    return y.clone() if y is x else y


def _backward(
    dy: Tensor, z: Tensor | None, y: Tensor | None, e: Epilogue
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz, db, dslope as differentiable functions of dy, slope and z (or y, with its graph)."""
    dtype = dtypes.compute(dy.dtype)
    g = dy.to(dtype) * e.scale if e.threshold else dy.to(dtype)
    slope = e.slope.to(dtype) if e.act == PRELU else e.alpha
    keep = keep_mask(dy, e)
    dslope = None
    if e.act == RELU:
        dz, keep = torch.where(y <= 0, 0.0, g), None
    elif y is not None:
        a = y.to(dtype) / e.scale if e.threshold else y.to(dtype)
        if keep is not None:
            # 1 is inside the domain of every derivative that is read off y.
            a = torch.where(keep, a, 1.0)
        dz = activations.times_from_y(e.act, g, a, slope)
    elif z is not None:
        dz = activations.times_from_z(e.act, g, z, slope)
    else:
        dz = g
    if keep is not None:
        dz = torch.where(keep, dz, 0.0)
    if e.act == PRELU:
        terms = torch.where(z > 0, 0.0, g * z)
        terms = terms if keep is None else torch.where(keep, terms, 0.0)
        columns = dy.shape[-1] if dy.dim() else 1
        terms = terms.reshape(-1, columns) if terms.numel() else terms.new_zeros(1, columns)
        dslope = terms.sum() if e.slope.numel() == 1 else terms.sum(0)
        dslope = dslope.reshape(e.slope.shape).to(e.slope.dtype)
    db = None
    if e.bias is not None:
        db = dz.sum_to_size(e.bias.shape) if dz.numel() else dz.new_zeros(e.bias.shape)
        db = db.to(e.bias.dtype)
    return dz.to(dy.dtype), db, dslope


def linear_act_bwd(dy: Tensor, x, w, saved: Tensor | None, kind: int, e: Epilogue):
    """dz (..., N), db and dslope of linear_act, differentiable with respect to all its inputs.

    saved  y, or preact = x w^T without a graph, or None, as `kind` says
    """
    z = y = None
    if kind == SAVE_Y:
        y = saved
    elif kind != SAVE_NOTHING:
        dtype = dtypes.compute(dy.dtype)
        if e.act == LEAKY_RELU:
            # Piecewise linear: only the sign of z matters, and that has no derivative.
            z = saved.to(dtype)
        else:
            z = F.linear(x.to(dtype), w.to(dtype))
        z = z if e.bias is None else z + e.bias.to(dtype)
    return _backward(dy, z, y, e)


def bias_act_dropout_bwd(dy: Tensor, saved: Tensor | None, kind: int, e: Epilogue):
    """dz (..., N), db and dslope of bias_act_dropout, differentiable in all its inputs.

    saved  y, or the input x, or None, as `kind` says
    """
    z = y = None
    if kind == SAVE_Y:
        y = saved
    elif kind != SAVE_NOTHING:
        dtype = dtypes.compute(dy.dtype)
        z = saved.to(dtype) if e.bias is None else saved.to(dtype) + e.bias.to(dtype)
    return _backward(dy, z, y, e)
