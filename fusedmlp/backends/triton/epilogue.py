"""What stands around every product and every elementwise tile: mask, outputs, backward.

Loads of seed and slope, the selection of what is kept, the outputs of a forward pass and the
gradient of a backward pass. Implements philox.py through device.py. Holds no kernel.
"""

import triton
import triton.language as tl

from ...spec import activations as table
from .device import act_fwd, act_grad_y, act_grad_z, join8, keep_tile, keep_words, quotient, split8
from .gemm import column_parts

NONE = tl.constexpr(table.NONE)
RELU = tl.constexpr(table.RELU)
RELU_SQUARED = tl.constexpr(table.RELU_SQUARED)
SAVE_Y = tl.constexpr(table.SAVE_Y)
SAVE_Z = tl.constexpr(table.SAVE_Z)

# What the compile-time constant DROPOUT of every kernel may be.
KEEP_ALL = tl.constexpr(0)
KEEP_SOME = tl.constexpr(1)
KEEP_NONE = tl.constexpr(2)


@triton.jit
def load_stream(state_ptr, layer, DROPOUT: tl.constexpr):
    """(seed, stream) of this call, int64; not read where no random bit is used."""
    seed, stream = layer, layer
    if DROPOUT == KEEP_SOME:
        seed = tl.load(state_ptr)
        stream = tl.load(state_ptr + 1) + layer
    return seed, stream


@triton.jit
def load_slope(slope_ptr, alpha, column, inside, SLOPES: tl.constexpr):
    """Slope to broadcast against (rows, columns): alpha, the one element, or one a column."""
    slope = alpha
    if SLOPES == 1:
        slope = tl.load(slope_ptr).to(tl.float32)
    elif SLOPES == 2:
        slope = tl.load(slope_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return slope


@triton.jit
def drop(
    y,
    seed,
    stream,
    first_row,
    first_column,
    threshold,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y where an element is kept, +0 elsewhere: selected, never multiplied. y is scaled already."""
    if DROPOUT == KEEP_SOME:
        keep = keep_tile(seed, stream, first_row, first_column, threshold, BLOCK_M, BLOCK_N)
        y = tl.where(keep, y, 0.0)
    elif DROPOUT == KEEP_NONE:
        y = tl.zeros_like(y)
    return y


@triton.jit
def drop_after_product(
    y,
    seed,
    stream,
    first_row,
    first_column,
    threshold,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`drop` for the result of a GEMM, in its final dtype: y moves to the masks, not they to it."""
    if DROPOUT == KEEP_SOME:
        k0, k1, k2, k3, k4, k5, k6, k7 = keep_words(
            seed, stream, first_row, first_column, threshold, BLOCK_M, BLOCK_N
        )
        y0, y1, y2, y3, y4, y5, y6, y7 = split8(y, BLOCK_M, BLOCK_N)
        y = join8(
            tl.where(k0, y0, 0.0),
            tl.where(k1, y1, 0.0),
            tl.where(k2, y2, 0.0),
            tl.where(k3, y3, 0.0),
            tl.where(k4, y4, 0.0),
            tl.where(k5, y5, 0.0),
            tl.where(k6, y6, 0.0),
            tl.where(k7, y7, 0.0),
            BLOCK_M,
            BLOCK_N,
        )
    elif DROPOUT == KEEP_NONE:
        y = tl.zeros_like(y)
    return y


@triton.jit
def in_store_layout(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """t itself, moved once from a product's layout to the one of masks, loads and stores."""
    a, b, c, d, e, f, g, h = split8(t, BLOCK_M, BLOCK_N)
    return join8(a, b, c, d, e, f, g, h, BLOCK_M, BLOCK_N)


@triton.jit
def pre_activation_grad(
    dy,
    saved,
    bias,
    slope,
    scale,
    seed,
    stream,
    first_row,
    first_column,
    threshold,
    ACT: tl.constexpr,
    SAVES: tl.constexpr,
    DROPOUT: tl.constexpr,
    SLOPE_GRAD: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dz and the terms of dslope, both (BLOCK_M, BLOCK_N) fp32, of dy: the whole backward epilogue.

    saved, bias  y, or h and the bias that goes with it, or anything where SAVES says so
    """
    g = dy * scale if DROPOUT != KEEP_ALL else dy
    terms = g
    if SAVES == SAVE_Z:
        z = saved + bias
        dz = g * act_grad_z(z, slope, ACT, EXACT)
        if SLOPE_GRAD:
            terms = tl.where(z > 0, 0.0, g * z)
    elif SAVES == SAVE_Y:
        if ACT == RELU:
            # y alone holds the joint mask of ReLU and dropout; a NaN passes.
            dz = tl.where(saved <= 0, 0.0, g)
        else:
            a = saved * quotient(1.0, scale, EXACT) if DROPOUT != KEEP_ALL else saved
            dz = g * act_grad_y(a, slope, ACT, EXACT)
            if ACT == RELU_SQUARED:
                # A square that overflowed: the derivative was finite, so no gradient stays none.
                dz = tl.where((g == 0) & (a > 0), g, dz)
    else:
        tl.static_assert(ACT == NONE, "this derivative needs a saved tensor")
        dz = g
    if ACT != RELU or SAVES == SAVE_Z:
        # One mask for both, as the compiler merges the two calls.
        dz = drop(dz, seed, stream, first_row, first_column, threshold, DROPOUT, BLOCK_M, BLOCK_N)
        if SLOPE_GRAD:
            terms = drop(
                terms, seed, stream, first_row, first_column, threshold, DROPOUT, BLOCK_M, BLOCK_N
            )
    elif DROPOUT == KEEP_NONE:
        dz = tl.zeros_like(dz)
    return dz, terms


@triton.jit
def store_part(
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
    counter_row,
    ACT: tl.constexpr,
    SLOPES: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Stores h (BLOCK_M, BLOCK_N) where it is wanted, and y = drop(act(h + b))."""
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    inside_n = column < N
    inside = (row < M)[:, None] & inside_n[None, :]
    at = row[:, None] * N + column[None, :]
    if h_ptr is not None:
        tl.store(h_ptr + at, h, mask=inside)
    z = h
    if b_ptr is not None:
        z += tl.load(b_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    slope = load_slope(slope_ptr, alpha, column, inside_n, SLOPES)
    y = act_fwd(z, slope, ACT, dtype == tl.float32)
    if DROPOUT != 0:
        # Rounded before the selection: then only y changes its layout for the store, not the mask.
        y = drop_after_product(
            (y * scale).to(dtype),
            seed,
            stream,
            counter_row,
            first_column,
            threshold,
            DROPOUT,
            BLOCK_M,
            BLOCK_N,
        )
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def store_outputs(
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
    counter_row,
    ACT: tl.constexpr,
    SLOPES: tl.constexpr,
    DROPOUT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """store_part on PARTS parts of h's columns, one after the other.

    A wide tile's accumulator fills half of a thread's registers: with the whole of it in flight
    the epilogue spills (128 x 256, gelu, dropout: 648 bytes a thread).
    """
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    parts = column_parts(h, PARTS, BLOCK_M, BLOCK_N)
    for i in tl.static_range(PARTS):
        store_part(
            y_ptr,
            h_ptr,
            parts[i],
            b_ptr,
            slope_ptr,
            seed,
            stream,
            first_row,
            first_column + i * WIDTH,
            M,
            N,
            alpha,
            threshold,
            scale,
            counter_row,
            ACT,
            SLOPES,
            DROPOUT,
            BLOCK_M,
            WIDTH,
        )
