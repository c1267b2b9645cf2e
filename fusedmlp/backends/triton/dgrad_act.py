"""dgrad_act: the input-gradient GEMM of a layer with the backward epilogue of the layer before it.

    dy = dz W                                  dz (M, N)   W (N, K)   dy (M, K), never stored
    dz_before = keep ? dy * scale * act'(z_before) : 0
    db_before, dslope_before = sums over rows

The kernel has the names of every product here: x (M, K) for dz, w (N, K) for W transposed, so its K
is the N above. A program computes one (BLOCK_M, BLOCK_N) tile of dz_before over all of that K. Rows
beyond M, columns beyond N and the ragged end of K are masked. Sums over rows: each program stores
those of its tile, and a second kernel adds them in a fixed order. No pointwise kernel runs between
two GEMMs of a backward pass.
"""

import torch
import triton
import triton.language as tl

from . import bias_act_dropout
from .bias_act_dropout import SlopeAndBiasSums, zero_sums
from .epilogue import Epilogue, load_key, load_slope, preactivation_grad
from .gemm import Matrix, Product, matmul_tile, tile_of, use_library
from .launch import epilogue_arguments, launch, rows_view
from .layout import column_parts, in_store_layout


@triton.jit(do_not_specialize=["threshold", "stream_offset", "row_offset"])
def dgrad_act_kernel(
    out_ptr,  # (M, N) contiguous: dz of the layer before
    db_ptr, dslope_ptr,  # fp32 sums of each tile of rows: (row tiles, N), or one a part; or None
    x_ptr, w_ptr,  # dz (M, K) and W transposed (N, K), or descriptors
    saved_ptr,  # (M, N) or None
    bias_ptr, slope_ptr, state_ptr,
    M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_sn,
    alpha: tl.float32, threshold: tl.int32, scale: tl.float32,
    stream_offset: tl.int64, row_offset: tl.int64,
    ACT: tl.constexpr, SLOPES: tl.constexpr, DROPOUT: tl.constexpr, SAVES: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """out = keep ? (x w^T) * scale * act' : 0, and its sums over rows; one tile a program."""
    e = Epilogue(bias_ptr, slope_ptr, state_ptr, alpha, threshold, scale, stream_offset, row_offset)
    x, w = Matrix(x_ptr, stride_xm, stride_xk), Matrix(w_ptr, stride_wn, stride_wk)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row, first_column = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    product = matmul_tile(
        x, w, row, first_column, 0, K, M, N,
        PRECISION, DESCRIPTORS, EVEN_K, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    key = load_key(e, DROPOUT)
    rows = row + tl.arange(0, BLOCK_M)
    # One part of the columns after the other, as in store_outputs, in the layout of loads.
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = column_parts(product, PARTS, BLOCK_M, BLOCK_N)
    for i in tl.static_range(PARTS):
        column = first_column + i * WIDTH
        columns = column + tl.arange(0, WIDTH)
        inside_n = columns < N
        inside = (rows < M)[:, None] & inside_n[None, :]
        dy = in_store_layout(parts[i], BLOCK_M, WIDTH)
        saved, bias = dy, 0.0
        if SAVES != 0:
            saved_at = saved_ptr + rows[:, None] * stride_sm + columns[None, :] * stride_sn
            saved = tl.load(saved_at, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        slope = load_slope(e, columns, inside_n, SLOPES)
        dz, terms = preactivation_grad(
            dy, saved, bias, slope, key, row, column, e,
            ACT, SAVES, DROPOUT, dslope_ptr is not None, out_ptr.dtype.element_ty == tl.float32,
            BLOCK_M, WIDTH,
        )
        tl.store(out_ptr + rows[:, None] * N + columns[None, :], dz, mask=inside)
        # Rows outside hold 0 * act'(0): zeros, unless act' was read off a bias that is not finite.
        sums_at = tile_m.to(tl.int64) * N + columns
        if db_ptr is not None:
            db = tl.sum(tl.where(inside, dz, 0.0), axis=0)
            tl.store(db_ptr + sums_at, db, mask=inside_n)
        if dslope_ptr is not None:
            dslope = tl.sum(tl.where(inside, terms, 0.0), axis=0)
            if SLOPES == 2:
                tl.store(dslope_ptr + sums_at, dslope, mask=inside_n)
            else:
                at = (tile_m * tl.cdiv(N, BLOCK_N) + tile_n) * PARTS + i
                tl.store(dslope_ptr + at, tl.sum(dslope, axis=0))


def dgrad_act(dz, w, saved, e, saves, need_db, need_dslope, tile=None):
    """dz, db and dslope of the layer before, from dz (..., N) and w (N, K) of a layer.

    The arguments after w are those of bias_act_dropout_bwd for the layer before: saved (..., K),
    e.bias (K,). Equal to bias_act_dropout_bwd(dz @ w, saved, ...) without the rounding in between.
    """
    dz2 = rows_view(dz)
    (m, inner), n = dz2.shape, w.shape[1]
    if tile is None and use_library(dz2, w.t()):
        dy = torch.mm(dz2, w).view(*dz.shape[:-1], n)
        return bias_act_dropout.bias_act_dropout_bwd(dy, saved, e, saves, need_db, need_dslope)
    out = torch.empty((*dz.shape[:-1], n), dtype=dz.dtype, device=dz.device)
    if out.numel() == 0:
        return out, *zero_sums(dz, e, need_db, need_dslope)
    pointers, numbers, constants = epilogue_arguments(e, saves)
    saved2 = rows_view(saved) if saves else out.view(m, n)

    def again(tile):
        return dgrad_act(dz, w, saved, e, saves, need_db, need_dslope, tile)

    p = Product(dz2, w.t(), "dgrad_act", tile, again)
    slope_width = n if constants["SLOPES"] == 2 else p.tiles_n * p.tile.backward_parts
    sums = SlopeAndBiasSums(dz, e, need_db, need_dslope, p.tiles_m, slope_width, n)
    launch(
        dgrad_act_kernel, p.tiles, dz,
        out, *sums.outputs, *p.operands, saved2 if saves else None, *pointers,
        m, n, inner, *p.strides, *saved2.stride(), *numbers,
        **constants, SAVES=saves, PARTS=p.tile.backward_parts, **p.constants,
    )
    return out, *sums.finish()
