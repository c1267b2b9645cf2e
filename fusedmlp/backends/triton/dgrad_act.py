"""dgrad_act: the input-gradient GEMM of a layer with the backward epilogue of the one before it.

    dy = dz W                                  dz (M, N)   W (N, K)   dy (M, K), never stored
    dz_before = keep ? dy * scale * act'(z_before) : 0
    db_before, dslope_before = sums over rows

A program computes one (BLOCK_M, BLOCK_N) tile of dz_before over all of N; rows, columns and the end
of N are masked. Sums over rows: each program stores those of its tile, a second kernel adds them in
a fixed order. No pointwise kernel runs between two GEMMs of a backward pass.
"""

import torch
import triton
import triton.language as tl

from . import bias_act_dropout
from .bias_act_dropout import SlopeAndBiasSums, zero_sums
from .device import tile_of
from .epilogue import in_store_layout, load_slope, load_stream, pre_activation_grad
from .gemm import Product, column_parts, product_tile, use_library
from .launch import dropout_arguments, launch, rows_view, slopes, vector


@triton.jit(do_not_specialize=["threshold", "layer", "row_offset"])
def dgrad_act_kernel(
    out_ptr,  # (M, N) contiguous: dz of the layer before
    db_ptr,  # (row tiles, N) fp32 or None
    dslope_ptr,  # (row tiles, N), (tiles, PARTS) fp32 or None
    x_ptr,  # (M, K): dz, or a descriptor
    w_ptr,  # (N, K): W transposed, or a descriptor
    saved_ptr,  # (M, N) or None
    b_ptr,  # (N,) or None
    slope_ptr,  # (1,) or (N,) or None
    state_ptr,  # (2,) int64 or None
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
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
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = keep ? (x w^T) * scale * act' : 0, and its sums over rows; one tile a program."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_row, first_column = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    product = product_tile(
        x_ptr,
        w_ptr,
        first_row,
        first_column,
        0,
        K,
        M,
        N,
        K,
        stride_xm,
        stride_xk,
        stride_wn,
        stride_wk,
        PRECISION,
        DESCRIPTORS,
        EVEN_K,
        UPCAST,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    seed, stream = load_stream(state_ptr, layer, DROPOUT)
    row = first_row + tl.arange(0, BLOCK_M)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = column_parts(product, PARTS, BLOCK_M, BLOCK_N)
    for i in tl.static_range(PARTS):
        first = first_column + i * WIDTH
        column = first + tl.arange(0, WIDTH)
        inside_n = column < N
        inside = (row < M)[:, None] & inside_n[None, :]
        dy = in_store_layout(parts[i], BLOCK_M, WIDTH)
        saved, bias = dy, 0.0
        if SAVES != 0:
            saved_at = saved_ptr + row[:, None] * stride_sm + column[None, :] * stride_sn
            saved = tl.load(saved_at, mask=inside, other=0.0).to(tl.float32)
        if b_ptr is not None:
            bias = tl.load(b_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        dz, terms = pre_activation_grad(
            dy,
            saved,
            bias,
            load_slope(slope_ptr, alpha, column, inside_n, SLOPES),
            scale,
            seed,
            stream,
            first_row + row_offset,
            first,
            threshold,
            ACT,
            SAVES,
            DROPOUT,
            dslope_ptr is not None,
            out_ptr.dtype.element_ty == tl.float32,
            BLOCK_M,
            WIDTH,
        )
        tl.store(out_ptr + row[:, None] * N + column[None, :], dz, mask=inside)
        # Rows outside hold 0 * act'(0): zeros, unless act' was read off a bias that is not finite.
        sums_at = tile_m.to(tl.int64) * N + column
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


def dgrad_act(
    dz,
    w,
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
    tile=None,
):
    """dz, db and dslope of the layer before, from dz (..., N) and w (N, K) of a layer.

    The arguments after w are those of bias_act_dropout_bwd, of the layer before: saved (..., K),
    b (K,). Equal to bias_act_dropout_bwd(dz @ w, ...) without the rounding in between.
    """
    dz2 = rows_view(dz)
    (m, inner), n = dz2.shape, w.shape[1]
    epilogue = b, slope, state, act, alpha, threshold, scale, layer, row_offset, saves
    if tile is None and use_library(dz2, w.t()):
        dy = torch.mm(dz2, w).view(*dz.shape[:-1], n)
        return bias_act_dropout.bias_act_dropout_bwd(dy, saved, *epilogue, need_db, need_dslope)
    out = torch.empty((*dz.shape[:-1], n), dtype=dz.dtype, device=dz.device)
    if out.numel() == 0:
        return out, *zero_sums(dz, b, slope, need_db, need_dslope)
    mode, bits = dropout_arguments(threshold)
    slope_count = slopes(act, slope)
    saved2 = rows_view(saved) if saves else out.view(m, n)
    p = Product(dz2, w.t(), "dgrad_act", tile)
    slope_width = n if slope_count == 2 else p.tiles_n * p.tile.backward_parts
    sums = SlopeAndBiasSums(dz, b, slope, need_db, need_dslope, p.tiles_m, slope_width, n)
    launch(
        dgrad_act_kernel,
        p.tiles,
        dz,
        out,
        sums.db_partial,
        sums.dslope_partial,
        *p.operands,
        saved2 if saves else None,
        vector(b) if saves == 2 else None,
        vector(slope) if slope_count else None,
        state if mode == 1 else None,
        m,
        n,
        inner,
        *p.strides,
        *saved2.stride(),
        alpha,
        bits,
        scale,
        layer,
        row_offset,
        ACT=act,
        SLOPES=slope_count,
        SAVES=saves,
        DROPOUT=mode,
        PARTS=p.tile.backward_parts,
        **p.constants,
    )
    return out, *sums.finish()
