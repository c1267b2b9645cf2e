"""Plain PyTorch: the fallback, the tested oracle, and the only backend with fp64.

The same functions with the same names as every backend. A product is the library's in the input's
dtype; the epilogue is done in fp32 (fp64 for fp64), and rounded once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import activations, checks, dtypes, layers
from ..spec.activations import SAVE_PREACT, SAVE_Y, TABLE
from ..spec.layers import Epilogue
from .composite import keep_mask


def _fresh(result: Tensor, dtype: torch.dtype, source: Tensor) -> Tensor:
    """A contiguous tensor that is not the input: an op never returns an alias."""
    out = result.to(dtype).contiguous()
    return out.clone() if out is source else out


def linear_act_fwd(x: Tensor, w: Tensor, e: Epilogue) -> tuple[Tensor, Tensor]:
    """y (..., N) and preact = x @ w.T (..., N), rounded to x's dtype, without the bias."""
    preact = F.linear(x, w)
    return bias_act_dropout_fwd(preact, e), preact


def linear_act_infer(x: Tensor, w: Tensor, e: Epilogue) -> Tensor:
    """y (..., N)."""
    if e.bias is not None and e.bias.dtype == x.dtype:
        # The sum is then PyTorch's to the bit: near a kink of ReLU its sign decides a gradient.
        return bias_act_dropout_fwd(F.linear(x, w, e.bias), e._replace(bias=None))
    return bias_act_dropout_fwd(F.linear(x, w), e)


def bias_act_dropout_fwd(x: Tensor, e: Epilogue) -> Tensor:
    """y (..., N)."""
    dtype = dtypes.compute(x.dtype)
    z = x.to(dtype) if e.bias is None else x.to(dtype) + e.bias.to(dtype)
    y = TABLE[e.act].forward(z, _slope(e, dtype))
    if e.act == activations.GELU:
        # The limit: PyTorch's fp32 kernel was seen to give NaN where its fp16 kernel gives that.
        y = torch.where(z == math.inf, z, y)
    keep = keep_mask(x, e)
    if keep is not None:
        # Selected, never multiplied: a dropped NaN or Inf is +0.
        y = torch.where(keep, y * e.scale, 0.0)
    return _fresh(y, x.dtype, x)


def _slope(e: Epilogue, dtype: torch.dtype) -> Tensor | float:
    return e.slope.to(dtype) if e.act == activations.PRELU else e.alpha


def bias_act_dropout_bwd(
    dy: Tensor, saved: Tensor | None, e: Epilogue, saves: int, need_db: bool, need_dslope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dz (..., N), db (N,) and dslope: gradients of the preactivation, the bias and the slope."""
    dtype = dtypes.compute(dy.dtype)
    g = dy.to(dtype) * e.scale if e.threshold else dy.to(dtype)
    keep = dslope_terms = None
    if e.act == activations.RELU and saves == SAVE_Y:
        # y alone holds the joint mask of ReLU and dropout.
        # 0 where not (y > 0 or NaN), as F.relu; torch.where with a number takes ten times as long.
        dz = torch.ops.aten.threshold_backward(g, saved.to(dtype), 0)
    else:
        keep = keep_mask(dy, e)
        dz = g
        if saves == SAVE_Y:
            a = saved.to(dtype) / e.scale if e.threshold else saved.to(dtype)
            dz = activations.times_from_y(e.act, g, a, _slope(e, dtype))
        elif saves == SAVE_PREACT:
            z = saved.to(dtype) if e.bias is None else saved.to(dtype) + e.bias.to(dtype)
            dz = activations.times_from_z(e.act, g, z, _slope(e, dtype))
            dslope_terms = torch.where(z > 0, 0.0, g * z) if need_dslope else None
        if keep is not None:
            dz = torch.where(keep, dz, 0.0)
    columns = dy.shape[-1] if dy.dim() else 1
    db, dslope = dy.new_empty(0), dy.new_empty(0)
    if need_db:
        db = dz.reshape(checks.rows(dy), columns).sum(0).to(e.bias.dtype)
    if need_dslope:
        if keep is not None:
            dslope_terms = torch.where(keep, dslope_terms, 0.0)
        terms = dslope_terms.reshape(checks.rows(dy), columns)
        dslope = terms.sum() if e.slope.numel() == 1 else terms.sum(0)
        dslope = dslope.reshape(e.slope.shape).to(e.slope.dtype)
    return _fresh(dz, dy.dtype, dy), db, dslope


def mlp_fwd(x, params, state, ints, numbers, row_offset, keep) -> list[Tensor]:
    """y of each layer (..., N), then preact of those that keep it; only the last y if not `keep`.

    The arguments are those of the op (ops.py).
    """
    ys, preacts = [], []
    for w, e in layers.unpack(params, ints, numbers, state, row_offset):
        if e.saves(x.dtype) == SAVE_PREACT:
            x, preact = linear_act_fwd(x, w, e)
            preacts.append(preact)
        else:
            x = linear_act_infer(x, w, e)
        ys.append(x)
    return ys + preacts if keep else ys[-1:]


def mlp_bwd(
    dy, x, params, state, ys, preacts, ints, numbers, row_offset, needs, need_dx
) -> list[Tensor]:
    """dx (..., K), then the gradient of each of the params; of no elements where not needed."""
    net = list(layers.unpack(params, ints, numbers, state, row_offset))
    needs = [need & bits for need, bits in zip(needs, layers.bits_of(ints), strict=True)]
    first = 0 if need_dx else next((i for i, need in enumerate(needs) if need), len(net))
    preacts = list(preacts)
    grads = []  # of the params, from the last
    for i in reversed(range(len(net))):
        (w, e), need = net[i], needs[i]
        dw = db = dslope = None
        kind = e.saves(dy.dtype)
        saved = ys[i] if kind == SAVE_Y else preacts.pop() if kind == SAVE_PREACT else None
        if i >= first:
            asked = bool(need & layers.B), bool(need & layers.SLOPE)
            dz, db, dslope = bias_act_dropout_bwd(dy, saved, e, kind, *asked)
            if need & layers.W:
                below, rows = ys[i - 1] if i else x, checks.rows(dz)
                dw = dz.reshape(rows, dz.shape[-1]).t().mm(below.reshape(rows, below.shape[-1]))
            if i > first or need_dx:
                dy = torch.matmul(dz, w)
        present = zip((dw, db, dslope), (w, e.bias, e.slope), strict=True)
        # A tensor of its own for each: outputs of an op may not share memory.
        found = [grad for grad, t in present if t is not None]
        grads += [dy.new_empty(0) if grad is None else grad for grad in reversed(found)]
    return [dy if need_dx else dy.new_empty(0), *reversed(grads)]


def cross_entropy(logits, target, label_smoothing, ignore_index, grad_scale):
    """losses (M,), 0 for ignored rows, and dlogits (M, C): grad_scale times that of their sum.

        p = softmax(z)            q = (1 - e) onehot(target) + e / C        e: label smoothing
        loss = -sum(q log p)      dz = (p - q) * grad_scale

    A target outside [0, C) that is not ignore_index gives a row of NaN, as on every backend.
    """
    dtype, classes = dtypes.compute(logits.dtype), logits.shape[1]
    log_p = F.log_softmax(logits.to(dtype), dim=1)
    counted = target != ignore_index
    known = (target >= 0) & (target < classes)
    at = torch.where(known, target, 0)[:, None]
    losses = (label_smoothing - 1) * log_p.gather(1, at)[:, 0]
    if label_smoothing:
        # Not at 0: a logit of -inf elsewhere must not become a NaN.
        losses = losses - label_smoothing * log_p.mean(1)
    q = torch.full_like(log_p, label_smoothing / classes)
    q.scatter_add_(1, at, torch.full_like(at, 1 - label_smoothing, dtype=dtype))
    dlogits = (log_p.exp() - q) * grad_scale
    nan = float("nan")
    losses = torch.where(counted, torch.where(known, losses, nan), 0.0)
    dlogits = torch.where(counted[:, None], torch.where(known[:, None], dlogits, nan), 0.0)
    return losses, dlogits.to(logits.dtype)
