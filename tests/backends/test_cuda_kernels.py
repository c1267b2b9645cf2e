"""The CUDA kernels without a GPU: the PTX that nvcc makes of csrc/cuda, on the CPU (tests/ptx).

Values and masks against the reference: every kernel, dtype, activation and alignment that the host
code can choose, for two targets, warps in order and at random, approximations at both ends of their
documented error.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fusedmlp.spec import activations, philox

from .. import check_op
from ..check_op import DTYPES, SEED, STREAM, Case
from ..ptx import launchers, library

pytestmark = pytest.mark.skipif(
    library.cannot_build() is not None, reason=f"no PTX: {library.cannot_build()}"
)
STATE = torch.tensor([SEED, STREAM])
HALVES = [torch.float16, torch.bfloat16]
# Target, seed of the order of warps, end of the error of approximations
MACHINES = {
    "sm_80": (80, None, 0),
    "sm_120-random": (120, 1, 0),
    "sm_80-random-high": (80, 2, 1),
    "sm_120-low": (120, None, -1),
}


@pytest.fixture(autouse=True)
def plain_machine():
    launchers.set_machine()
    yield
    launchers.set_machine()


@pytest.fixture(params=MACHINES)
def machine(request, plain_machine):
    launchers.set_machine(*MACHINES[request.param])
    return request.param


def numbers(act="none", p=0.0, alpha=0.01, layer=3, row_offset=5):
    threshold, scale = philox.threshold_and_scale(p)
    return activations.IDS[act], alpha, threshold, scale, layer, row_offset


def keep(m, n, p):
    """The mask that `numbers` asks for."""
    return philox.dropout_mask(SEED, STREAM + 3, m, n, p, row_offset=5)


def assert_within_budget(case, inputs, **got):
    """The outputs and gradients given are within the error budget.

    Where all approximations are as bad as they may be, within 1.5 times it: PyTorch on a GPU has
    the same approximations in its own error, PyTorch on the CPU, the yardstick here, has not.
    """
    truth, yardstick = check_op.oracle(case, inputs), check_op.plain(case, inputs)
    allowed = 1.5 if launchers.Approximations.side else 1.0
    for name, t in got.items():
        share = check_op.excess(t, yardstick[name], truth[name], case.dtype)
        assert share <= allowed, f"{case}: {name} uses {share:.2f} of the error budget"


def run_elementwise(case, inputs):
    """y and all gradients by the forward and the backward kernel, as the autograd Function does."""
    b, slope = inputs.get("b"), inputs.get("slope")
    args = b, slope, STATE, *numbers(case.act, case.p, layer=0, row_offset=0)
    y = launchers.bias_act_dropout_fwd(inputs["x"], *args)
    saves = activations.saves(activations.IDS[case.act], 0.01, case.dtype, case.p > 0)
    saved = {0: None, 1: y, 2: inputs["x"]}[saves]
    sums = saves, b is not None, slope is not None
    dz, db, dslope = launchers.bias_act_dropout_bwd(inputs["dy"], saved, *args, *sums)
    found = dict(y=y, dx=dz, db=db, dslope=dslope)
    return {name: t for name, t in found.items() if t.numel()}


def aligned(t, pad=0):
    """The same values in rows that begin at multiples of 16 bytes."""
    wide = t.new_full((t.shape[0], -(-t.shape[1] // 8) * 8 + pad), float("nan"))
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


# --- bias_act_dropout ---------------------------------------------------------------------------

# (M, N): one element; 16-byte rows and not; a Philox group cut off; blocks and chunks of several.
# Not fewer columns for the tall one: over 20 of them the worst error of a sum is chance, and takes
# 0.4 to 1.05 of the budget from one M to the next (the reference 0.4 to 0.98, the same on average).
ELEMENTS = [(1, 1), (37, 29), (64, 64), (3, 1031), (700, 60), (5, 1096)]


@pytest.mark.parametrize("shape", ELEMENTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_kernels_are_within_the_error_budget(dtype, shape, machine):
    m, n = shape
    # A third of them, another one for each shape, dtype and machine; test_cuda_sweep.py takes all.
    turn = ELEMENTS.index(shape) + list(DTYPES).index(dtype) + list(MACHINES).index(machine)
    for i, act in enumerate(activations.NAMES):
        p = (0.0, 0.3)[i % 2] if m > 1 else 0.0
        if i % 3 != turn % 3:
            continue
        case = Case("bias_act_dropout", m, 0, n, act, p, DTYPES[dtype])
        inputs = case.inputs()
        got = run_elementwise(case, inputs)
        if m * n == 1:
            continue  # the budget of one element can be 0
        assert_within_budget(case, inputs, **got)
        if p:
            dropped = ~philox.dropout_mask(SEED, STREAM, m, n, p)
            assert (got["y"][dropped] == 0).all() and (got["dx"][dropped] == 0).all()


@pytest.mark.parametrize("arch", library.ARCHS)
@pytest.mark.parametrize("act, slopes", [("relu", 0), ("gelu", 0), ("prelu", 0), ("prelu", 1)])
def test_sums_of_many_blocks_have_the_same_bits_in_every_order_of_warps(act, slopes, arch):
    """Several chunks of rows and tiles of columns, so that the second stage has work."""
    case = Case("bias_act_dropout", 1500, 0, 40, act, 0.2, torch.float32, slope_elements=slopes)
    inputs = case.inputs()
    results = []
    for seed in (None, 1, 2):
        launchers.set_machine(arch, seed)
        results.append(run_elementwise(case, inputs))
    for got in results[1:]:
        assert all(torch.equal(got[name], results[0][name]) for name in got)
    assert_within_budget(case, inputs, **results[0])


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1000, 1004, 999])
def test_large_sizes_take_several_groups_a_thread_and_wide_tiles(columns):
    m, dtype = 2100, torch.float16
    x, dy = torch.randn(2, m, columns).to(dtype)
    b = torch.randn(columns)
    mask = keep(m, columns, 0.25)
    args = b, None, STATE, *numbers("relu", 0.25)
    y = launchers.bias_act_dropout_fwd(x, *args)
    expected = torch.where(mask, F.relu(x.float() + b) * numbers(p=0.25)[3], 0.0).to(dtype)
    assert torch.equal(y, expected)
    dz, db, _ = launchers.bias_act_dropout_bwd(dy, y, *args, 1, True, False)
    kept = torch.where(y <= 0, 0.0, dy.float() * numbers(p=0.25)[3])
    assert torch.equal(dz, kept.to(dtype))
    torch.testing.assert_close(db, kept.double().sum(0).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, act, arch", [("fp32", "prelu", 120), ("bf16", "gelu", 80), ("fp16", "silu", 120)]
)
def test_large_sizes_are_within_the_error_budget(dtype, act, arch):
    launchers.set_machine(arch)
    case = Case("bias_act_dropout", 2100, 0, 1000, act, 0.3, DTYPES[dtype])
    inputs = case.inputs()
    assert_within_budget(case, inputs, **run_elementwise(case, inputs))


@pytest.mark.parametrize("columns", [16, 20, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_those_of_the_specification_at_any_address(dtype, columns):
    """16-byte accesses or single elements, the mask is the same."""
    for offset in (0, 1, 3):
        x = torch.ones(offset + 50 * columns, dtype=DTYPES[dtype])[offset:].view(50, columns)
        y = launchers.bias_act_dropout_fwd(x, None, None, STATE, *numbers(p=0.4))
        assert torch.equal(y != 0, keep(50, columns, 0.4))


def assert_all_bits_of_a_window_count():
    """At thresholds that are windows of elements: anything else decides by the upper bits alone."""
    windows = philox.windows(STATE, 3, 3, 16, 5)
    for exact in windows[1, :8].tolist():
        for threshold in (exact, exact + 1):
            numbers = activations.NONE, 0.0, threshold, 1.0, 3, 5
            y = launchers.bias_act_dropout_fwd(torch.ones(3, 16), None, None, STATE, *numbers)
            assert torch.equal(y != 0, windows >= threshold)


def test_thresholds_have_32_bits(machine):
    assert_all_bits_of_a_window_count()


def test_a_large_row_offset_wraps_as_32_bits():
    x = torch.ones(20, 9)
    args = *numbers(p=0.5)[:-1], 2**32 - 20
    y = launchers.bias_act_dropout_fwd(x, None, None, STATE, *args)
    mask = philox.dropout_mask(SEED, STREAM + 3, 20, 9, 0.5, row_offset=2**32 - 20)
    assert torch.equal(y != 0, mask)


def test_the_output_may_be_the_input():
    x = torch.randn(70, 24)
    expected = launchers.bias_act_dropout_fwd(x, None, None, STATE, *numbers("gelu", 0.3))
    launchers.bias_act_dropout_fwd(x, None, None, STATE, *numbers("gelu", 0.3), y=x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("act, saves", [("relu", 2), ("relu_squared", 1), ("relu_squared", 2)])
def test_not_even_an_infinite_gradient_passes_a_relu_that_is_off(act, saves):
    z = torch.tensor([[-1.0, 0.0, 2.0] * 8] * 3)
    saved = z if saves == 2 else F.relu(z).square()
    dy = torch.full_like(z, torch.inf)
    args = dy, saved, None, None, STATE, *numbers(act), saves, False, False
    dz = launchers.bias_act_dropout_bwd(*args)[0]
    assert torch.equal(dz, torch.where(z > 0, torch.inf, 0.0))


# --- linear_act ---------------------------------------------------------------------------------

# (M, K, N): one; ragged in all; exact tiles; one off; a long K; rows of one chunk; no K; and K with
# one step more than a multiple of the stages, for the small, the medium and the large tile
PRODUCTS = [(1, 1, 1), (37, 53, 29), (64, 64, 64), (129, 72, 65), (16, 784, 24), (70, 8, 10),
            (33, 0, 40), (40, 260, 40), (70, 200, 72), (130, 130, 64)]  # fmt: skip


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
@pytest.mark.parametrize("tile", ["small", "medium", "large"])
def test_the_tensor_core_kernel_is_within_the_error_budget(tile, shape, machine):
    m, k, n = shape
    turn = PRODUCTS.index(shape) + list(MACHINES).index(machine)
    for i, act in enumerate(("none", "relu", "prelu", "gelu")):
        if i % 2 != turn % 2:
            continue
        dtype, p = HALVES[(i + turn // 2) % 2], (0.0, 0.3)[i // 2] if m > 1 else 0.0
        case = Case("linear_act", m, k, n, act, p, dtype)
        inputs = case.inputs()
        inputs["x"], inputs["w"] = aligned(inputs["x"], pad=8), aligned(inputs["w"])
        args = inputs["x"], inputs["w"], inputs["b"], inputs.get("slope"), STATE
        args += numbers(act, p, layer=0, row_offset=0)
        y, h = launchers.linear_act_fwd(*args, tile=tile)
        if i == 3:
            alone, none = launchers.linear_act_fwd(*args, tile=tile, want_h=False)
            assert torch.equal(y, alone) and none is None
        if p:
            assert (y[~philox.dropout_mask(SEED, STREAM, m, n, p)] == 0).all()
        if m * n > 1:
            assert_within_budget(case, inputs, y=y)
            bare = replace(case, act="none", p=0.0, bias=False)
            if k:
                bare_inputs = {name: inputs[name] for name in ("x", "w", "dy")}
                assert_within_budget(bare, bare_inputs, y=h)
            else:
                assert (h == 0).all()


def test_tiles_give_the_same_masks_and_everything_dropped_is_plus_zero():
    x, w = torch.ones(70, 16).bfloat16(), torch.ones(72, 16).bfloat16()
    for tile in ("small", "medium", "large"):
        y, _ = launchers.linear_act_fwd(x, w, None, None, STATE, *numbers(p=0.4), tile=tile)
        assert torch.equal(y != 0, keep(70, 72, 0.4))
        y, h = launchers.linear_act_fwd(x, w, None, None, STATE, *numbers(p=1.0), tile=tile)
        assert (y == 0).all() and not torch.signbit(y).any() and (h == 16).all()


def test_the_tensor_core_kernel_takes_what_it_can_and_nothing_else():
    def takes(m=64, k=64, n=64, dtype=torch.bfloat16, x_offset=0, pad=0):
        x = torch.zeros(m * (k + pad) + x_offset, dtype=dtype)[x_offset:].view(m, k + pad)[:, :k]
        y = torch.zeros(m, n, dtype=dtype)
        return launchers.takes(x, torch.zeros(n, k, dtype=dtype), y)

    assert takes() and takes(dtype=torch.float16) and takes(k=8) and takes(n=1) and takes(m=1)
    assert takes(pad=8)
    assert not takes(dtype=torch.float32)
    assert not takes(k=20)  # rows of 40 bytes
    assert not takes(pad=4)
    assert not takes(x_offset=1)
    assert not takes(m=4096, n=1024, k=1024)  # the library's
    # Sizes that an int can say; with no column of x the products are few.
    for size, can in ((2**31 - 1, True), (2**31, False)):
        y = torch.zeros(1, 8, dtype=torch.bfloat16)[:, :1]
        x = y[:, :0]
        assert launchers.takes(x, x.expand(size, 0), y.expand(1, size)) is can
        assert launchers.takes(x.expand(size, 0), x, y.expand(size, 1)) is can


# --- cross_entropy ------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (5, 10), (70, 33), (3, 1000)], ids=str)
def test_cross_entropy_is_that_of_torch(shape, smoothing, machine):
    x = (3 * torch.randn(*shape)).requires_grad_()
    target = torch.randint(shape[1], (shape[0],))
    target[-1] = -100
    expected = F.cross_entropy(x, target, label_smoothing=smoothing, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum() * 0.25, x)
    losses, dx = launchers.cross_entropy(x.detach(), target, smoothing, grad_scale=0.25)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(dx, gradient, rtol=1e-5, atol=1e-7)


def test_cross_entropy_of_no_rows_is_no_error():
    losses, dx = launchers.cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,) and dx.shape == (0, 5)


def test_cross_entropy_of_infinite_logits_and_of_unknown_targets():
    x = torch.tensor([[1.0, -torch.inf, 2.0], [1e4, -1e4, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    losses, dx = launchers.cross_entropy(x, torch.tensor([0, 0, 3, -1]))
    expected = F.cross_entropy(x[:2], torch.tensor([0, 0]), reduction="none")
    torch.testing.assert_close(losses[:2], expected)
    assert losses[2:].isnan().all() and dx[2:].isnan().all() and dx[:2].isfinite().all()


# --- the binding --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_op_suite_passes_on_the_ptx_machine():
    """Checks, views, allocations and routes of cuda.cpp with every kernel, on CPU tensors."""
    names = ("ops", "corners", "checks", "mlp_op", "cross_entropy")
    tests = library.ROOT / "tests"
    files = [str(path) for name in names for path in tests.rglob(f"test_{name}.py")]
    chosen = "native and not threads and not extension"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-p", "tests.ptx.binding", *files, "-k", chosen]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    run = subprocess.run(command, cwd=library.ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    launches = re.search(r"launches on the PTX machine: (\d+)", run.stdout)
    assert int(passed[1]) > 100 and int(launches[1]) > 1000, run.stdout[-1000:]
