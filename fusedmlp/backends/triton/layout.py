"""Takes tiles apart by columns and puts them together.

On a GPU a tile lies in the registers of a program's threads; its layout says which thread holds
which element. A product has the layout of the tensor-core instruction. Loads, stores and masks
have one that gives a thread eight neighbouring columns, which one 16-byte instruction moves and one
Philox call covers. A change of layout goes through shared memory and is the dearest step of an
epilogue, so the functions here are written so that it happens once for each element.
"""

import triton
import triton.language as tl


@triton.jit
def split8(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Eight (BLOCK_M, BLOCK_N // 8): the columns of t with column mod 8 = 0 to 7.

    A split of a dimension costs nothing where one thread holds both halves.
    """
    # column = 8 group + 4 i + 2 j + k. The dimension i is split first: after a product it lies
    # across the lanes of a warp, so the layout changes here, to eight columns a thread. That is the
    # layout of the store, and the two splits that follow rename registers.
    cube = t.reshape(BLOCK_M, BLOCK_N // 8, 2, 2, 2).permute(0, 1, 4, 3, 2)
    low, high = cube.split()
    low_even, low_odd = low.split()
    high_even, high_odd = high.split()
    a, b = low_even.split()
    c, d = low_odd.split()
    e, f = high_even.split()
    g, h = high_odd.split()
    return a, b, c, d, e, f, g, h


@triton.jit
def join8(a, b, c, d, e, f, g, h, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) from its columns mod 8 = 0 to 7; the inverse of split8.

    Joining pairs them in the order of the bits of the column: 4, then 2, then 1. A thread holds all
    eight, so this renames registers.
    """
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def in_store_layout(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """t itself, moved once from a product's layout to the one of masks, loads and stores."""
    a, b, c, d, e, f, g, h = split8(t, BLOCK_M, BLOCK_N)
    return join8(a, b, c, d, e, f, g, h, BLOCK_M, BLOCK_N)


@triton.jit
def _halves(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of t's columns."""
    return t.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


@triton.jit
def column_parts(t, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The PARTS equal parts of t's columns, left to right.

    After a product a thread holds elements of each part, so a part is some of its registers and the
    split costs nothing. An epilogue that takes one part after the other needs fewer registers at a
    time than one that takes the whole tile.
    """
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
