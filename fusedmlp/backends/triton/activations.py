"""Activations and their derivatives in Triton, with the ids and meanings of spec/activations.py.

Everything is computed in fp32 with functions of Triton's own language, so that the interpreter runs
the code that a GPU runs. On a GPU, erf and log come from libdevice, while exp, sqrt and `/` are
approximations that can be wrong by two units in the last place of fp32 and more. A 16-bit result
does not show that. EXACT says that the result is fp32: exp is then computed here, and quotients are
corrected. This file holds no kernel and reads no memory.
"""

import triton
import triton.language as tl

from ...spec import activations as table

NONE = tl.constexpr(table.NONE)
RELU = tl.constexpr(table.RELU)
LEAKY_RELU = tl.constexpr(table.LEAKY_RELU)
PRELU = tl.constexpr(table.PRELU)
ELU = tl.constexpr(table.ELU)
SIGMOID = tl.constexpr(table.SIGMOID)
TANH = tl.constexpr(table.TANH)
SOFTPLUS = tl.constexpr(table.SOFTPLUS)
GELU = tl.constexpr(table.GELU)
GELU_TANH = tl.constexpr(table.GELU_TANH)
SILU = tl.constexpr(table.SILU)
RELU_SQUARED = tl.constexpr(table.RELU_SQUARED)

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
KAPPA = tl.constexpr(0.044715)
LOG2_E = tl.constexpr(1.4426950408889634)
# ln(2) as a sum: the first has 15 bits, so that its products with small whole numbers are exact.
LN_2 = tl.constexpr(0.693145751953125)
LN_2_REST = tl.constexpr(1.428606765330187e-06)
# exp(z) is taken for 0 below it.
LOWEST = tl.constexpr(-87.0)
# A tensor stands left of these in products: the interpreter does not know it on the right.


@triton.jit
def _power_and_rest(z):
    """2^n and exp(r) - 1 for z = n ln(2) + r, |r| <= ln(2) / 2, where LOWEST <= z <= -LOWEST."""
    # 1.5 * 2^23 leaves no bits for a fraction, and n in the lowest ones.
    shifted = z * LOG2_E + 12582912.0
    n = shifted - 12582912.0
    r = (z - n * LN_2) - n * LN_2_REST
    # (exp(r) - 1 - r) / r^2; the error relative to exp(r) - 1 is 1.6e-8.
    q = r * 0.0013946646358817816 + 0.008366698399186134
    q = q * r + 0.04166628047823906
    q = q * r + 0.16666541993618011
    q = q * r + 0.5
    bits = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return bits.to(tl.float32, bitcast=True), r * (q * r + 1.0)


@triton.jit
def exp_negative(z, EXACT: tl.constexpr):
    """exp(z) for z <= 0."""
    if EXACT:
        power, rest = _power_and_rest(z)
        # This way round NaN stays.
        e = tl.where(z < LOWEST, 0.0, power * rest + power)
    else:
        e = tl.exp(z)
    return e


@triton.jit
def quotient(a, b, EXACT: tl.constexpr):
    """a / b, both finite, b in [1, 2^32]."""
    if EXACT:
        # One step of Newton's method leaves the rounding alone. It takes half of the registers
        # that tl.div_rn does, which calls a function for quotients that cannot occur here.
        r = 1.0 / b
        q = a * r
        q = tl.fma(tl.fma(-b, q, a), r, q)
    else:
        q = a / b
    return q


@triton.jit
def _sigmoids(z, EXACT: tl.constexpr):
    """sigmoid(z) and sigmoid(-z). From exp(-|z|), so that neither overflows nor cancels."""
    e = exp_negative(-tl.abs(z), EXACT)
    r = quotient(1.0, 1.0 + e, EXACT)
    s = e * r
    return tl.where(z < 0, s, r), tl.where(z < 0, r, s)


@triton.jit
def _expm1_negative(z, EXACT: tl.constexpr):
    """exp(z) - 1 for z <= 0, also close to 0, where the difference has no digits left."""
    if EXACT:
        power, rest = _power_and_rest(z)
        y = tl.where(z < LOWEST, -1.0, power * rest + (power - 1.0))
    else:
        # Relative error of the polynomial on [-0.5, 0]: 1.4e-9.
        q = 0.0011282315562222464
        q = q * z + 0.008196125113811216
        q = q * z + 0.04163324599952992
        q = q * z + 0.16666308786506095
        q = q * z + 0.499999875160703
        y = tl.where(z > -0.5, z * (q * z + 1.0), tl.exp(z) - 1.0)
    return y


@triton.jit
def _tanh(z, EXACT: tl.constexpr):
    a = tl.abs(z)
    if EXACT:
        # With e = exp(-2 a): (1 - e) / (1 + e), where e is small 1 - 2 e / (1 + e).
        power, rest = _power_and_rest(-2.0 * a)
        e = tl.where(a > -0.5 * LOWEST, 0.0, power * rest + power)
        near = a < 0.55
        q = quotient(tl.where(near, (1.0 - power) - power * rest, 2.0 * e), 1.0 + e, EXACT)
        y = tl.where(near, q, 1.0 - q)
        # By the bit of the sign, which -0 has too.
        y = tl.where(z.to(tl.int32, bitcast=True) < 0, -y, y)
    else:
        u = z * z
        # tanh(z) / z on |z| <= 0.6; relative error 2.6e-9.
        p = -0.005905860595249414
        p = p * u + 0.020805377538668176
        p = p * u - 0.05378668135546026
        p = p * u + 0.133319582147148
        p = p * u - 0.3333329927092365
        e = tl.exp(-2.0 * a)
        far = (1.0 - e) / (1.0 + e)
        y = tl.where(a < 0.6, z * (p * u + 1.0), tl.where(z < 0, -far, far))
    return y


@triton.jit
def _softplus(z, EXACT: tl.constexpr):
    # log(1 + exp(z)) = max(z, 0) + log1p(e) with e = exp(-|z|), log1p(e) = 2 atanh(e / (2 + e)).
    # Beyond 20 the second term is below half a unit of z's last place, as PyTorch's threshold says.
    e = exp_negative(-tl.abs(z), EXACT)
    s = quotient(e, 2.0 + e, EXACT)
    u = s * s
    p = 0.14012232811835204
    p = p * u + 0.13999569706119644
    p = p * u + 0.2001084959417365
    p = p * u + 0.33333206564808887
    return tl.where(z > 0, z, 0.0) + 2.0 * (s * (p * u + 1.0))


@triton.jit
def _gelu_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * SQRT_HALF))


@triton.jit
def _clamp(v, top: tl.constexpr):
    """v in [0, top]; NaN stays."""
    return tl.where(v < 0, 0.0, tl.where(v > top, top, v))


@triton.jit
def act_fwd(z, slope, ACT: tl.constexpr, EXACT: tl.constexpr):
    """act(z), fp32. slope: of leaky_relu and prelu, broadcast against z, else ignored."""
    if ACT == NONE:
        y = z
    elif ACT == RELU:
        # This way round NaN stays.
        y = tl.where(z < 0, 0.0, z)
    elif ACT == LEAKY_RELU or ACT == PRELU:
        y = tl.where(z > 0, z, z * slope)
    elif ACT == ELU:
        # At -0 it is z, with its sign.
        y = tl.where(z >= 0, z, _expm1_negative(z, EXACT))
    elif ACT == SIGMOID:
        y, _ = _sigmoids(z, EXACT)
    elif ACT == TANH:
        y = _tanh(z, EXACT)
    elif ACT == SOFTPLUS:
        y = _softplus(z, EXACT)
    elif ACT == GELU:
        y = z * _gelu_cdf(z)
    elif ACT == GELU_TANH:
        # (1 + tanh(v)) / 2 = sigmoid(2 v)
        s, _ = _sigmoids((z + z * z * z * KAPPA) * TWICE_SQRT_2_OVER_PI, EXACT)
        y = z * s
    elif ACT == SILU:
        s, _ = _sigmoids(z, EXACT)
        y = z * s
    elif ACT == RELU_SQUARED:
        y = tl.where(z < 0, 0.0, z * z)
    else:
        tl.static_assert(False, "unknown activation id")
    return y


@triton.jit
def act_grad_z(z, slope, ACT: tl.constexpr, EXACT: tl.constexpr):
    """act'(z) from z, fp32, in the shape of z."""
    if ACT == NONE:
        d = tl.zeros_like(z) + 1.0
    elif ACT == RELU:
        d = tl.where(z <= 0, 0.0, tl.zeros_like(z) + 1.0)
    elif ACT == LEAKY_RELU or ACT == PRELU:
        d = tl.where(z > 0, 1.0, tl.zeros_like(z) + slope)
    elif ACT == ELU:
        d = tl.where(z > 0, 1.0, exp_negative(-tl.abs(z), EXACT))
    elif ACT == SIGMOID:
        s, t = _sigmoids(z, EXACT)
        d = s * t
    elif ACT == TANH:
        t = _tanh(z, EXACT)
        d = (1.0 - t) * (1.0 + t)
    elif ACT == SOFTPLUS:
        d, _ = _sigmoids(z, EXACT)
    elif ACT == GELU:
        d = _gelu_cdf(z) + z * (exp_negative(-0.5 * z * z, EXACT) * INV_SQRT_2PI)
    elif ACT == GELU_TANH:
        s, t = _sigmoids((z + z * z * z * KAPPA) * TWICE_SQRT_2_OVER_PI, EXACT)
        d = s + z * (s * t) * ((1.0 + z * z * (3.0 * KAPPA)) * TWICE_SQRT_2_OVER_PI)
    elif ACT == SILU:
        s, t = _sigmoids(z, EXACT)
        d = s * (1.0 + z * t)
    elif ACT == RELU_SQUARED:
        d = tl.where(z < 0, 0.0, 2.0 * z)
    else:
        tl.static_assert(False, "unknown activation id")
    return d


@triton.jit
def act_grad_y(y, slope, ACT: tl.constexpr, EXACT: tl.constexpr):
    """act'(z) from y = act(z), fp32; clamped to its range, which a rounded y may leave."""
    if ACT == RELU:
        d = tl.where(y <= 0, 0.0, tl.zeros_like(y) + 1.0)
    elif ACT == LEAKY_RELU:
        d = tl.where(y > 0, 1.0, tl.zeros_like(y) + slope)
    elif ACT == ELU:
        d = tl.where(y > 0, 1.0, _clamp(y + 1.0, 1.0))
    elif ACT == SIGMOID:
        d = _clamp(y * (1.0 - y), 0.25)
    elif ACT == TANH:
        d = _clamp((1.0 - y) * (1.0 + y), 1.0)
    elif ACT == SOFTPLUS:
        d = _clamp(-_expm1_negative(-y, EXACT), 1.0)
    elif ACT == RELU_SQUARED:
        d = tl.where(y <= 0, 0.0, 2.0 * (tl.sqrt_rn(y) if EXACT else tl.sqrt(y)))
    else:
        tl.static_assert(False, "this activation's derivative cannot be read off its output")
    return d
