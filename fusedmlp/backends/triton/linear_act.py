"""linear_act: y = drop(act(x w^T + b)) in one kernel, bias, activation and dropout in its epilogue.

A program computes one (BLOCK_M, BLOCK_N) tile of y over all of K, fp32 accumulator; rows, columns
and the end of K are masked. Small outputs with a long K are split along K: partial sums go to fp32
memory, and a second kernel adds them in a fixed order and applies the epilogue. No atomics.
"""

import torch
import triton
import triton.language as tl

from . import bias_act_dropout
from . import tiles as configs
from .device import tile_of
from .epilogue import load_stream, store_outputs, store_part
from .gemm import Product, product_tile, use_library
from .launch import dropout_arguments, launch, rows_view, slopes, vector
from .tiles import cdiv


@triton.jit(do_not_specialize=["threshold", "layer", "row_offset"])
def linear_act_fwd_kernel(
    y_ptr,  # (M, N) contiguous
    h_ptr,  # (M, N) contiguous, or None
    x_ptr,  # (M, K), or a descriptor
    w_ptr,  # (N, K), or a descriptor
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
    alpha: tl.float32,
    threshold: tl.int32,
    scale: tl.float32,
    layer: tl.int64,
    row_offset: tl.int64,
    ACT: tl.constexpr,
    SLOPES: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = drop(act(x w^T + b)) and, if asked for, h = x w^T; one tile a program."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_row, first_column = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    h = product_tile(
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
    store_outputs(
        y_ptr,
        h_ptr,
        h,
        b_ptr,
        slope_ptr,
        seed,
        stream,
        first_row,
        first_column,
        M,
        N,
        alpha,
        threshold,
        scale,
        first_row + row_offset,
        ACT,
        SLOPES,
        DROPOUT,
        PARTS,
        BLOCK_M,
        BLOCK_N,
    )


@triton.jit
def linear_act_split_kernel(
    partial_ptr,  # (splits, M, N) fp32
    x_ptr,
    w_ptr,
    M,
    N,
    K,
    split_k,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[s] = x w^T over the s-th stretch of split_k columns; one tile a program."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    split = tl.program_id(0) // tiles
    tile_m, tile_n = tile_of(tl.program_id(0) % tiles, tiles_m, tiles_n, GROUP_M)
    first_row, first_column = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    first_k = split * split_k
    h = product_tile(
        x_ptr,
        w_ptr,
        first_row,
        first_column,
        first_k,
        min(first_k + split_k, K),
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
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    at = (split.to(tl.int64) * M + row)[:, None] * N + column[None, :]
    tl.store(partial_ptr + at, h, mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["threshold", "layer", "row_offset", "splits"])
def linear_act_merge_kernel(
    y_ptr,
    h_ptr,
    partial_ptr,  # (splits, M, N) fp32
    b_ptr,
    slope_ptr,
    state_ptr,
    M,
    N,
    splits,
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
    """The epilogue of linear_act on the sum of the partial products, added in order of K."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    first_row, first_column = pid // tiles_n * BLOCK_M, pid % tiles_n * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    inside = (row < M)[:, None] & (column < N)[None, :]
    at = partial_ptr + row[:, None] * N + column[None, :]
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(splits):
        h += tl.load(at, mask=inside, other=0.0)
        # M may be a Python number: Triton makes one of every argument that is 1.
        at += tl.cast(M, tl.int64) * N
    seed, stream = load_stream(state_ptr, layer, DROPOUT)
    store_part(
        y_ptr,
        h_ptr,
        h,
        b_ptr,
        slope_ptr,
        seed,
        stream,
        first_row,
        first_column,
        M,
        N,
        alpha,
        threshold,
        scale,
        first_row + row_offset,
        ACT,
        SLOPES,
        DROPOUT,
        BLOCK_M,
        BLOCK_N,
    )


def _epilogue_arguments(b, slope, state, act, threshold):
    """(pointers, bits of the threshold, constants) of the epilogue."""
    mode, bits = dropout_arguments(threshold)
    slope_count = slopes(act, slope)
    pointers = vector(b), vector(slope) if slope_count else None, state if mode == 1 else None
    return pointers, bits, {"ACT": act, "SLOPES": slope_count, "DROPOUT": mode}


def _split_along_k(p, y, h, x, pointers, numbers, constants):
    """The two kernels of a product that is split along K."""
    split_k = p.split_k()
    splits = cdiv(p.k, split_k)
    partial = torch.empty((splits, p.m, p.n), dtype=torch.float32, device=x.device)
    launch(
        linear_act_split_kernel,
        p.tiles * splits,
        x,
        partial,
        *p.operands,
        p.m,
        p.n,
        p.k,
        split_k,
        *p.strides,
        **p.constants,
    )
    block_m, block_n, warps = configs.elementwise_tile(p.m, p.n)
    launch(
        linear_act_merge_kernel,
        cdiv(p.m, block_m) * cdiv(p.n, block_n),
        x,
        y,
        h,
        partial,
        *pointers,
        p.m,
        p.n,
        splits,
        *numbers,
        **constants,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        warps=warps,
    )


def run(x, w, b, slope, state, act, alpha, threshold, scale, layer, row_offset, keep_h, tile=None):
    """(y, h), h None unless keep_h. tile: of tiles.py, for tests and tuning."""
    shape = (*x.shape[:-1], w.shape[0])
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    x2 = rows_view(x)
    m, k = x2.shape
    if tile is None and use_library(x2, w):
        h = torch.mm(x2, w.t()).view(shape)
        epilogue = b, slope, state, act, alpha, threshold, scale, layer, row_offset
        return bias_act_dropout.bias_act_dropout_fwd(h, *epilogue), h if keep_h else None
    h = torch.empty_like(y) if keep_h else None
    if y.numel() == 0:
        return y, h
    pointers, bits, constants = _epilogue_arguments(b, slope, state, act, threshold)
    numbers = alpha, bits, scale, layer, row_offset
    p = Product(x2, w, "linear_act", tile)
    if p.tile.splits > 1 and k > p.tile.k:
        _split_along_k(p, y, h, x, pointers, numbers, constants)
    else:
        launch(
            linear_act_fwd_kernel,
            p.tiles,
            x,
            y,
            h,
            *p.operands,
            *pointers,
            m,
            p.n,
            k,
            *p.strides,
            *numbers,
            **constants,
            PARTS=p.tile.parts,
            **p.constants,
        )
    return y, h


def linear_act_fwd(x, w, b, slope, state, act, alpha, threshold, scale, layer, row_offset):
    """y (..., N) and h = x @ w.T (..., N), rounded to x's dtype, without the bias."""
    epilogue = b, slope, state, act, alpha, threshold, scale, layer, row_offset
    return run(x, w, *epilogue, keep_h=True)


def linear_act_infer(x, w, b, slope, state, act, alpha, threshold, scale, layer, row_offset):
    """y (..., N)."""
    epilogue = b, slope, state, act, alpha, threshold, scale, layer, row_offset
    return run(x, w, *epilogue, keep_h=False)[0]
