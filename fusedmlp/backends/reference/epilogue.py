"""linear_act and bias_act_dropout in plain PyTorch.

The GEMM is the library's in the input's dtype; the epilogue is done in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...spec import activations, checks, dtypes, philox
from ...spec.activations import SAVE_Y, SAVE_Z, TABLE


def _keep(like: Tensor, state, threshold: int, layer: int, row_offset: int) -> Tensor | None:
    """Mask in the shape of `like` (..., N), None when nothing is dropped; 0-D and 1-D are row 0."""
    if threshold == 0:
        return None
    if threshold == philox.TWO32:
        return torch.zeros((), dtype=torch.bool, device=like.device)
    columns = like.shape[-1] if like.dim() else 1
    mask = philox.keep_mask(state, layer, checks.rows(like), columns, threshold, row_offset)
    return mask.reshape(like.shape)


def _slope(act: int, alpha: float, slope: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    return slope.to(dtype) if act == activations.PRELU else alpha


def _fresh(result: Tensor, dtype: torch.dtype, source: Tensor) -> Tensor:
    """A contiguous tensor that is not the input: an op never returns an alias."""
    out = result.to(dtype).contiguous()
    return out.clone() if out is source else out


def linear_act_fwd(x, w, b, slope, state, act, alpha, threshold, scale, layer, row_offset):
    """y (..., N) and h = x @ w.T (..., N), rounded to x's dtype, without the bias."""
    h = F.linear(x, w)
    return bias_act_dropout_fwd(
        h, b, slope, state, act, alpha, threshold, scale, layer, row_offset
    ), h


def linear_act_infer(x, w, b, slope, state, act, alpha, threshold, scale, layer, row_offset):
    """y (..., N)."""
    if b is not None and b.dtype == x.dtype:
        # z is then PyTorch's to the bit: near a kink of ReLU its sign decides a gradient.
        h, b = F.linear(x, w, b), None
    else:
        h = F.linear(x, w)
    return bias_act_dropout_fwd(h, b, slope, state, act, alpha, threshold, scale, layer, row_offset)


def bias_act_dropout_fwd(x, b, slope, state, act, alpha, threshold, scale, layer, row_offset):
    """y (..., N)."""
    dtype = dtypes.compute(x.dtype)
    z = x.to(dtype) if b is None else x.to(dtype) + b.to(dtype)
    y = TABLE[act].forward(z, _slope(act, alpha, slope, dtype))
    if act == activations.GELU:
        # The limit: PyTorch's fp32 kernel was seen to give NaN where its fp16 kernel gives that.
        y = torch.where(z == math.inf, z, y)
    keep = _keep(x, state, threshold, layer, row_offset)
    if keep is not None:
        # Selected, never multiplied: a dropped NaN or Inf is +0.
        y = torch.where(keep, y * scale, 0.0)
    return _fresh(y, x.dtype, x)


def bias_act_dropout_bwd(
    dy,
    saved,
    b,
    slope,
    state,
    act,
    alpha,
    threshold,
    scale,
    layer,
    row_offset,
    saves,
    need_db,
    need_dslope,
):
    """dz (..., N), db (N,) and dslope: gradients of the pre-activation, the bias and the slope."""
    dtype = dtypes.compute(dy.dtype)
    slope_ = _slope(act, alpha, slope, dtype)
    g = dy.to(dtype) * scale if threshold else dy.to(dtype)
    keep = dslope_terms = None
    if act == activations.RELU:
        # y alone holds the joint mask of ReLU and dropout.
        dz = torch.where(saved <= 0, 0.0, g)
    else:
        keep = _keep(dy, state, threshold, layer, row_offset)
        dz = g
        if saves == SAVE_Y:
            a = saved.to(dtype) / scale if threshold else saved.to(dtype)
            dz = activations.times_from_y(act, g, a, slope_)
        elif saves == SAVE_Z:
            z = saved.to(dtype) if b is None else saved.to(dtype) + b.to(dtype)
            dz = g * TABLE[act].from_z(z, slope_)
            dslope_terms = torch.where(z > 0, 0.0, g * z) if need_dslope else None
        if keep is not None:
            dz = torch.where(keep, dz, 0.0)
    columns = dy.shape[-1] if dy.dim() else 1
    db, dslope = dy.new_empty(0), dy.new_empty(0)
    if need_db:
        db = dz.reshape(checks.rows(dy), columns).sum(0).to(b.dtype)
    if need_dslope:
        if keep is not None:
            dslope_terms = torch.where(keep, dslope_terms, 0.0)
        terms = dslope_terms.reshape(checks.rows(dy), columns)
        dslope = terms.sum() if slope.numel() == 1 else terms.sum(0)
        dslope = dslope.reshape(slope.shape).to(slope.dtype)
    return _fresh(dz, dy.dtype, dy), db, dslope
