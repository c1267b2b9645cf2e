"""bias_act_dropout: y = drop(act(x + b)), forward and backward, without a GEMM.

One program handles tiles of BLOCK_M rows and BLOCK_N columns; rows and columns beyond the tensor
are masked. Sums over rows are done in two stages in a fixed order: a program adds its own rows,
then one kernel adds the programs' rows. No atomics.
"""

import torch
import triton
import triton.language as tl

from . import tiles
from .device import act_fwd
from .epilogue import drop, load_slope, load_stream, pre_activation_grad
from .launch import dropout_arguments, launch, rows_view, slopes, vector
from .tiles import cdiv


@triton.jit(do_not_specialize=["threshold", "layer", "row_offset"])
def bias_act_dropout_fwd_kernel(
    y_ptr,  # (M, N) contiguous
    x_ptr,  # (M, N)
    b_ptr,  # (N,) or None
    slope_ptr,  # (1,) or (N,) or None
    state_ptr,  # (2,) int64 or None
    M,
    N,
    stride_xm,
    stride_xn,
    alpha: tl.float32,
    threshold: tl.int32,
    scale: tl.float32,
    layer: tl.int64,
    row_offset: tl.int64,
    ACT: tl.constexpr,
    SLOPES: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = drop(act(x + b)); one tile a program."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    first_row, first_column = pid // tiles_n * BLOCK_M, pid % tiles_n * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    inside_n = column < N
    inside = (row < M)[:, None] & inside_n[None, :]

    x_at = x_ptr + row[:, None] * stride_xm + column[None, :] * stride_xn
    z = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if b_ptr is not None:
        z += tl.load(b_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    slope = load_slope(slope_ptr, alpha, column, inside_n, SLOPES)
    y = act_fwd(z, slope, ACT, y_ptr.dtype.element_ty == tl.float32)
    if DROPOUT != 0:
        seed, stream = load_stream(state_ptr, layer, DROPOUT)
        y = drop(
            y * scale,
            seed,
            stream,
            first_row + row_offset,
            first_column,
            threshold,
            DROPOUT,
            BLOCK_M,
            BLOCK_N,
        )
    tl.store(y_ptr + row[:, None] * N + column[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["threshold", "layer", "row_offset", "steps"])
def bias_act_dropout_bwd_kernel(
    dz_ptr,  # (M, N) contiguous
    db_ptr,  # (splits, N) or None
    dslope_ptr,  # (splits, N), (splits, column tiles) or None
    dy_ptr,  # (M, N)
    saved_ptr,  # (M, N) or None
    b_ptr,  # (N,) or None
    slope_ptr,  # (1,) or (N,) or None
    state_ptr,  # (2,) int64 or None
    M,
    N,
    steps,
    stride_dym,
    stride_dyn,
    stride_sm,
    stride_sn,
    alpha: tl.float32,
    threshold: tl.int32,
    scale: tl.float32,
    layer: tl.int64,
    row_offset: tl.int64,
    ACT: tl.constexpr,
    SLOPES: tl.constexpr,
    SAVES: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dz = keep ? dy * scale * act' : 0; `steps` tiles, one below the other, a program."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    split, tile_n = pid // tiles_n, pid % tiles_n
    first_column = tile_n * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    inside_n = column < N
    bias = 0.0
    if b_ptr is not None and SAVES == 2:
        bias = tl.load(b_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    slope = load_slope(slope_ptr, alpha, column, inside_n, SLOPES)
    seed, stream = load_stream(state_ptr, layer, DROPOUT)
    # Added up tile by tile and over rows only at the end: one reduction a program.
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dslope = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        first_row = (split * steps + step) * BLOCK_M
        row = first_row + tl.arange(0, BLOCK_M)
        inside = (row < M)[:, None] & inside_n[None, :]
        dy_at = dy_ptr + row[:, None] * stride_dym + column[None, :] * stride_dyn
        # Outside, dy = 0 makes both sums 0.
        dy = tl.load(dy_at, mask=inside, other=0.0).to(tl.float32)
        saved = dy
        if SAVES != 0:
            saved_at = saved_ptr + row[:, None] * stride_sm + column[None, :] * stride_sn
            saved = tl.load(saved_at, mask=inside, other=0.0).to(tl.float32)
        dz, terms = pre_activation_grad(
            dy,
            saved,
            bias,
            slope,
            scale,
            seed,
            stream,
            first_row + row_offset,
            first_column,
            threshold,
            ACT,
            SAVES,
            DROPOUT,
            dslope_ptr is not None,
            dz_ptr.dtype.element_ty == tl.float32,
            BLOCK_M,
            BLOCK_N,
        )
        tl.store(dz_ptr + row[:, None] * N + column[None, :], dz, mask=inside)
        if db_ptr is not None:
            db += tl.where(inside, dz, 0.0)
        if dslope_ptr is not None:
            dslope += tl.where(inside, terms, 0.0)
    if db_ptr is not None:
        tl.store(db_ptr + split * N + column, tl.sum(db, axis=0), mask=inside_n)
    if dslope_ptr is not None:
        by_column = tl.sum(dslope, axis=0)
        if SLOPES == 2:
            tl.store(dslope_ptr + split * N + column, by_column, mask=inside_n)
        else:
            tl.store(dslope_ptr + pid, tl.sum(by_column, axis=0))


@triton.jit
def column_sum_kernel(
    out_ptr,  # (N,) contiguous
    partial_ptr,  # (S, N) contiguous fp32
    S,
    N,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = sum of partial over its rows, in a fixed order; BLOCK_N columns a program."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for first in range(0, S, BLOCK_S):
        row = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = (row < S)[:, None] & (column < N)[None, :]
        at = partial_ptr + row[:, None] * N + column[None, :]
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0), mask=column < N)


def column_sum(partial, out):
    """Adds (S, N) fp32 partial sums into out (N,), in out's dtype; out for S = 1 is `partial`."""
    s, n = partial.shape
    if n == 0:
        return out
    block_s, block_n, warps = tiles.column_sum_tile(s, n)
    launch(
        column_sum_kernel,
        cdiv(n, block_n),
        partial,
        out,
        partial,
        s,
        n,
        BLOCK_S=block_s,
        BLOCK_N=block_n,
        warps=warps,
    )
    return out


class SlopeAndBiasSums:
    """Where a backward kernel puts its sums over rows: the results themselves or partial sums."""

    def __init__(self, like, b, slope, need_db, need_dslope, splits, slope_width, n):
        self.db = torch.empty_like(b) if need_db else like.new_empty(0)
        self.dslope = torch.empty_like(slope) if need_dslope else like.new_empty(0)
        self._reduce = []
        self.db_partial = self._partial(self.db, splits, n) if need_db else None
        self.dslope_partial = (
            self._partial(self.dslope, splits, slope_width) if need_dslope else None
        )

    def _partial(self, out, splits, width):
        if splits == 1 and out.numel() == width and out.is_contiguous():
            return out
        partial = out.new_empty((splits, width), dtype=torch.float32)
        self._reduce.append((partial.view(-1, 1) if out.numel() == 1 else partial, out))
        return partial

    def finish(self):
        """db and dslope, after the backward kernel was launched."""
        for partial, out in self._reduce:
            column_sum(partial, out)
        return self.db, self.dslope


def zero_sums(like, b, slope, need_db, need_dslope):
    """db and dslope of an empty batch."""
    db = torch.zeros_like(b) if need_db else like.new_empty(0)
    return db, torch.zeros_like(slope) if need_dslope else like.new_empty(0)


def _flat(contiguous, b, slope_count, threshold):
    """True where no element needs its column: the tensor is then one long row."""
    return contiguous and b is None and slope_count < 2 and threshold == 0


def bias_act_dropout_fwd(x, b, slope, state, act, alpha, threshold, scale, layer, row_offset):
    """y (..., N)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    mode, bits = dropout_arguments(threshold)
    slope_count = slopes(act, slope)
    x2 = x.view(1, -1) if _flat(x.is_contiguous(), b, slope_count, mode) else rows_view(x)
    m, n = x2.shape
    block_m, block_n, warps = tiles.elementwise_tile(m, n)
    launch(
        bias_act_dropout_fwd_kernel,
        cdiv(m, block_m) * cdiv(n, block_n),
        x,
        y,
        x2,
        vector(b),
        vector(slope) if slope_count else None,
        state if mode == 1 else None,
        m,
        n,
        x2.stride(0),
        x2.stride(1),
        alpha,
        bits,
        scale,
        layer,
        row_offset,
        ACT=act,
        SLOPES=slope_count,
        DROPOUT=mode,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        warps=warps,
    )
    return y


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
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    if dz.numel() == 0:
        return dz, *zero_sums(dy, b, slope, need_db, need_dslope)
    mode, bits = dropout_arguments(threshold)
    slope_count = slopes(act, slope)
    saved = dy if saves == 0 else saved
    sums = need_db or need_dslope
    contiguous = dy.is_contiguous() and saved.is_contiguous() and not sums
    bias = vector(b) if saves == 2 else None
    if _flat(contiguous, bias, slope_count, mode):
        dy2, saved2 = dy.view(1, -1), saved.view(1, -1)
    else:
        dy2, saved2 = rows_view(dy), rows_view(saved)
    m, n = dy2.shape
    if sums:
        block_m, block_n, warps = tiles.column_tile(m, n)
    else:
        block_m, block_n, warps = tiles.elementwise_tile(m, n)
    tiles_n = cdiv(n, block_n)
    steps, splits = tiles.row_splits(m, block_m, tiles_n, sums)
    slope_width = n if slope_count == 2 else tiles_n
    out = SlopeAndBiasSums(dy, b, slope, need_db, need_dslope, splits, slope_width, n)
    launch(
        bias_act_dropout_bwd_kernel,
        splits * tiles_n,
        dy,
        dz,
        out.db_partial,
        out.dslope_partial,
        dy2,
        saved2,
        bias,
        vector(slope) if slope_count else None,
        state if mode == 1 else None,
        m,
        n,
        steps,
        dy2.stride(0),
        dy2.stride(1),
        saved2.stride(0),
        saved2.stride(1),
        alpha,
        bits,
        scale,
        layer,
        row_offset,
        ACT=act,
        SLOPES=slope_count,
        SAVES=saves,
        DROPOUT=mode,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        warps=warps,
    )
    return dz, *out.finish()
