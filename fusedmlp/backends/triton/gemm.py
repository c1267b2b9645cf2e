"""What the GEMM kernels share: the main loop; on the host, operands, tile and precision."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import dtypes
from . import tile_cache, tiles
from .launch import INTERPRET, capability
from .tiles import cdiv

# `tl.dot` takes tf32 unless told otherwise; half-precision products are exact whatever is said.
_PRECISION = {"half": "ieee", "ieee": "ieee", "tf32": "tf32"}


@triton.jit
def product_tile(
    x_ptr,
    w_ptr,
    first_row,
    first_column,
    first_k,
    end_k,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) fp32 of x (M, K) times w (N, K) transposed, over k in [first_k, end_k).

    DESCRIPTORS  0: pointers and strides. 1: x_ptr, w_ptr are tensor descriptors of x and w.
                 2: w_ptr is one of w transposed, that is of (K, N).
    EVEN_K       end_k - first_k is a multiple of BLOCK_K; else only the last part may be ragged
    UPCAST       bf16 to fp32 before the product: in the interpreter, which cannot multiply bf16
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS != 0:
        # The copy engine fills what lies outside with 0. Its coordinates are 32-bit.
        row, column = first_row.to(tl.int32), first_column.to(tl.int32)
        for k in range(first_k, end_k, BLOCK_K):
            x = x_ptr.load([row, k])
            if DESCRIPTORS == 1:
                w = w_ptr.load([column, k]).T
            else:
                w = w_ptr.load([k, column])
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    else:
        row = first_row + tl.arange(0, BLOCK_M)
        column = first_column + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        k_at = first_k + inner.to(tl.int64)
        x_at = x_ptr + row[:, None] * stride_xm + k_at[None, :] * stride_xk
        w_at = w_ptr + column[None, :] * stride_wn + k_at[:, None] * stride_wk
        x_in, w_in = (row < M)[:, None], (column < N)[None, :]
        for k in range(first_k, end_k, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_at, mask=x_in, other=0.0)
                w = tl.load(w_at, mask=w_in, other=0.0)
            else:
                k_in = inner < end_k - k
                x = tl.load(x_at, mask=x_in & k_in[None, :], other=0.0)
                w = tl.load(w_at, mask=w_in & k_in[:, None], other=0.0)
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            x_at += BLOCK_K * stride_xk
            w_at += BLOCK_K * stride_wk
    return acc


@triton.jit
def _halves(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return t.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


@triton.jit
def column_parts(t, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The PARTS equal parts of t's columns, left to right. Free: each is some of the registers."""
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4 or PARTS == 8, "1, 2, 4 or 8 parts")
    parts = (t,)
    if PARTS > 1:
        a, b = _halves(t, BLOCK_M, BLOCK_N)
        parts = (a, b)
        if PARTS > 2:
            a, c = _halves(parts[0], BLOCK_M, BLOCK_N // 2)
            e, g = _halves(parts[1], BLOCK_M, BLOCK_N // 2)
            parts = (a, c, e, g)
            if PARTS > 4:
                a, b = _halves(parts[0], BLOCK_M, BLOCK_N // 4)
                c, d = _halves(parts[1], BLOCK_M, BLOCK_N // 4)
                e, f = _halves(parts[2], BLOCK_M, BLOCK_N // 4)
                g, h = _halves(parts[3], BLOCK_M, BLOCK_N // 4)
                parts = (a, b, c, d, e, f, g, h)
    return parts


def kind_of(dtype: torch.dtype) -> str:
    """'half', or for fp32 'ieee' or 'tf32' as torch's setting says at this moment."""
    return dtypes.fp32_matmul_mode() if dtype == torch.float32 else "half"


def use_library(x: Tensor, w: Tensor) -> bool:
    """True where the library's GEMM of x (M, K) and w (N, K) and one epilogue kernel are better."""
    if x.shape[0] * w.shape[0] * w.shape[1] <= tiles.LARGEST_SLOW_PRODUCT:
        return False
    return kind_of(x.dtype) == "ieee" or _odd(x, w)


def _odd(x: Tensor, w: Tensor) -> bool:
    """True where Triton reads an operand element by element: what it knows of a stride is whether
    it is a multiple of 16."""
    w = w if w.stride(1) == 1 else w.t()
    return any(
        t.stride(1) != 1 or (t.stride(0) % 16 and t.shape[0] > 1) or t.data_ptr() % 16
        for t in (x, w)
    )


def _describable(t: Tensor) -> bool:
    """Row-major with 16-byte aligned rows: what the copy engine takes."""
    return (
        t.stride(1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) >= t.shape[1]
        and t.data_ptr() % 16 == 0
        and max(t.shape) < 1 << 31
    )


@functools.lru_cache(maxsize=1024)
def _constants(kind: str, descriptors: int, even_k: bool, upcast: bool, tile: tiles.Tile) -> dict:
    """Compile-time constants of a product, with warps and stages. Not to be written to."""
    return {
        "PRECISION": _PRECISION[kind],
        "DESCRIPTORS": descriptors,
        "EVEN_K": even_k,
        "UPCAST": upcast,
        "GROUP_M": tiles.GROUP_M,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "warps": tile.warps,
        "stages": tile.stages,
    }


class Product:
    """One x (M, K) times w (N, K) transposed: operands, tile and constants for a kernel's call."""

    def __init__(self, x: Tensor, w: Tensor, op: str, tile: tiles.Tile | None = None):
        (m, k), n = x.shape, w.shape[0]
        kind = kind_of(x.dtype)
        target = capability(x)
        self.m, self.n, self.k = m, n, k
        self.tile = tile = tile or tile_cache.choose(op, kind, m, n, k, x, target, _odd(x, w))
        by_k = w.stride(1) != 1
        descriptors = 0
        if tile.descriptors and k and _describable(x) and _describable(w.t() if by_k else w):
            descriptors = 2 if by_k else 1
        self.operands = self._described(x, w, by_k) if descriptors else (x, w)
        self.strides = (*x.stride(), *w.stride())
        self.constants = _constants(
            kind, descriptors, k % tile.k == 0, INTERPRET and x.dtype == torch.bfloat16, tile
        )
        self.tiles_m, self.tiles_n = cdiv(m, tile.m), cdiv(n, tile.n)
        self.tiles = self.tiles_m * self.tiles_n

    def _described(self, x: Tensor, w: Tensor, by_k: bool):
        from triton.tools.tensor_descriptor import TensorDescriptor

        tile = self.tile
        # Not from_tensor: a (1, K) tensor may report any stride for its one row.
        left = TensorDescriptor(x, list(x.shape), list(x.stride()), [tile.m, tile.k])
        w, block = (w.t(), [tile.k, tile.n]) if by_k else (w, [tile.n, tile.k])
        return left, TensorDescriptor(w, list(w.shape), list(w.stride()), block)

    def split_k(self) -> int:
        """k of one split, a multiple of BLOCK_K."""
        steps = cdiv(self.k, self.tile.k)
        return cdiv(steps, self.tile.splits) * self.tile.k
