"""What stands behind every product and every elementwise tile: bias, activation, mask, stores.

    forward   y = keep ? act(preact + bias) * scale : 0          preact = x w^T, or x itself
    backward  dz = keep ? dy * scale * act'(z) : 0               z = preact + bias

A kernel takes flat arguments and makes an Epilogue of them in its first line: Triton specialises
only what it is handed by itself (do_not_specialize does not reach into a tuple). Rows at or beyond
M and columns at or beyond N are masked at every load and store. This file holds no kernel.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...spec import activations as table
from .activations import act_fwd, act_grad_y, act_grad_z, quotient
from .layout import column_parts, join8, split8
from .philox import keep_tile, keep_words

NONE = tl.constexpr(table.NONE)
RELU = tl.constexpr(table.RELU)
RELU_SQUARED = tl.constexpr(table.RELU_SQUARED)
SAVE_Y = tl.constexpr(table.SAVE_Y)
SAVE_PREACT = tl.constexpr(table.SAVE_PREACT)

# What the compile-time constant DROPOUT of every kernel may be.
KEEP_ALL = tl.constexpr(0)
KEEP_SOME = tl.constexpr(1)
KEEP_NONE = tl.constexpr(2)


class Epilogue(NamedTuple):
    """The arguments of one call that its epilogue reads, inside a kernel."""

    bias_ptr: tl.tensor  # (N,), or None
    slope_ptr: tl.tensor  # (1,) or (N,) as SLOPES says, or None
    state_ptr: tl.tensor  # (2,) int64, seed and stream, or None
    alpha: tl.tensor  # fp32, slope of leaky_relu
    threshold: tl.tensor  # int32 with the bits of T
    scale: tl.tensor  # fp32, 1 / (1 - p)
    stream_offset: tl.tensor  # int64, added to the stream
    row_offset: tl.tensor  # int64, added to the row index in the mask


@triton.jit
def load_key(e, DROPOUT: tl.constexpr):
    """(seed, stream) of this call, int64; nothing is read where no random bit is used."""
    seed, stream = e.stream_offset, e.stream_offset
    if DROPOUT == KEEP_SOME:
        seed = tl.load(e.state_ptr)
        stream = tl.load(e.state_ptr + 1) + e.stream_offset
    return seed, stream


@triton.jit
def load_slope(e, column, inside, SLOPES: tl.constexpr):
    """Slope to broadcast against (rows, columns): alpha, the one element, or one a column."""
    slope = e.alpha
    if SLOPES == 1:
        slope = tl.load(e.slope_ptr).to(tl.float32)
    elif SLOPES == 2:
        slope = tl.load(e.slope_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return slope


@triton.jit
def drop(y, key, row, column, e,
         DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y where an element is kept, +0 elsewhere: selected, never multiplied. y is scaled already.

    row, column  of the tile's first element in the output
    """
    if DROPOUT == KEEP_SOME:
        keep = keep_tile(key, row + e.row_offset, column, e.threshold, BLOCK_M, BLOCK_N)
        y = tl.where(keep, y, 0.0)
    elif DROPOUT == KEEP_NONE:
        y = tl.zeros_like(y)
    return y


@triton.jit
def drop_after_product(y, key, row, column, e,
                       DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`drop` for the result of a product, in its final dtype: y moves to the masks, not they to it.

    Masks are made in eight parts. y is split into the same eight, and that is the one change of its
    layout.
    """
    if DROPOUT == KEEP_SOME:
        k0, k1, k2, k3, k4, k5, k6, k7 = keep_words(
            key, row + e.row_offset, column, e.threshold, BLOCK_M, BLOCK_N
        )
        y0, y1, y2, y3, y4, y5, y6, y7 = split8(y, BLOCK_M, BLOCK_N)
        y = join8(
            tl.where(k0, y0, 0.0), tl.where(k1, y1, 0.0),
            tl.where(k2, y2, 0.0), tl.where(k3, y3, 0.0),
            tl.where(k4, y4, 0.0), tl.where(k5, y5, 0.0),
            tl.where(k6, y6, 0.0), tl.where(k7, y7, 0.0),
            BLOCK_M, BLOCK_N,
        )
    elif DROPOUT == KEEP_NONE:
        y = tl.zeros_like(y)
    return y


@triton.jit
def preactivation_grad(dy, saved, bias, slope, key, row, column, e,
                       ACT: tl.constexpr, SAVES: tl.constexpr, DROPOUT: tl.constexpr,
                       SLOPE_GRAD: tl.constexpr, EXACT: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dz and the terms of dslope, both (BLOCK_M, BLOCK_N) fp32, of dy: the whole backward epilogue.

    saved, bias  y, or preact and the bias that goes with it, or anything where SAVES says so
    """
    g = dy * e.scale if DROPOUT != KEEP_ALL else dy
    terms = g
    if SAVES == SAVE_PREACT:
        z = saved + bias
        dz = g * act_grad_z(z, slope, ACT, EXACT)
        if ACT == RELU or ACT == RELU_SQUARED:
            # Selected, as everything that is off: 0 times an infinite gradient would be NaN.
            dz = tl.where(z <= 0, 0.0, dz)
        if SLOPE_GRAD:
            terms = tl.where(z > 0, 0.0, g * z)
    elif SAVES == SAVE_Y:
        if ACT == RELU:
            # y alone holds the joint mask of ReLU and dropout; a NaN passes.
            dz = tl.where(saved <= 0, 0.0, g)
        else:
            a = saved * quotient(1.0, e.scale, EXACT) if DROPOUT != KEEP_ALL else saved
            dz = g * act_grad_y(a, slope, ACT, EXACT)
            if ACT == RELU_SQUARED:
                # A square that overflowed: the derivative was finite, so no gradient stays none.
                dz = tl.where((g == 0) & (a > 0), g, dz)
                dz = tl.where(a <= 0, 0.0, dz)
    else:
        tl.static_assert(ACT == NONE, "this derivative needs a saved tensor")
        dz = g
    if ACT != RELU or SAVES == SAVE_PREACT:
        # Both calls make the same mask, and the compiler merges them.
        dz = drop(dz, key, row, column, e, DROPOUT, BLOCK_M, BLOCK_N)
        if SLOPE_GRAD:
            terms = drop(terms, key, row, column, e, DROPOUT, BLOCK_M, BLOCK_N)
    elif DROPOUT == KEEP_NONE:
        dz = tl.zeros_like(dz)
    return dz, terms


@triton.jit
def _store_part(y_ptr, preact_ptr, preact, key, row, column, M, N, e,
                ACT: tl.constexpr, SLOPES: tl.constexpr, DROPOUT: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """store_outputs for one part of a tile."""
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    inside_n = columns < N
    inside = (rows < M)[:, None] & inside_n[None, :]
    at = rows[:, None] * N + columns[None, :]
    if preact_ptr is not None:
        tl.store(preact_ptr + at, preact, mask=inside)
    z = preact
    if e.bias_ptr is not None:
        z += tl.load(e.bias_ptr + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    slope = load_slope(e, columns, inside_n, SLOPES)
    y = act_fwd(z, slope, ACT, dtype == tl.float32)
    if DROPOUT != KEEP_ALL:
        # Rounded before the selection: then only y changes its layout for the store, not the mask.
        y = (y * e.scale).to(dtype)
        y = drop_after_product(y, key, row, column, e, DROPOUT, BLOCK_M, BLOCK_N)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def store_outputs(y_ptr, preact_ptr, preact, key, row, column, M, N, e,
                  ACT: tl.constexpr, SLOPES: tl.constexpr, DROPOUT: tl.constexpr,
                  PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Stores preact (BLOCK_M, BLOCK_N) where it is wanted, and y = drop(act(preact + bias)).

    The columns are taken in PARTS parts, one after the other. The accumulator of a wide tile fills
    half of a thread's registers: with the whole of it in flight the epilogue spills (128 x 256,
    gelu, dropout: 648 bytes a thread).
    """
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = column_parts(preact, PARTS, BLOCK_M, BLOCK_N)
    for i in tl.static_range(PARTS):
        _store_part(
            y_ptr, preact_ptr, parts[i], key, row, column + i * WIDTH, M, N, e,
            ACT, SLOPES, DROPOUT, BLOCK_M, WIDTH,
        )
