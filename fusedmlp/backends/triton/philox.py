"""The dropout mask in Triton: the bits of spec/philox.py, in whatever tile an element lies.

The bits of an element depend on (seed, stream, row, column) alone. One call of Philox makes 128
bits, which are read as eight overlapping windows of 32: eight neighbouring columns share a call.
"""

import triton
import triton.language as tl

from .layout import join8


@triton.jit
def _mul_wide(a, M: tl.constexpr):
    """Low and high words of the 64-bit product of 32-bit words."""
    product = a.to(tl.uint64) * tl.full((), M, tl.uint64)
    return product.to(tl.uint32), (product >> 32).to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox 4x32-10 of spec/philox.py on uint32 words that broadcast against each other.

    Words are kept in the smallest shape they have: in the first rounds most of them depend on the
    row or the column alone.
    """
    for _ in tl.static_range(10):
        lo0, hi0 = _mul_wide(c0, 0xD2511F53)
        lo1, hi1 = _mul_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep_words(key, row, column, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Eight (BLOCK_M, BLOCK_N // 8) masks: the c-th holds the columns with column mod 8 = c.

    key          (seed, stream), int64
    row, column  int64, of the tile's first element; row_offset is part of row, and column is a
                 multiple of 8, as BLOCK_N is
    threshold    int32 with the bits of T < 2^32: an element is kept where its window is >= T
    """
    tl.static_assert(BLOCK_N % 8 == 0, "eight columns share one Philox call")
    seed, stream = key
    t = threshold.to(tl.uint32, bitcast=True)
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.uint32)[:, None]
    group = (column // 8 + tl.arange(0, BLOCK_N // 8)).to(tl.uint32)[None, :]
    stream_low, stream_high = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    seed_low, seed_high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(group, rows, stream_low, stream_high, seed_low, seed_high)
    # The windows begin at bits 0, 16, 32, ... of the 128, and the last one wraps round.
    return (
        w0 >= t,
        ((w0 >> 16) | (w1 << 16)) >= t,
        w1 >= t,
        ((w1 >> 16) | (w2 << 16)) >= t,
        w2 >= t,
        ((w2 >> 16) | (w3 << 16)) >= t,
        w3 >= t,
        ((w3 >> 16) | (w0 << 16)) >= t,
    )


@triton.jit
def keep_tile(key, row, column, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N): whether each element is kept. Arguments as in keep_words."""
    k0, k1, k2, k3, k4, k5, k6, k7 = keep_words(key, row, column, threshold, BLOCK_M, BLOCK_N)
    return join8(k0, k1, k2, k3, k4, k5, k6, k7, BLOCK_M, BLOCK_N)
