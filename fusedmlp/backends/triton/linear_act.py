"""linear_act: y = drop(act(x w^T + b)) in one kernel.

A program computes one (BLOCK_M, BLOCK_N) tile of y over all of K with an fp32 accumulator, and then
runs the epilogue (bias, activation, dropout) on it while it is still in registers. Rows beyond M,
columns beyond N and the ragged end of K are masked.

Small outputs with a long K are split along K: a program of the first kernel computes one tile over
its part of K and stores it in fp32, and one of the second adds the parts of a tile, in order of K,
and runs the epilogue. There are no atomics, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl

from . import bias_act_dropout
from .epilogue import Epilogue, load_key, store_outputs
from .gemm import Matrix, Product, matmul_tile, tile_of, use_library
from .launch import epilogue_arguments, launch, rows_view
from .tiles import Tile, cdiv, elementwise_tile


@triton.jit(do_not_specialize=["threshold", "stream_offset", "row_offset"])
def linear_act_fwd_kernel(
    y_ptr, preact_ptr,  # (M, N) contiguous; preact_ptr may be None
    x_ptr, w_ptr,  # (M, K) and (N, K), or descriptors
    bias_ptr, slope_ptr, state_ptr,
    M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk,
    alpha: tl.float32, threshold: tl.int32, scale: tl.float32,
    stream_offset: tl.int64, row_offset: tl.int64,
    ACT: tl.constexpr, SLOPES: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y = drop(act(x w^T + b)) and, if asked for, preact = x w^T; one tile a program."""
    e = Epilogue(bias_ptr, slope_ptr, state_ptr, alpha, threshold, scale, stream_offset, row_offset)
    x, w = Matrix(x_ptr, stride_xm, stride_xk), Matrix(w_ptr, stride_wn, stride_wk)
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row, column = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    preact = matmul_tile(
        x, w, row, column, 0, K, M, N,
        PRECISION, DESCRIPTORS, EVEN_K, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    # Read after the main loop, so that they take no register in it.
    key = load_key(e, DROPOUT)
    store_outputs(
        y_ptr, preact_ptr, preact, key, row, column, M, N, e,
        ACT, SLOPES, DROPOUT, PARTS, BLOCK_M, BLOCK_N,
    )


@triton.jit
def linear_act_split_kernel(
    partial_ptr,  # (splits, M, N) fp32
    x_ptr, w_ptr,  # (M, K) and (N, K), or descriptors
    M, N, K, split_k,
    stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """partial[s] = x w^T over the s-th group of split_k columns; one tile a program."""
    x, w = Matrix(x_ptr, stride_xm, stride_xk), Matrix(w_ptr, stride_wn, stride_wk)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    split = tl.program_id(0) // tiles
    tile_m, tile_n = tile_of(tl.program_id(0) % tiles, tiles_m, tiles_n, GROUP_M)
    row, column = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    # split_k is a multiple of BLOCK_K, so only the last split has a ragged end.
    first_k = split * split_k
    sums = matmul_tile(
        x, w, row, column, first_k, min(first_k + split_k, K), M, N,
        PRECISION, DESCRIPTORS, EVEN_K, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    at = (split.to(tl.int64) * M + rows)[:, None] * N + columns[None, :]
    tl.store(partial_ptr + at, sums, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["threshold", "stream_offset", "row_offset", "splits"])
def linear_act_merge_kernel(
    y_ptr, preact_ptr,  # (M, N) contiguous; preact_ptr may be None
    partial_ptr,  # (splits, M, N) fp32
    bias_ptr, slope_ptr, state_ptr,
    M, N, splits,
    alpha: tl.float32, threshold: tl.int32, scale: tl.float32,
    stream_offset: tl.int64, row_offset: tl.int64,
    ACT: tl.constexpr, SLOPES: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """The epilogue of linear_act on partial[0] + partial[1] + ...; one tile a program."""
    e = Epilogue(bias_ptr, slope_ptr, state_ptr, alpha, threshold, scale, stream_offset, row_offset)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    row, column = pid // tiles_n * BLOCK_M, pid % tiles_n * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = partial_ptr + rows[:, None] * N + columns[None, :]
    preact = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(splits):
        preact += tl.load(at, mask=inside, other=0.0)
        # M may be a Python number: Triton makes one of every argument that is 1.
        at += tl.cast(M, tl.int64) * N
    key = load_key(e, DROPOUT)
    store_outputs(
        y_ptr, preact_ptr, preact, key, row, column, M, N, e,
        ACT, SLOPES, DROPOUT, 1, BLOCK_M, BLOCK_N,
    )


def _split_along_k(p, outputs, x, pointers, numbers, constants):
    """The two kernels of a product that is split along K."""
    split_k = p.split_k()
    splits = cdiv(p.k, split_k)
    partial = torch.empty((splits, p.m, p.n), dtype=torch.float32, device=x.device)
    sizes = p.m, p.n, p.k, split_k
    launch(
        linear_act_split_kernel, p.tiles * splits, x,
        partial, *p.operands, *sizes, *p.strides, **p.constants,
    )
    block_m, block_n, warps = elementwise_tile(p.m, p.n)
    launch(
        linear_act_merge_kernel, cdiv(p.m, block_m) * cdiv(p.n, block_n), x,
        *outputs, partial, *pointers, p.m, p.n, splits, *numbers,
        **constants, BLOCK_M=block_m, BLOCK_N=block_n, warps=warps,
    )


def run(x, w, e, keep_preact: bool, tile: Tile | None = None):
    """(y, preact), preact None unless keep_preact. tile: for tests and tuning."""
    shape = (*x.shape[:-1], w.shape[0])
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    x2 = rows_view(x)
    m, k = x2.shape
    if tile is None and use_library(x2, w):
        preact = torch.mm(x2, w.t()).view(shape)
        y = bias_act_dropout.bias_act_dropout_fwd(preact, e)
        return y, preact if keep_preact else None
    outputs = y, torch.empty_like(y) if keep_preact else None
    if y.numel() == 0:
        return outputs
    pointers, numbers, constants = epilogue_arguments(e)
    p = Product(x2, w, "linear_act", tile, lambda t: run(x, w, e, keep_preact, t))
    if p.tile.splits > 1 and k > p.tile.k:
        _split_along_k(p, outputs, x, pointers, numbers, constants)
    else:
        launch(
            linear_act_fwd_kernel, p.tiles, x,
            *outputs, *p.operands, *pointers, m, p.n, k, *p.strides, *numbers,
            **constants, PARTS=p.tile.parts, **p.constants,
        )
    return outputs


def linear_act_fwd(x, w, e):
    """y (..., N) and preact = x @ w.T (..., N), rounded to x's dtype, without the bias."""
    return run(x, w, e, keep_preact=True)


def linear_act_infer(x, w, e):
    """y (..., N)."""
    return run(x, w, e, keep_preact=False)[0]
