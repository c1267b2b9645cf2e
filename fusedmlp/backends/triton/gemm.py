"""What the GEMM kernels share: the main loop; on the host, operands, tile and precision."""

import functools
from collections.abc import Callable
from typing import NamedTuple

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


class Matrix(NamedTuple):
    """An operand inside a kernel: a pointer and two strides, or a tensor descriptor."""

    ptr: tl.tensor
    stride_row: tl.tensor
    stride_col: tl.tensor


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of the pid-th tile, walking GROUP_M rows of tiles at a time.

    Programs that run together then share rows of one operand and columns of the other in L2.
    """
    in_group = GROUP_M * tiles_n
    first = (pid // in_group) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    inside = pid % in_group
    return first + inside % height, inside // height


@triton.jit
def matmul_tile(x, w, row, column, first_k, end_k, M, N,
                PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_K: tl.constexpr,
                UPCAST: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_M, BLOCK_N) fp32 of x (M, K) times w (N, K) transposed, over k in [first_k, end_k).

    row, column  int64, of the tile's first element
    DESCRIPTORS  0: pointers and strides. 1: tensor descriptors of x and w.
                 2: the descriptor of w is one of w transposed, that is of (K, N).
    EVEN_K       end_k - first_k is a multiple of BLOCK_K; else only the last part may be ragged
    UPCAST       bf16 to fp32 before the product: in the interpreter, which cannot multiply bf16

    Without descriptors, rows beyond M, columns beyond N and, unless EVEN_K, k beyond end_k are
    masked: they are read as 0 and add nothing.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS != 0:
        # The copy engine fills what lies outside with 0. Its coordinates are 32-bit.
        row, column = row.to(tl.int32), column.to(tl.int32)
        for k in range(first_k, end_k, BLOCK_K):
            a = x.ptr.load([row, k])
            if DESCRIPTORS == 1:
                b = w.ptr.load([column, k]).T
            else:
                b = w.ptr.load([k, column])
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        # 64-bit: k times a stride may exceed 2^31.
        k_at = first_k + inner.to(tl.int64)
        x_at = x.ptr + rows[:, None] * x.stride_row + k_at[None, :] * x.stride_col
        w_at = w.ptr + columns[None, :] * w.stride_row + k_at[:, None] * w.stride_col
        x_in, w_in = (rows < M)[:, None], (columns < N)[None, :]
        for k in range(first_k, end_k, BLOCK_K):
            if EVEN_K:
                a = tl.load(x_at, mask=x_in, other=0.0)
                b = tl.load(w_at, mask=w_in, other=0.0)
            else:
                k_in = inner < end_k - k
                a = tl.load(x_at, mask=x_in & k_in[None, :], other=0.0)
                b = tl.load(w_at, mask=w_in & k_in[:, None], other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            # Both pointers step to the next BLOCK_K columns of their matrix.
            x_at += BLOCK_K * x.stride_col
            w_at += BLOCK_K * w.stride_col
    return acc


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

    def __init__(
        self,
        x: Tensor,
        w: Tensor,
        op: str,
        tile: tiles.Tile | None = None,
        run_with: Callable[[tiles.Tile], object] | None = None,
    ):
        """tile: to take, or None to choose one. run_with(tile) runs this very call with a tile, for
        a size that is tuned at its first call."""
        (m, k), n = x.shape, w.shape[0]
        kind = kind_of(x.dtype)
        target = capability(x)
        self.m, self.n, self.k = m, n, k
        odd = _odd(x, w)
        self.tile = tile = tile or tile_cache.choose(op, kind, m, n, k, x, target, odd, run_with)
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
