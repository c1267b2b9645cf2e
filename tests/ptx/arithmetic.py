"""What PTX opcodes compute, on NumPy arrays over threads or on NumPy scalars where all agree.

Nothing is changed in place: a register may share its array with another. Sources: the PTX ISA.
"""

import numpy as np

f16, f32, f64 = np.float16, np.float32, np.float64
u16, u32, u64 = np.uint16, np.uint32, np.uint64
i16, i32, i64 = np.int16, np.int32, np.int64

TINY = f64(2.0**-126)  # the smallest normal fp32
LOW_BITS, TIE = u64(0x1FFFFFFF), u64(0x10000000)  # of fp64, which fp32 does not have


class Approximations:
    """Where in their documented error the approximations lie, in units in the last place."""

    side = 0  # -1 and 1: at the lower and upper end; 0: correctly rounded


def select(a, b, p):
    return (a if p else b) if p.ndim == 0 else np.where(p, a, b)


# --- fp32 ---------------------------------------------------------------------------------------


def _exact_sum(a, b):
    """fp64 sum, rounded to nearest, and what that rounding left out."""
    s = a + b
    part = s - a
    return s, (a - (s - part)) + (b - part)


def _to_odd(s, rest):
    """s with the last bit set where something is left out, cut towards zero: rounds only once."""
    bits = s.view(u64)
    toward = np.where((rest > 0) == (s > 0), bits + u64(1), bits - u64(1))
    fix = (rest != 0) & ((bits & u64(1)) == 0) & np.isfinite(s)
    return np.where(fix, toward, bits).view(f64)


def fma(a, b, c):
    """round(a * b + c), rounded once. The product of two fp32 numbers is exact in fp64."""
    product = np.multiply(a, b, dtype=f64)
    s = product + c
    rounded = s.astype(f32)
    # A second rounding does harm only where the first made a tie, and among denormals.
    risky = (s.view(u64) & LOW_BITS) == TIE
    size = np.abs(s)
    if not risky.any() and size.min() >= TINY:
        return rounded
    risky = risky | ((size < TINY) & (size > 0))
    if not risky.any():
        return rounded
    odd = _to_odd(*_exact_sum(product, np.asarray(c, dtype=f64)))
    return np.where(risky, odd.astype(f32), rounded)[()]


def _directed(s, rest, down):
    """The exact s + rest as fp32, rounded to -inf where `down`, else to +inf."""
    nearest = s.astype(f32)
    gap = (nearest - s) - rest  # the sign of what rounding to nearest added
    with_down = np.where(gap > 0, np.nextafter(nearest, f32(-np.inf)), nearest)
    with_up = np.where(gap < 0, np.nextafter(nearest, f32(np.inf)), nearest)
    return np.where(np.isfinite(s), np.where(down, with_down, with_up), nearest)[()]


def fma_down(a, b, c):
    return _directed(*_exact_sum(np.multiply(a, b, dtype=f64), np.asarray(c, dtype=f64)), True)


def add_to_zero(a, b):
    s, rest = _exact_sum(np.asarray(a, dtype=f64), np.asarray(b, dtype=f64))
    return _directed(s, rest, s > 0)


def saturate(a):
    """[0, 1]; a NaN becomes 0."""
    return np.fmin(np.fmax(a, f32(0)), f32(1))


def _off_by(exact, ulps):
    """Rounded to fp32, then as far off as is documented."""
    rounded = exact.astype(f32)
    if not Approximations.side:
        return rounded
    moved = rounded
    for _ in range(ulps):
        moved = np.nextafter(moved, f32(Approximations.side * np.inf))
    keep = (rounded == 0) | ~np.isfinite(rounded) | (moved == 0) | ~np.isfinite(moved)
    return np.where(keep, rounded, moved)[()]


def flush(a):
    """Denormals as zeros of their sign."""
    return np.where(np.abs(a) < f32(TINY), np.copysign(f32(0), a), a)[()]


def exp2_approx(a):
    """At most 2 ulp off; exactly 1 at 0."""
    result = _off_by(np.exp2(a.astype(f64)), 2)
    return np.where(a == 0, f32(1), result)[()]


def exp2_approx_ftz(a):
    return flush(exp2_approx(flush(a)))


def rcp_approx_ftz(a):
    """At most 1 ulp off."""
    return flush(_off_by(f64(1) / flush(a).astype(f64), 1))


# --- 16-bit floats ------------------------------------------------------------------------------


def to_half(a):
    return np.where(a == a, a.astype(f16).view(u16), u16(0x7FFF))[()]


def from_half(bits):
    return bits.view(f16).astype(f32)


def to_bfloat(a):
    bits = a.view(u32)
    rounded = (bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)
    return np.where(a == a, rounded, u32(0x7FFF)).astype(u16)[()]


def from_bfloat(bits):
    return (bits.astype(u32) << u32(16)).view(f32)


def pair(low, high):
    """Two 16-bit numbers as 32 bits."""
    return low.astype(u32) | (high.astype(u32) << u32(16))


def pair64(low, high):
    return low.astype(u64) | (high.astype(u64) << u64(32))


# --- integers -----------------------------------------------------------------------------------


def mul_high_u64(a, b):
    low, half = u64(0xFFFFFFFF), u64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    carry = (middle & low) + a0 * b1
    return a1 * b1 + (middle >> half) + (carry >> half)


def divide(a, b):
    """Towards zero, as C does."""
    if (b == 0).any():
        raise ZeroDivisionError("a division of integers by 0")
    if a.dtype.kind == "u":
        return a // b
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient)[()]


def funnel_left(low, high, by):
    """The upper 32 of the 64 bits (high, low), shifted left by `by` modulo 32."""
    by = (by & u32(31)).astype(u64)
    return ((pair64(low, high) << by) >> u64(32)).astype(u32)


def insert_bits(a, b, at, count):
    """b with its `count` bits from bit `at` on taken from the low bits of a."""
    mask = ((u32(1) << count) - u32(1)) << at
    return (a << at & mask) | (b & ~mask)


# --- warps --------------------------------------------------------------------------------------

# With g = lane / 4 and t = lane % 4, half h of register i of a lane's fragment is
#   a   row g + 8 (i odd), column 2 t + h + 8 (i >= 2)
#   b   row 2 t + h + 8 i, column g
#   d   row g + 8 (i >= 2), column 2 t + i % 2      (registers are fp32)


def mma_16x8x16(to_float, a, b, c):
    """d (16, 8) = a (16, 16) b (16, 8) + c of each warp, its 32 lanes one after the other."""
    left = np.stack(a).view(u16).reshape(2, 2, -1, 8, 4, 2)  # (i / 2, i % 2, warp, g, t, h)
    left = to_float(left.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)).astype(f64)
    right = np.stack(b).view(u16).reshape(2, -1, 8, 4, 2)  # (i, warp, g, t, h)
    right = to_float(right.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)).astype(f64)
    add = np.stack(c).reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
    d = _accumulate(left, right, add)
    d = d.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    return d[0], d[1], d[2], d[3]


def _accumulate(left, right, add):
    if not Approximations.side:
        return (left @ right + add).astype(f32)
    # Tensor cores add a few products at a time and cut off what does not fit.
    for k in range(0, 16, 8):
        s = left[:, :, k : k + 8] @ right[:, k : k + 8] + add
        add = _directed(s, np.zeros_like(s), s > 0)
    return add


def ldmatrix_x4(rows):
    """rows (lanes, 4): of lane 8 i + r, row r of matrix i. Lane l gets word l % 4 of row l / 4."""
    d = rows.reshape(-1, 4, 32).transpose(1, 0, 2).reshape(4, -1)
    return d[0], d[1], d[2], d[3]


def shuffle_xor(a, mask, clamp, members):
    if mask.ndim or clamp != 31 or members != 0xFFFFFFFF:
        raise NotImplementedError("a shuffle of less than a warp, or by lanes of their own")
    return a.reshape(-1, 32)[:, np.arange(32) ^ int(mask)].reshape(-1)
