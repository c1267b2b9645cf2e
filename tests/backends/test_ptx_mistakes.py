"""Mistakes put into the CUDA sources: each compiles, and each has to be found.

By a fault of the machine, or by a value or mask that is wrong. Those a GPU might well survive, most
of the time, have to be found as the fault they are.
"""

import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from fusedmlp.spec import philox

from ..check_op import SEED, STREAM, Case
from ..ptx import launchers, library
from ..ptx.memory import Fault
from . import test_cuda_kernels as kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        library.cannot_build() is not None, reason=f"no PTX: {library.cannot_build()}"
    ),
]

# Fewer kernels to compile: bf16 and the middle tile; fp32 and no smooth activation.
ONE_TILE = [
    ("linear_act.cu", r"return launch_dtype<Half>\(args, stream, tile\);", "return 1;"),
    ("linear_act.cu", r"return launch_tile<T, (Large|Small)>\(args, stream\);", "return 1;"),
]
FP32_ONLY = [
    ("numeric.cuh", r"return f\((Half|BFloat)\{\}\);", "return 1;"),
    ("epilogue.cuh", r"return f\(element, vector, Tag<kSmooth>\{\}\);", "return 1;"),
]


@dataclass
class Mistake:
    name: str
    file: str
    there: str
    instead: str
    found_as: str | None = None  # pattern of what the fault says; None: values may show it


def products():
    """Ragged in all sizes, K of four steps of three stages and of two."""
    for m, k, n in ((70, 203, 72), (130, 72, 60), (65, 520, 136)):
        case = Case("linear_act", m, k, n, "relu", 0.3, torch.bfloat16)
        inputs = case.inputs()
        inputs["x"] = kernels.aligned(inputs["x"], pad=8)
        inputs["w"] = kernels.aligned(inputs["w"])
        args = inputs["x"], inputs["w"], inputs["b"], None, kernels.STATE
        args += kernels.numbers("relu", 0.3, layer=0, row_offset=0)
        y, _ = launchers.linear_act_fwd(*args, tile="medium")
        kernels.assert_within_budget(case, inputs, y=y)
        assert (y[~philox.dropout_mask(SEED, STREAM, m, n, 0.3)] == 0).all()


def elements():
    """Several chunks and tiles of columns; rows of 16 bytes and not; one slope, or one a column."""
    for m, n, act, slopes in ((600, 40, "prelu", 1), (300, 37, "prelu", 0), (40, 1031, "relu", 0)):
        case = Case("bias_act_dropout", m, 0, n, act, 0.3, torch.float32, slope_elements=slopes)
        inputs = case.inputs()
        got = kernels.run_elementwise(case, inputs)
        kernels.assert_within_budget(case, inputs, **got)
        assert (got["y"][~philox.dropout_mask(SEED, STREAM, m, n, 0.3)] == 0).all()
    kernels.assert_all_bits_of_a_window_count()


def losses():
    x, target = torch.randn(13, 33, requires_grad=True), torch.randint(33, (13,))
    expected = F.cross_entropy(x, target, label_smoothing=0.1, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    got, dx = launchers.cross_entropy(x.detach(), target, 0.1)
    torch.testing.assert_close(got, expected.detach())
    torch.testing.assert_close(dx, gradient, rtol=1e-5, atol=1e-7)


WORK = {
    "linear_act.cu": (products, ONE_TILE),
    "bias_act_dropout_fwd.cu": (elements, FP32_ONLY),
    "bias_act_dropout_bwd.cu": (elements, FP32_ONLY),
    "column_sums.cu": (elements, FP32_ONLY),
    "cross_entropy.cu": (losses, FP32_ONLY),
}
# Mistakes in a header are compiled into this file.
HEADERS = {
    "column_sums.cuh": "bias_act_dropout_bwd.cu",
    "numeric.cuh": "bias_act_dropout_fwd.cu",
    "epilogue.cuh": "bias_act_dropout_fwd.cu",
    "philox.h": "bias_act_dropout_fwd.cu",
    "mma.cuh": "linear_act.cu",
}

BARRIER = "with no barrier between"
COPY = "asynchronous copy is under way"
# What lies behind a tensor may be another one, which the copy may not read while it is written.
OUTSIDE = "outside of every tensor|from a tensor that the call writes"
MISTAKES = [
    # barriers and asynchronous copies
    Mistake("no barrier between stages", "linear_act.cu",
            r"(one before it, which is fetched into next\.\s*)__syncthreads\(\);", r"\1", BARRIER),
    Mistake("no barrier before the staging area", "linear_act.cu",
            r"__syncthreads\(\);  // the stages become[^\n]*", "", BARRIER),
    Mistake("no warp barrier before the staging area is read", "linear_act.cu",
            r"__syncwarp\(\);", "", BARRIER),
    Mistake("one group too few waited for", "linear_act.cu",
            r"cp_async_wait<TILE::STAGES - 2>", "cp_async_wait<TILE::STAGES - 1>", COPY),
    Mistake("never waited", "linear_act.cu", r"cp_async_wait<TILE::STAGES - 2>\(\);", "", COPY),
    Mistake("a group not closed", "linear_act.cu",
            r"next \* TILE::BK\);\s*cp_async_commit\(\);", "next * TILE::BK);", COPY),
    Mistake("fetched into the stage in use", "linear_act.cu",
            r"free = TILE::STAGES - 1;", "free = 0;", COPY),
    Mistake("no barrier before the partial sums", "column_sums.cuh",
            r"= mine\[j\];\s*__syncthreads\(\);", "= mine[j];", BARRIER),
    Mistake("no barrier before sums are written over", "column_sums.cuh",
            r"\+ column\];\s*__syncthreads\(\);", "+ column];", BARRIER),
    Mistake("no barrier after the partial sums", "column_sums.cuh",
            r"(\(parts, columns\)\s*)__syncthreads\(\);", r"\1", BARRIER),
    Mistake("no barrier before the sum of all columns", "column_sums.cuh",
            r"__syncthreads\(\);\s*if \(ONE && thread == 0\)", "if (ONE && thread == 0)", BARRIER),
    Mistake("no barrier before the sums of parts", "column_sums.cu",
            r"= sum;\s*__syncthreads\(\);", "= sum;", BARRIER),
    Mistake("a barrier that some threads pass by", "column_sums.cu",
            r"= sum;\s*__syncthreads\(\);", "= sum; if (col < p.cols) __syncthreads();",
            "others do not reach"),
    # bounds, strides, alignment
    Mistake("rows beyond the last are stored", "linear_act.cu",
            r"if \(row >= e\.rows\)", "if (row > e.rows)", OUTSIDE),
    Mistake("columns beyond K are not masked", "linear_act.cu",
            r"left < 8 \? int\(left\) : 8", "8"),
    Mistake("rows beyond M are fetched", "linear_act.cu",
            r"at >= rows \|\| left <= 0", "left <= 0", OUTSIDE),
    Mistake("strides swapped", "linear_act.cu",
            r"of_x \? p\.x_stride : p\.w_stride", "of_x ? p.w_stride : p.x_stride"),
    Mistake("vectors for every address", "linear_act.cu",
            r"if \(vectors\)\s*Octet<T, true>", "if (count == 8)\n        Octet<T, true>"),
    Mistake("one group too many", "bias_act_dropout_fwd.cu",
            r"at >= p\.groups", "at > p.groups", OUTSIDE),
    Mistake("the last group of a row is not masked", "numeric.cuh",
            r"if \(j < count\)\s*at\[j\]", "at[j]"),
    Mistake("vectors of a row of any length", "epilogue.cuh",
            r"is_aligned && count == kEight", "is_aligned"),
    Mistake("a chunk of rows one too long", "column_sums.cuh",
            r"end - p\.row \+ p\.row_step - 1", "end - p.row + p.row_step"),
    Mistake("a row too few in the sums", "column_sums.cu",
            r"row < p\.rows; row \+= kParts", "row < p.rows - 1; row += kParts"),
    Mistake("every column, though there are fewer", "column_sums.cuh",
            r"else if \(col < cols\)", "else"),
    # fragments, swizzle, masks
    Mistake("rows of w swapped", "linear_act.cu", r"lane / 8 % 2", "lane / 16 % 2"),
    Mistake("no swizzle on one side", "linear_act.cu", r"2 \* k \+ lane / 16", "2 * k"),
    Mistake("halves of b swapped", "mma.cuh",
            r"\{%0, %1, %2, %3\}, \{%4, %5, %6, %7\}, \{%8, %9\}",
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%9, %8}"),
    Mistake("rows of a fragment swapped", "linear_act.cu",
            r"lane / 4 \+ i / 2 \* 8", "lane / 4 + i % 2 * 8"),
    Mistake("sums start anywhere", "linear_act.cu",
            r"sums\[TILE::WM / 16\]\[TILE::WN / 8\]\[4\] = \{\};",
            "sums[TILE::WM / 16][TILE::WN / 8][4];"),
    Mistake("windows of the mask one bit off", "philox.h",
            r"words\.w\[k\] >> 16", "words.w[k] >> 15"),
    Mistake("the mask by the row alone", "bias_act_dropout_bwd.cu",
            r"mask_row, uint32_t\(col / kEight\)", "mask_row, 0u"),
    Mistake("half of the warp", "cross_entropy.cu",
            r"int mask = kWarp / 2; mask > 0", "int mask = kWarp / 4; mask > 0"),
    Mistake("the next row's target", "cross_entropy.cu", r"p\.target\[row\]", "p.target[row + 1]"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_the_machine_finds_a_mistake(mistake):
    launchers.set_machine()
    source = HEADERS.get(mistake.file, mistake.file)
    work, fewer = WORK[source]
    edits = [(mistake.file, mistake.there, mistake.instead)]
    changed = library.mistaken(80, source, edits, fewer)
    with launchers.chosen().replaced(changed):
        with pytest.raises((Fault, AssertionError)) as found:
            work()
    if mistake.found_as:
        assert isinstance(found.value, Fault) and re.search(mistake.found_as, str(found.value))


@pytest.mark.parametrize("source", WORK)
def test_without_a_mistake_nothing_is_found(source):
    launchers.set_machine()
    work, fewer = WORK[source]
    with launchers.chosen().replaced(library.mistaken(80, source, [], fewer)):
        work()


def test_a_change_of_host_code_is_seen_to_change_no_kernel():
    from ..ptx import mutant

    file = "csrc/cuda/cross_entropy.cu"
    lines = (library.ROOT / file).read_text().split("\n")
    at = lines.index("    if (p.rows == 0)") + 2
    assert lines[at - 1] == "        return 0;"
    assert mutant.main(file, at, "        return 1;") == mutant.SAME
    at = lines.index("        powers += expf(v);") + 1
    assert mutant.main(file, at, "        powers -= expf(v);") == mutant.FOUND
