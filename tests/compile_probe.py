"""Run by test_triton_compile.py in a process of its own: every kernel through Triton's front end,
for sizes that it compiles apart. What is 1 is a number of Python's there, not of the kernel's.

Prints, as JSON, what failed, which kernels were made, and which approximations the machine code of
fp32 activations has.
"""

import itertools
import json
import re
import sys

import torch
import triton
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

from bench import triton_build
from fusedmlp.backends.triton import bias_act_dropout as epilogue
from fusedmlp.backends.triton import linear_act, tiles
from fusedmlp.backends.triton.cross_entropy import cross_entropy
from fusedmlp.backends.triton.dgrad_act import dgrad_act
from fusedmlp.spec import activations, philox

TARGET = "sm_90"
BACKEND = make_backend(triton_build.TARGETS[TARGET])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Each of M, N and K is 1, a multiple of 16, and neither; K may be 0.
SIZES = [(1, 17, 16), (17, 1, 16), (16, 17, 1), (1, 1, 1), (1, 16, 1), (16, 16, 17), (17, 16, 0)]


def to_triton_ir(launch) -> None:
    """What the front end makes of a launch; it is there that a number has no `.to`."""
    source = triton_build.source(launch)
    options = BACKEND.parse_options(dict(num_warps=launch.warps, num_stages=launch.stages))
    context = ir.context()
    ir.load_dialects(context)
    BACKEND.load_dialects(context)
    functions = BACKEND.get_codegen_implementation(options)
    target = triton_build.TARGETS[TARGET]
    source.make_ir(target, options, functions, BACKEND.get_module_map(), context)


def calls(m, n, k, dtype):
    """(name, call) of every op on meta tensors, with dropout and with each kind of saved tensor."""

    def empty(*shape, kind=dtype):
        return torch.empty(shape, dtype=kind, device="meta")

    x, w, b, state = empty(m, k), empty(n, k), empty(n), empty(2, kind=torch.int64)
    threshold, scale = philox.threshold_and_scale(0.1)
    for act in ("gelu", "prelu") if dtype == torch.float32 else ("gelu",):
        slope = empty(n) if act == "prelu" else None
        numbers = slope, state, activations.IDS[act], 0.01, threshold, scale, 0, 0
        for splits in (1, 2):
            tile = tiles.Tile(16, 16, 16, 4, 2, splits=splits)
            # A split is only made where K is longer than a tile.
            deep = (empty(m, k + 16), empty(n, k + 16)) if splits > 1 else (x, w)
            yield (
                f"linear_act {act} splits {splits}",
                lambda deep=deep, numbers=numbers, tile=tile: linear_act.run(
                    *deep, b, *numbers, keep_preact=True, tile=tile
                ),
            )
        rest = b, *numbers, activations.SAVE_Z, True, slope is not None
        tile = tiles.Tile(16, 16, 16, 4, 2)
        yield (
            f"dgrad_act {act}",
            lambda rest=rest, tile=tile: dgrad_act(x, empty(k, n), empty(m, n), *rest, tile=tile),
        )
        yield (
            f"bias_act_dropout_fwd {act}",
            lambda numbers=numbers: epilogue.bias_act_dropout_fwd(empty(m, n), b, *numbers),
        )
        yield (
            f"bias_act_dropout_bwd {act}",
            lambda rest=rest: epilogue.bias_act_dropout_bwd(empty(m, n), empty(m, n), *rest),
        )
    target = empty(m, kind=torch.int64)
    yield "cross_entropy", lambda: cross_entropy(empty(m, n), target, 0.1)
    yield "cross_entropy of long rows", lambda: cross_entropy(empty(m, 5000 + n), target, 0.1)
    partial = empty(m, n, kind=torch.float32)
    yield "column_sum", lambda: epilogue.column_sum(partial, empty(n))


def approximations(act) -> set[str]:
    """Of PTX, in the elementwise kernels of an activation, forward and backward, in fp32."""
    x, b = (torch.empty(shape, device="meta") for shape in ((16, 16), (16,)))
    numbers = None, None, activations.IDS[act], 0.0, 0, 1.0, 0, 0
    saves = activations.saves(activations.IDS[act], 0.0, torch.float32, False)
    found: set[str] = set()
    for call in (
        lambda: epilogue.bias_act_dropout_fwd(x, b, *numbers),
        lambda: epilogue.bias_act_dropout_bwd(x, x, b, *numbers, saves, False, False),
    ):
        (launch,) = triton_build.launches_of(TARGET, call)
        options = dict(num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True)
        target = triton_build.TARGETS[TARGET]
        made = triton.compile(triton_build.source(launch), target=target, options=options)
        found |= set(re.findall(r"\b\w+\.(?:approx|full)[\w.]*", made.asm["ptx"]))
    return found


failed, kernels = {}, set()
for (m, n, k), dtype in itertools.product(SIZES, DTYPES):
    for name, call in calls(m, n, k, dtype):
        for launch in triton_build.launches_of(TARGET, call):
            kernels.add(launch.kernel.__name__)
            try:
                to_triton_ir(launch)
            except Exception as error:
                failed[f"{name} {m}x{n}x{k} {dtype}"] = str(error).splitlines()[-1]
approximate = {act: sorted(approximations(act)) for act in activations.NAMES if act != "prelu"}
found = {"failed": failed, "kernels": sorted(kernels), "approximations": approximate}
json.dump(found, sys.stdout)
