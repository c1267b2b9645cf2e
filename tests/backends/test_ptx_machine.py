"""The PTX machine: what opcodes compute, against exact arithmetic and torch, and every fault.

Needs no nvcc: kernels are a few lines of PTX each.
"""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from ..ptx import arithmetic as ar
from ..ptx.machine import Machine
from ..ptx.memory import Fault
from ..ptx.parse import PtxError

RANDOM = np.random.default_rng(0)


def floats(count):
    """fp32 of every size and sign: bits at random, with the corners."""
    bits = RANDOM.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)
    corners = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 2.0**-149, 2.0**-126, 3e38]
    return np.concatenate([bits.view(np.float32), np.array(corners, dtype=np.float32)])


def near(count):
    """fp32 of about one size, so that sums cancel and round."""
    return (RANDOM.normal(size=count) * 2.0 ** RANDOM.integers(-12, 12, count)).astype(np.float32)


# --- arithmetic ---------------------------------------------------------------------------------


def neighbours(exact: Fraction):
    """The largest fp32 not above, and the smallest not below."""
    guess = np.float32(float(exact))
    low = guess if Fraction(float(guess)) <= exact else np.nextafter(guess, np.float32(-np.inf))
    high = guess if Fraction(float(guess)) >= exact else np.nextafter(guess, np.float32(np.inf))
    return low, high


def nearest(exact: Fraction):
    low, high = neighbours(exact)
    below, above = exact - Fraction(float(low)), Fraction(float(high)) - exact
    if below == above:
        return low if not int(low.view(np.uint32)) & 1 else high
    return low if below < above else high


def exact_product_sums():
    """a, b, c at random, and such that fp64 makes a tie of a sum that is none; and denormals."""
    f = np.float32
    # Products of 1 + 2^-36 and of 1 - 2^-46, times half of a unit in the last place of c.
    above = f(1 + 2.0**-12), f((1 - 2.0**-12 + 2.0**-24) * 2.0**-24)
    below = f(1 + 2.0**-23), f((1 - 2.0**-23) * 2.0**-24)
    hard = [
        (sign * a, b, f(1 + i * 2.0**-23))
        for a, b in (above, below) for sign in (1, -1) for i in range(16)
    ]  # fmt: skip
    hard += [(f(1 + i * 2.0**-20), f(2.0**-149), f(2.0**-140)) for i in range(64)]
    hard += [(f(sign * 1.5), f(2.0**-149), f(i * 2.0**-149)) for i in range(9) for sign in (1, -1)]
    extra = np.array(hard, dtype=f).T
    return [np.concatenate([near(3000), more]) for more in extra]


def test_fma_rounds_once():
    a, b, c = exact_product_sums()
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    with np.errstate(all="ignore"):
        assert all(g == nearest(e) for g, e in zip(ar.fma(a, b, c), exact, strict=True))
        down = ar.fma_down(a, b, c)
    assert all(g == neighbours(e)[0] for g, e in zip(down, exact, strict=True))
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (twice != ar.fma(a, b, c)).any()  # the sweep has cases where it matters


def test_fma_of_special_numbers():
    inf, nan, one = np.float32(np.inf), np.float32(np.nan), np.float32(1)
    with np.errstate(all="ignore"):
        assert ar.fma(one, inf, one) == inf and np.isnan(ar.fma(inf, one, -inf))
        assert np.isnan(ar.fma(np.float32(0), inf, one)) and np.isnan(ar.fma(one, one, nan))
        big = np.float32(3e38)
        assert ar.fma(big, big, one) == inf and ar.fma_down(big, one, big) == np.finfo("f4").max


def test_sums_towards_zero():
    a, b = near(3000), near(3000)
    for x, y, got in zip(a, b, ar.add_to_zero(a, b), strict=True):
        low, high = neighbours(Fraction(float(x)) + Fraction(float(y)))
        assert got == (low if low >= 0 and high > 0 else high)


def test_16_bit_numbers_are_those_of_torch():
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = floats(200_000)
    with np.errstate(all="ignore"):
        for dtype, read, rounded in (
            (torch.float16, ar.from_half, ar.to_half),
            (torch.bfloat16, ar.from_bfloat, ar.to_bfloat),
        ):
            got = torch.from_numpy(read(every.numpy().view(np.uint16)))
            assert torch.equal(got.nan_to_num(7), every.view(dtype).float().nan_to_num(7))
            bits = torch.from_numpy(rounded(values).view(np.int16)).view(dtype)
            expected = torch.from_numpy(values).to(dtype)
            assert torch.equal(bits.float().nan_to_num(7), expected.float().nan_to_num(7))


def test_integers():
    a, b = (RANDOM.integers(0, 2**64, 2000, dtype=np.uint64) for _ in range(2))
    high = [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
    with np.errstate(all="ignore"):
        assert ar.mul_high_u64(a, b).tolist() == high
        assert ar.divide(np.int32(-7), np.int32(2)) == -3 and ar.divide(a, b).dtype == np.uint64
        with pytest.raises(ZeroDivisionError):
            ar.divide(a, np.uint64(0))
    low, high, by = a.astype(np.uint32), b.astype(np.uint32), np.uint32(35)
    wide = [
        ((int(h) << 32 | int(w)) << 3) >> 32 & 0xFFFFFFFF for w, h in zip(low, high, strict=True)
    ]
    assert ar.funnel_left(low, high, by).tolist() == wide
    pieces = ar.insert_bits(low, high, np.uint32(3), np.uint32(29))
    assert pieces.tolist() == [(int(w) << 3 & 0xFFFFFFFF) | int(h) & 7
                               for w, h in zip(low, high, strict=True)]  # fmt: skip


def test_conversions_and_approximations():
    values = np.array([-1, 0.25, 3, math.nan, math.inf], dtype=np.float32)
    assert ar.saturate(values).tolist() == [0, 0.25, 1, 0, 1]
    denormal = np.float32(1e-40)
    with np.errstate(all="ignore"):
        assert ar.exp2_approx_ftz(denormal) == 1 and ar.rcp_approx_ftz(denormal) == np.inf
        assert ar.exp2_approx_ftz(np.float32(-130)) == 0 and ar.exp2_approx(np.float32(-130)) > 0


@pytest.mark.parametrize("side", [-1, 1])
def test_approximations_at_an_end_of_their_error(side, monkeypatch):
    monkeypatch.setattr(ar.Approximations, "side", side)
    x = np.linspace(0.1, 0.9, 100).astype(np.float32)
    with np.errstate(all="ignore"):
        for got, exact in ((ar.exp2_approx(x), np.exp2(x.astype("f8"))),
                           (ar.rcp_approx_ftz(x), 1 / x.astype("f8"))):  # fmt: skip
            assert (np.sign(got - exact) == side).all()
            assert (np.abs(got - exact) <= 2.5 * np.spacing(got)).all()


# Fragments of m16n8k16, written from the tables of the PTX ISA: g = lane / 4, t = lane % 4.
def a_place(lane, i):
    return lane // 4 + 8 * (i in (2, 3, 6, 7)), lane % 4 * 2 + i % 2 + 8 * (i >= 4)


def b_place(lane, i):
    return lane % 4 * 2 + i % 2 + 8 * (i >= 2), lane // 4


def d_place(lane, i):
    return lane // 4 + 8 * (i >= 2), lane % 4 * 2 + i % 2


def test_mma_multiplies_matrices_by_the_tables_of_the_isa():
    warps = 3
    left, right = RANDOM.normal(size=(warps, 16, 16)), RANDOM.normal(size=(warps, 16, 8))
    left, right = left.astype(np.float16), right.astype(np.float16)
    add = RANDOM.normal(size=(warps, 16, 8)).astype(np.float32)

    def fragments(matrix, place, count):
        each = [[[m[place(lane, i)] for i in range(count)] for lane in range(32)] for m in matrix]
        return np.array(each, dtype=matrix.dtype).reshape(warps * 32, count)

    def registers(halves):
        return tuple(np.ascontiguousarray(halves.view(np.uint32).T))

    a, b = registers(fragments(left, a_place, 8)), registers(fragments(right, b_place, 4))
    c = tuple(np.ascontiguousarray(fragments(add, d_place, 4).T))
    got = np.stack(ar.mma_16x8x16(ar.from_half, a, b, c), axis=1)
    exact = left.astype("f8") @ right.astype("f8") + add
    expected = fragments(exact.astype(np.float32), d_place, 4)
    assert np.array_equal(got, expected)


def test_ldmatrix_by_the_table_of_the_isa():
    rows = RANDOM.integers(0, 2**32, (64, 4), dtype=np.uint64).astype(np.uint32)
    for i, d in enumerate(ar.ldmatrix_x4(rows)):
        for warp in range(2):
            for lane in range(32):
                row = warp * 32 + 8 * i + lane // 4
                assert d[warp * 32 + lane] == rows[row, lane % 4]


# --- faults -------------------------------------------------------------------------------------

MODULE = """
.version 9.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 tile[];
.entry kernel(
	.param .align 8 .b8 kernel_param_0[16]
)
.maxntid 128, 1, 1
{
	.reg .pred %p<4>;
	.reg .b16 %rs<4>;
	.reg .f32 %f<8>;
	.reg .b32 %r<16>;
	.reg .b64 %rd<16>;
	ld.param.u64 %rd1, [kernel_param_0];
	ld.param.u64 %rd2, [kernel_param_0+8];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	shl.b32 %r3, %r1, 2;
	mov.u32 %r4, tile;
	add.s32 %r5, %r4, %r3;
	cvt.u64.u32 %rd3, %r3;
	add.s64 %rd4, %rd1, %rd3;
	add.s64 %rd5, %rd2, %rd3;
BODY
	ret;
}
"""


def run(body, blocks=1, threads=64, shared=256, out=64, seed=None):
    """out[i] and in[i] = i are at %rd4 and %rd5 of thread i, its shared word at %r5."""
    machine = Machine()
    machine.order(seed)
    machine.load(MODULE.replace("BODY", body))
    y = np.full(out, np.nan, dtype=np.float32)
    x = np.arange(128, dtype=np.float32)
    machine.memory.name(y.ctypes.data, y.nbytes, 4, writable=True, written=False)
    machine.memory.name(x.ctypes.data, x.nbytes, 4)
    params = struct.pack("QQ", y.ctypes.data, x.ctypes.data)
    machine.launch("kernel", blocks, threads, shared, params)
    return y


COPY_IN = "cp.async.cg.shared.global [%r7], [%rd6], 16, %r8;"
# The first four threads fetch 16 bytes each; all is in %r5 afterwards.
FETCH = f"""
	setp.gt.u32 %p1, %r1, 15;
	@%p1 bra $L__1;
	shl.b32 %r6, %r1, 4;
	add.s32 %r7, %r4, %r6;
	cvt.u64.u32 %rd7, %r6;
	add.s64 %rd6, %rd2, %rd7;
	mov.b32 %r8, 16;
	{COPY_IN}
$L__1:
	cp.async.commit_group;
"""
READ = "ld.shared.f32 %f1, [%r5];\n st.global.f32 [%rd4], %f1;"


def test_a_kernel_that_is_right():
    waits = "cp.async.wait_group 0;\n bar.sync 0;\n"
    assert np.array_equal(run(FETCH + waits + READ), np.arange(64))
    assert np.array_equal(run(FETCH + waits + READ, seed=3), np.arange(64))


def test_threads_that_went_apart_meet_again():
    """A loop of tid % 3 + 1 turns, then a shuffle, which needs the whole warp."""
    body = """
	and.b32 %r6, %r1, 3;
	mov.f32 %f1, 0f00000000;
$L__1:
	add.f32 %f1, %f1, 0f3F800000;
	add.s32 %r6, %r6, -1;
	setp.ge.s32 %p1, %r6, 0;
	@%p1 bra $L__1;
	mov.b32 %r7, %f1;
	shfl.sync.bfly.b32 %r8|%p2, %r7, 1, 31, -1;
	mov.b32 %f2, %r8;
	st.global.f32 [%rd4], %f2;
"""
    assert np.array_equal(run(body), (np.arange(64) ^ 1) % 4 + 1)


# name -> (body, other arguments of run, what is said)
FAULTS = {
    "a read beyond a tensor": ("ld.global.f32 %f1, [%rd5+512];", {}, "outside of every tensor"),
    "a write beyond a tensor": ("mov.f32 %f1, 0f00000000; st.global.f32 [%rd4+4], %f1;", {},
                                "outside of every tensor"),
    "a write to an input": ("mov.f32 %f1, 0f00000000; st.global.f32 [%rd5], %f1;", {},
                            "only reads"),
    "a misaligned vector": ("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd2+8];", {}, "not aligned"),
    "half an element": ("mov.u16 %rs1, 0; st.global.u16 [%rd4], %rs1;", {}, "elements of 4"),
    "beyond shared memory": ("mov.f32 %f1, 0f00000000; st.shared.f32 [%r5+4], %f1;", {},
                             "outside of the block's shared memory"),
    "beyond the parameters": ("ld.param.u64 %rd6, [kernel_param_0+16];", {}, "parameters"),
    "a read of an output": ("ld.global.f32 %f1, [%rd4];", {}, "nothing has written"),
    "shared memory as it comes": (READ, {}, "nothing has written"),
    "a sum with an unwritten register": ("add.f32 %f2, %f1, %f1;", {}, "%f1 is used"),
    "an unwritten register stored": ("mov.f32 %f2, %f1; st.global.f32 [%rd4], %f2;", {},
                                     "%f2 is used"),
    "a jump by an unwritten register": ("@%p1 bra $L__1;\n$L__1:", {}, "%p1 is used"),
    "written on one path": ("""setp.gt.u32 %p1, %r1, 7; @%p1 bra $L__1; mov.f32 %f1, 0f00000000;
$L__1:\n st.global.f32 [%rd4], %f1;""", {}, "thread 8"),
    "a neighbour's word": ("st.shared.u32 [%r5], %r1; xor.b32 %r6, %r5, 128;"
                           "ld.shared.u32 %r7, [%r6];", {}, "no barrier between"),
    "a lane's word": ("st.shared.u32 [%r5], %r1; xor.b32 %r6, %r5, 4;"
                      "ld.shared.u32 %r7, [%r6];", {}, "no barrier between"),
    "a warp barrier between warps": ("st.shared.u32 [%r5], %r1; bar.warp.sync -1;"
                                     "xor.b32 %r6, %r5, 128; ld.shared.u32 %r7, [%r6];", {},
                                     "no barrier between"),
    "written over while read": ("st.shared.u32 [%r5], %r1; bar.sync 0; xor.b32 %r6, %r5, 128;"
                                "ld.shared.u32 %r7, [%r6]; st.shared.u32 [%r5], %r7;", {},
                                "reads with no barrier"),
    "written over while all read": ("st.shared.u32 [%r5], %r1; bar.sync 0;"
                                    "ld.shared.u32 %r7, [%r4]; st.shared.u32 [%r5], %r7;", {},
                                    "reads with no barrier"),
    "one word of two threads": ("st.shared.u32 [%r4], %r1;", {}, "two threads write"),
    "one element of two blocks": ("mov.f32 %f1, 0f00000000; st.global.f32 [%rd4], %f1;",
                                  {"blocks": 2}, "two threads write"),
    "one element of two batches": ("mov.f32 %f1, 0f00000000; st.global.f32 [%rd4], %f1;",
                                   {"blocks": 200}, "two threads write"),
    "a copy not waited for": (FETCH + "bar.sync 0;\n" + READ + "cp.async.wait_group 0;", {},
                              "asynchronous copy is under way"),
    "a copy waited for by its thread alone": (FETCH + "cp.async.wait_group 0;\n" + READ, {},
                                              "no barrier between"),
    "a group too few": (FETCH + "cp.async.wait_group 1; bar.sync 0;\n" + READ, {}, "under way"),
    "an end before its copies": (FETCH, {}, "ends with asynchronous copies"),
    "a copy from outside": (FETCH.replace("%rd2, %rd7", "%rd1, %rd7").replace("15;", "32;"),
                            {"out": 100, "shared": 528}, "asynchronous copy from"),
    "a barrier passed by": ("setp.gt.u32 %p1, %r1, 7; @%p1 bra $L__1; bar.sync 0;\n$L__1:", {},
                            "others do not reach"),
    "half of a warp": ("setp.gt.u32 %p1, %r1, 7; @%p1 bra $L__1; bar.warp.sync -1;\n$L__1:", {},
                       "others do not reach"),
    "too many threads": ("", {"threads": 256}, "a launch of"),
    "too much shared memory": ("", {"shared": 50_000}, "bytes shared"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", [None, 1])
def test_a_fault_is_found(name, seed):
    body, how, said = FAULTS[name]
    body = (
        body.replace("; ", ";\n")
        .replace(";ld", ";\nld")
        .replace(";st", ";\nst")
        .replace(";xor", ";\nxor")
    )
    with pytest.raises(Fault, match=said):
        run(body, **how, seed=seed)


def test_what_is_no_fault():
    """Moves of unwritten registers; a warp's exchange after its barrier; all reading one word."""
    run("mov.f32 %f2, %f1;\n mov.b32 %r6, %f2;")
    run("""
	st.shared.u32 [%r5], %r1;
	bar.warp.sync -1;
	xor.b32 %r6, %r5, 4;
	ld.shared.u32 %r7, [%r6];
	bar.sync 0;
	ld.shared.u32 %r8, [%r4];
	bar.sync 0;
	st.shared.u32 [%r5], %r8;
""")


UNKNOWN = ["popc.b32 %r6, %r1", "fma.rp.f32 %f1, %f2, %f3, %f4", "cvt.rn.f32.u32 %f1, %r1",
           "atom.global.add.f32 %f1, [%rd4], %f2", "ld.local.f32 %f1, [%rd4]",
           "add.ftz.f32 %f1, %f2, %f3", "abs.ftz.f32 %f1, %f2"]  # fmt: skip


@pytest.mark.parametrize("opcode", UNKNOWN)
def test_an_unknown_opcode_is_an_error(opcode):
    with pytest.raises(PtxError):
        run(f"mov.f32 %f2, 0f00000000;\n mov.f32 %f3, %f2;\n mov.f32 %f4, %f2;\n {opcode};")


def test_only_jumps_have_predicates():
    with pytest.raises(PtxError, match="only jumps"):
        run("setp.gt.u32 %p1, %r1, 7;\n @%p1 st.global.f32 [%rd4], %f1;")
