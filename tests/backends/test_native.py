"""The CPU kernels: every instruction set, any number of threads, and the functions inside."""

import ctypes
import json
import math
import os
import subprocess
import sys
import zlib

import pytest
import torch

from fusedmlp import environment
from fusedmlp.backends import native, schemas
from fusedmlp.spec import activations, philox

from .. import check_op
from ..native import bwd, fwd, library, needs_native

pytestmark = needs_native
DTYPES = check_op.DTYPES
ISAS = environment.CHOICES["FUSEDMLP_CPU_ISA"]  # from the lowest up
FP32_ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture(params=FP32_ISAS)
def isa(request):
    """The kernels compiled for one instruction set."""
    with native.instruction_set(request.param) as has_it:
        if not has_it:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param


# --- masks --------------------------------------------------------------------------------------

# Around each size at which the kernels change their way: a group of 8, a draw (16, 32 and 64
# columns), narrow matrices (below 256, folded), a tile (2048), one row, one column.
MASK_SHAPES = [
    *((40, n) for n in (1, 7, 8, 10, 63, 64, 65, 100, 128)),
    *((9, n) for n in (192, 250, 255, 256, 257, 300, 784)),
    *((3, n) for n in (2047, 2048, 2049, 4100)),
    (1, 1), (1, 5000), (2500, 1), (1100, 3),
]  # fmt: skip


@pytest.mark.parametrize("act", ["none", "sigmoid"])
def test_masks_are_those_of_rng(isa, act):
    """`none` takes the loop of fast activations, `sigmoid` that of slow ones."""
    state = torch.tensor([-(2**63) + 12345, 2**63 - 2])
    for rows, columns in MASK_SHAPES:
        for p in (2**-31, 0.1, 0.5, 1 - 2**-31):
            y = fwd(torch.ones(rows, columns), None, act, state=state, p=p, layer=5)
            threshold = philox.threshold_and_scale(p)[0]
            keep = philox.keep_mask(state, 5, rows, columns, threshold)
            assert torch.equal(y != 0, keep), f"{rows} x {columns}, p = {p}"


def test_masks_of_the_last_rows_and_in_every_dtype(isa):
    state = torch.tensor([3, 4])
    for dtype in DTYPES.values():
        for rows, columns in ((6, 20), (5, 300)):
            offset = 2**32 - rows
            y = fwd(torch.ones(rows, columns, dtype=dtype), state=state, p=0.5, row_offset=offset)
            keep = philox.keep_mask(state, 0, rows, columns, 2**31, offset)
            assert torch.equal(y != 0, keep)


def test_backward_draws_the_mask_of_forward(isa):
    state = torch.tensor([1, -1])
    for rows, columns in MASK_SHAPES:
        dy = torch.ones(rows, columns)
        dz = bwd(dy, None, None, "none", state=state, p=0.3)[0]
        assert torch.equal(dz, fwd(dy, state=state, p=0.3)), f"{rows} x {columns}"


def test_scalar_philox_is_that_of_rng():
    """csrc/common/philox.h, which GPUs run."""
    cases = (0, 0, 0, 64), (-1, -1, 2**32 - 1, 37), (2**62, 2**40, 7, 9)
    for seed, stream, row, columns in cases:
        out = torch.empty(columns, dtype=torch.int32)
        library().fusedmlp_scalar_windows(
            ctypes.c_int64(seed), ctypes.c_int64(stream), ctypes.c_uint32(row),
            ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(columns),
        )  # fmt: skip
        want = philox.windows(torch.tensor([seed, stream]), 0, 1, columns, row)[0]
        assert torch.equal(out.long() & 0xFFFFFFFF, want)


# --- values -------------------------------------------------------------------------------------


def test_column_sums_are_as_exact_as_their_terms(isa):
    """2^20 terms: naive fp32 sums lose three digits."""
    rows = 1 << 20
    dy, b = torch.rand(rows, 3), torch.zeros(3)
    db = bwd(dy, None, b, "none")[1]
    want = dy.double().sum(0)
    assert ((db.double() - want).abs() <= 2**-23 * want).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_values_are_read_and_rounded_as_torch_does(isa, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    _assert_same_bits(fwd(every), every)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64).to(torch.int32)
    # Halfway between two values, and next to it.
    step = {torch.float16: 1 << 12, torch.bfloat16: 1 << 15}[dtype]
    bits = torch.cat([bits] + [bits // (2 * step) * (2 * step) + step + i for i in (-1, 0, 1)])
    wide = bits.view(torch.float32)
    # -0 + b is b, in fp32.
    _assert_same_bits(fwd(torch.full(wide.shape, -0.0, dtype=dtype), wide), wide.to(dtype))


def _assert_same_bits(got, want):
    """16-bit values; a NaN is a NaN whatever its bits."""
    number = ~want.isnan()
    assert torch.equal(~got.isnan(), number)
    assert torch.equal(got[number].view(torch.int16), want[number].view(torch.int16))


# Largest error in units of the last place of the fp64 value, as measured, rounded up. In the tails
# of gelu and gelu_tanh, where PyTorch's own fp32 has no digit left, an exp of a rounded argument is
# off by as many places as its argument has; values below FLOOR are not looked at so closely.
ULP = {
    "elu": 1.1,
    "sigmoid": 2.5,
    "tanh": 1.5,
    "softplus": 3.0,
    "gelu": 20.0,
    "gelu_tanh": 60.0,
    "silu": 2.5,
}
FLOOR = 2.0**-40


def _smooth(act, x):
    """In fp64, without the cancellation that PyTorch's own formulas have in the tails."""
    if act == "gelu":
        return x * 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
    if act == "gelu_tanh":
        u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return x * torch.sigmoid(2 * u)
    if act == "softplus":
        return torch.logaddexp(x, torch.zeros_like(x))
    return activations.TABLE[activations.IDS[act]].forward(x, 0.0)


def _sweep():
    """Floats of all magnitudes, and densely where the functions bend."""
    bits = torch.arange(0, 0x7F800000, 4099, dtype=torch.int32).view(torch.float32)
    middle = torch.linspace(-20, 20, 500_001)
    return torch.cat([bits[bits < 80], -bits[bits < 80], middle])


@pytest.mark.parametrize("act", ULP)
def test_smooth_functions_are_right_to_the_last_places(isa, act):
    x = _sweep()
    got, want = fwd(x, act=act).double(), _smooth(act, x.double())
    ulp = torch.exp2(torch.floor(torch.log2(want.abs().clamp_min(2.0**-126))) - 23)
    error = (got - want).abs() / torch.maximum(ulp, torch.tensor(FLOOR * 2.0**-23))
    worst = error.argmax()
    assert error[worst] <= ULP[act], f"{error[worst]:.2f} at {x[worst].item()!r}"


def _scalar(act, what, values, slope):
    values = values.contiguous()
    out = torch.empty_like(values)
    found = library().fusedmlp_scalar_act(
        activations.IDS[act], what, ctypes.c_void_p(values.data_ptr()), ctypes.c_float(slope),
        ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(values.numel()),
    )  # fmt: skip
    return out if found else None


@pytest.mark.parametrize("act", activations.NAMES)
def test_scalar_functions_are_those_of_the_table(act):
    """csrc/common/activations.h, which GPUs run."""
    entry = activations.TABLE[activations.IDS[act]]
    corners = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e4, -1e4, math.nan])
    z = torch.cat([torch.linspace(-30, 30, 60_001), corners])
    slope = 0.25
    close = dict(rtol=2e-6, atol=2e-6, equal_nan=True)
    y = entry.forward(z.double(), slope)
    torch.testing.assert_close(_scalar(act, 0, z, slope).double(), y, **close)
    zeros = corners[:2]
    # In fp64: PyTorch's fp32 gelu gives -0 or +0 for -0, as the processor has AVX-512 or not.
    signs = torch.signbit(entry.forward(zeros.double(), slope))
    assert torch.equal(torch.signbit(_scalar(act, 0, zeros, slope)), signs)
    torch.testing.assert_close(
        _scalar(act, 1, z, slope).double(), entry.from_z(z.double(), slope), **close
    )
    from_y = _scalar(act, 2, y.float(), slope)
    if act != "none":
        assert (from_y is None) == (entry.from_y is None)
    if from_y is not None:
        want = entry.from_y(y.float().double(), slope)
        torch.testing.assert_close(from_y.double(), want, **close)


# --- choice and loading -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ISAS)
def test_the_environment_limits_the_instruction_set(name):
    with native.instruction_set(name) as has_it:
        if not has_it:
            pytest.skip(f"this processor has no {name}")
    code = (
        "from fusedmlp.backends import native as e\n"
        "assert e.unavailable('cpu') is None\n"
        "print(e.bf16_isa() or e.cpu_isa())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"FUSEDMLP_CPU_ISA": name},
    )  # fmt: skip
    assert run.stdout.strip() == name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in the place of the package, for the time of a test."""
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    native.unavailable.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    native.unavailable.cache_clear()


def test_a_missing_extension_says_how_to_build_it(folder):
    assert "FUSEDMLP_BUILD=cpu pip install --no-build-isolation ." in native.unavailable("cpu")


def test_what_the_build_left_out_is_the_reason(folder):
    (folder / "_build_info.json").write_text('{"left_out": {"cpu": "no compiler was found"}}')
    assert "no compiler was found" in native.unavailable("cpu")


def test_a_broken_extension_is_a_reason_and_no_error(folder):
    content = b"not a library"
    (folder / "_native_cpu.so").write_bytes(content)
    info = {"torch": "2.0.0", "schemas": schemas.digest(), "crc32": {"cpu": zlib.crc32(content)}}
    (folder / "_build_info.json").write_text(json.dumps(info))
    reason = native.unavailable("cpu")
    assert "built for torch 2.0.0" in reason and "rebuild with" in reason
