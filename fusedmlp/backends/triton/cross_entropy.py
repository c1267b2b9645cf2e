"""cross_entropy: the loss of every row and its gradient in one kernel, logits read once or twice.

    p = softmax(z)            q = (1 - e) onehot(target) + e / C        e: label smoothing
    loss = -sum(q log p)      dz = (p - q) * grad_scale

A program handles BLOCK_M whole rows; columns beyond C are masked. Rows that fit into a tile are
read once; longer ones are walked twice: running maximum and sum, then the gradient.
"""

import torch
import triton
import triton.language as tl

from . import tiles
from .activations import exp_negative, quotient
from .launch import launch
from .tiles import cdiv


@triton.jit
def _targets(target_ptr, row, inside_m, C, ignore_index):
    """(target, is counted, is out of range) of each row."""
    target = tl.load(target_ptr + row, mask=inside_m, other=0).to(tl.int64)
    counted = target != ignore_index
    return target, counted, counted & ((target < 0) | (target >= C))


@triton.jit
def _gradient(z, top, total, target, counted, wrong, column, C, smoothing, grad_scale,
              EXACT: tl.constexpr):
    """(BLOCK_M, BLOCK_N) of dz; NaN in a row whose target does not exist, 0 in an ignored one."""
    p = quotient(exp_negative(z - top[:, None], EXACT), total[:, None], EXACT)
    q = quotient(smoothing, tl.cast(C, tl.float32), EXACT) + tl.where(
        column[None, :] == target[:, None], 1.0 - smoothing, 0.0
    )
    dz = tl.where(counted[:, None], (p - q) * grad_scale, 0.0)
    return tl.where(wrong[:, None], float("nan"), dz)


@triton.jit
def _losses(top, total, at_target, sum_z, counted, wrong, C, smoothing):
    """(BLOCK_M,) of -sum(q log p), where log p = z - top - log(total)."""
    expected = (1.0 - smoothing) * at_target  # sum(q z)
    if smoothing > 0:
        # Not at smoothing = 0: a logit of -inf elsewhere must not become a NaN.
        expected += smoothing * tl.div_rn(sum_z, tl.cast(C, tl.float32))
    # The difference of the two large terms first: it is nearly exact.
    loss = (top - expected) + tl.log(total)
    return tl.where(wrong, float("nan"), tl.where(counted, loss, 0.0))


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    loss_ptr,  # (M,) fp32
    dz_ptr,  # (M, C) contiguous
    z_ptr,  # (M, C)
    target_ptr,  # (M,) int64 contiguous
    M, C,
    stride_zm, stride_zc,
    smoothing: tl.float32, grad_scale: tl.float32, ignore_index: tl.int64,
    ONE_TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Losses and dz of BLOCK_M rows; ONE_TILE says that a row fits into one tile of BLOCK_N."""
    EXACT: tl.constexpr = dz_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = row < M
    target, counted, wrong = _targets(target_ptr, row, inside_m, C, ignore_index)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sum_z = tl.zeros((BLOCK_M,), tl.float32)
    if ONE_TILE:
        column = tl.arange(0, BLOCK_N).to(tl.int64)
        inside = inside_m[:, None] & (column < C)[None, :]
        at = z_ptr + row[:, None] * stride_zm + column[None, :] * stride_zc
        z = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        z = tl.where(inside_m[:, None], z, 0.0)
        top = tl.max(z, axis=1)
        total = tl.sum(exp_negative(z - top[:, None], EXACT), axis=1)
        sum_z = tl.sum(tl.where(inside, z, 0.0), axis=1)
        dz = _gradient(
            z, top, total, target, counted, wrong, column, C, smoothing, grad_scale, EXACT
        )
        tl.store(dz_ptr + row[:, None] * C + column[None, :], dz, mask=inside)
    else:
        for first in range(0, C, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N).to(tl.int64)
            inside = inside_m[:, None] & (column < C)[None, :]
            at = z_ptr + row[:, None] * stride_zm + column[None, :] * stride_zc
            z = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
            z = tl.where(inside_m[:, None], z, 0.0)
            higher = tl.maximum(top, tl.max(z, axis=1))
            # A tile of -inf only: there is nothing to add, and -inf - -inf would be NaN.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * exp_negative(top - base, EXACT)
            total += tl.sum(exp_negative(z - base[:, None], EXACT), axis=1)
            sum_z += tl.sum(tl.where(inside, z, 0.0), axis=1)
            top = higher
        for first in range(0, C, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N).to(tl.int64)
            inside = inside_m[:, None] & (column < C)[None, :]
            at = z_ptr + row[:, None] * stride_zm + column[None, :] * stride_zc
            z = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
            dz = _gradient(
                z, top, total, target, counted, wrong, column, C, smoothing, grad_scale, EXACT
            )
            tl.store(dz_ptr + row[:, None] * C + column[None, :], dz, mask=inside)
    # Read again, one element a row: cheaper than a search through the tile.
    has_target = inside_m & counted & (wrong == 0)
    at = z_ptr + row * stride_zm + target * stride_zc
    at_target = tl.load(at, mask=has_target, other=0.0).to(tl.float32)
    loss = _losses(top, total, at_target, sum_z, counted, wrong, C, smoothing)
    tl.store(loss_ptr + row, loss, mask=inside_m)


def cross_entropy(logits, target, label_smoothing=0.0, ignore_index=-100, grad_scale=1.0):
    """Losses (M,) fp32, 0 for ignored rows, and dlogits (M, C): grad_scale times that of their sum.

    Same values as F.cross_entropy(logits, target, label_smoothing=..., reduction="none"). A target
    outside [0, C) that is not ignore_index gives a row of NaN: there is no way to raise from a GPU
    without waiting for it.

    logits  (M, C) fp32, fp16 or bf16, any strides
    target  (M,) int64
    """
    m, c = logits.shape
    losses = torch.empty(m, dtype=torch.float32, device=logits.device)
    dlogits = torch.empty((m, c), dtype=logits.dtype, device=logits.device)
    if m == 0:
        return losses, dlogits
    if c == 0:
        return losses.fill_(float("nan")), dlogits
    block_m, block_n, warps = tiles.row_tile(m, c)
    launch(
        cross_entropy_kernel, cdiv(m, block_m), logits,
        losses, dlogits, logits, target.contiguous(), m, c, *logits.stride(),
        label_smoothing, grad_scale, ignore_index,
        ONE_TILE=c <= block_n, BLOCK_M=block_m, BLOCK_N=block_n, warps=warps,
    )
    return losses, dlogits
