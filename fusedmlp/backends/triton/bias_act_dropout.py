"""bias_act_dropout: y = drop(act(x + b)), forward and backward, without a GEMM.

A program handles tiles of BLOCK_M rows and BLOCK_N columns; rows beyond M and columns beyond N are
masked. Sums over rows are done in two stages in a fixed order: a program adds its own rows, then
one kernel adds the sums of all programs. There are no atomics.
"""

import torch
import triton
import triton.language as tl

from . import tiles
from .activations import act_fwd
from .epilogue import Epilogue, drop, load_key, load_slope, preactivation_grad
from .launch import epilogue_arguments, launch, rows_view
from .tiles import cdiv


@triton.jit(do_not_specialize=["threshold", "stream_offset", "row_offset"])
def bias_act_dropout_fwd_kernel(
    y_ptr,  # (M, N) contiguous
    x_ptr,  # (M, N)
    bias_ptr, slope_ptr, state_ptr,
    M, N,
    stride_xm, stride_xn,
    alpha: tl.float32, threshold: tl.int32, scale: tl.float32,
    stream_offset: tl.int64, row_offset: tl.int64,
    ACT: tl.constexpr, SLOPES: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """y = drop(act(x + b)); one tile a program."""
    e = Epilogue(bias_ptr, slope_ptr, state_ptr, alpha, threshold, scale, stream_offset, row_offset)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    row, column = pid // tiles_n * BLOCK_M, pid % tiles_n * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    inside_n = columns < N
    inside = (rows < M)[:, None] & inside_n[None, :]

    x_at = x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xn
    z = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    slope = load_slope(e, columns, inside_n, SLOPES)
    y = act_fwd(z, slope, ACT, y_ptr.dtype.element_ty == tl.float32)
    if DROPOUT != 0:
        key = load_key(e, DROPOUT)
        # The tile was loaded in the layout of masks, so nothing has to change its layout here.
        y = drop(y * scale, key, row, column, e, DROPOUT, BLOCK_M, BLOCK_N)
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["threshold", "stream_offset", "row_offset", "steps"])
def bias_act_dropout_bwd_kernel(
    dz_ptr,  # (M, N) contiguous
    db_ptr, dslope_ptr,  # (splits, N), dslope_ptr also (splits, column tiles); or None
    dy_ptr, saved_ptr,  # (M, N); saved_ptr may be None
    bias_ptr, slope_ptr, state_ptr,
    M, N, steps,
    stride_dym, stride_dyn, stride_sm, stride_sn,
    alpha: tl.float32, threshold: tl.int32, scale: tl.float32,
    stream_offset: tl.int64, row_offset: tl.int64,
    ACT: tl.constexpr, SLOPES: tl.constexpr, DROPOUT: tl.constexpr, SAVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dz = keep ? dy * scale * act' : 0, and its sums over rows; a column of tiles a program."""
    e = Epilogue(bias_ptr, slope_ptr, state_ptr, alpha, threshold, scale, stream_offset, row_offset)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    split, tile_n = pid // tiles_n, pid % tiles_n
    column = tile_n * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    inside_n = columns < N
    # What belongs to the columns is loaded once for all tiles of the program.
    bias = 0.0
    if bias_ptr is not None and SAVES == 2:
        bias = tl.load(bias_ptr + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    slope = load_slope(e, columns, inside_n, SLOPES)
    key = load_key(e, DROPOUT)
    # Added up tile by tile and over rows only at the end: one reduction a program.
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dslope = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        row = (split * steps + step) * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & inside_n[None, :]
        dy_at = dy_ptr + rows[:, None] * stride_dym + columns[None, :] * stride_dyn
        # Outside, dy = 0 makes both sums 0.
        dy = tl.load(dy_at, mask=inside, other=0.0).to(tl.float32)
        saved = dy
        if SAVES != 0:
            saved_at = saved_ptr + rows[:, None] * stride_sm + columns[None, :] * stride_sn
            saved = tl.load(saved_at, mask=inside, other=0.0).to(tl.float32)
        dz, terms = preactivation_grad(
            dy, saved, bias, slope, key, row, column, e,
            ACT, SAVES, DROPOUT, dslope_ptr is not None, dz_ptr.dtype.element_ty == tl.float32,
            BLOCK_M, BLOCK_N,
        )
        tl.store(dz_ptr + rows[:, None] * N + columns[None, :], dz, mask=inside)
        if db_ptr is not None:
            db += tl.where(inside, dz, 0.0)
        if dslope_ptr is not None:
            dslope += tl.where(inside, terms, 0.0)
    if db_ptr is not None:
        tl.store(db_ptr + split * N + columns, tl.sum(db, axis=0), mask=inside_n)
    if dslope_ptr is not None:
        by_column = tl.sum(dslope, axis=0)
        if SLOPES == 2:
            tl.store(dslope_ptr + split * N + columns, by_column, mask=inside_n)
        else:
            tl.store(dslope_ptr + pid, tl.sum(by_column, axis=0))


@triton.jit
def column_sum_kernel(
    out_ptr,  # (N,) contiguous
    partial_ptr,  # (S, N) contiguous fp32
    S, N,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
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
    blocks = dict(BLOCK_S=block_s, BLOCK_N=block_n)
    launch(column_sum_kernel, cdiv(n, block_n), partial, out, partial, s, n, **blocks, warps=warps)
    return out


class SlopeAndBiasSums:
    """Where a backward kernel puts its sums over rows: the results themselves or partial sums.

    outputs  the pointers db_ptr and dslope_ptr of the kernel, None where a sum is not wanted
    """

    def __init__(self, like, e, need_db, need_dslope, splits, slope_width, n):
        self.db = torch.empty_like(e.bias) if need_db else like.new_empty(0)
        self.dslope = torch.empty_like(e.slope) if need_dslope else like.new_empty(0)
        self._reduce = []
        self.outputs = (
            self._partial(self.db, splits, n) if need_db else None,
            self._partial(self.dslope, splits, slope_width) if need_dslope else None,
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


def zero_sums(like, e, need_db, need_dslope):
    """db and dslope of an empty batch."""
    db = torch.zeros_like(e.bias) if need_db else like.new_empty(0)
    return db, torch.zeros_like(e.slope) if need_dslope else like.new_empty(0)


def _needs_no_column(bias, slope_count, threshold):
    """True where no element needs its column: a contiguous tensor is then one long row."""
    return bias is None and slope_count < 2 and threshold == 0


def bias_act_dropout_fwd(x, e):
    """y (..., N)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    pointers, numbers, constants = epilogue_arguments(e)
    one_row = _needs_no_column(pointers[0], constants["SLOPES"], constants["DROPOUT"])
    x2 = x.view(1, -1) if one_row and x.is_contiguous() else rows_view(x)
    m, n = x2.shape
    block_m, block_n, warps = tiles.elementwise_tile(m, n)
    launch(
        bias_act_dropout_fwd_kernel, cdiv(m, block_m) * cdiv(n, block_n), x,
        y, x2, *pointers, m, n, *x2.stride(), *numbers,
        **constants, BLOCK_M=block_m, BLOCK_N=block_n, warps=warps,
    )
    return y


def bias_act_dropout_bwd(dy, saved, e, saves, need_db, need_dslope):
    """dz (..., N), db (N,) and dslope: gradients of the preactivation, the bias and the slope."""
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    if dz.numel() == 0:
        return dz, *zero_sums(dy, e, need_db, need_dslope)
    pointers, numbers, constants = epilogue_arguments(e, saves)
    saved = dy if saves == 0 else saved
    sums = need_db or need_dslope
    contiguous = dy.is_contiguous() and saved.is_contiguous() and not sums
    if contiguous and _needs_no_column(pointers[0], constants["SLOPES"], constants["DROPOUT"]):
        dy2, saved2 = dy.view(1, -1), saved.view(1, -1)
    else:
        dy2, saved2 = rows_view(dy), rows_view(saved)
    m, n = dy2.shape
    tile = tiles.column_tile(m, n) if sums else tiles.elementwise_tile(m, n, backward=True)
    block_m, block_n, warps = tile
    tiles_n = cdiv(n, block_n)
    steps, splits = tiles.row_splits(m, block_m, tiles_n, sums)
    slope_width = n if constants["SLOPES"] == 2 else tiles_n
    out = SlopeAndBiasSums(dy, e, need_db, need_dslope, splits, slope_width, n)
    launch(
        bias_act_dropout_bwd_kernel, splits * tiles_n, dy,
        dz, *out.outputs, dy2, saved2, *pointers,
        m, n, steps, *dy2.stride(), *saved2.stride(), *numbers,
        **constants, SAVES=saves, BLOCK_M=block_m, BLOCK_N=block_n, warps=warps,
    )
    return dz, *out.finish()
