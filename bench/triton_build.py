"""Compiles Triton kernels for GPUs that are not there, and reads their machine code.

What is compiled is what the host code would launch: the ops are called on meta tensors, and each
launch is recorded with its arguments, constants, warps and stages. Needs neither a GPU nor a
driver; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fusedmlp.backends.triton import tiles

from . import machine_code
from .cases import DTYPES

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
_SHORT = {DTYPES[name]: name for name in ("fp32", "fp16", "bf16")} | {torch.int64: "i64"}
# By path: the package's own names of some are functions.
_MODULES = ("bias_act_dropout", "cross_entropy", "dgrad_act", "linear_act")


def tile_target(name: str) -> tiles.Target:
    """What the choice of tiles knows of a target."""
    if name.startswith("gfx"):
        return tiles.Target("hip", 0, 304, tiles.SHARED["hip"])
    return tiles.target(int(name.removeprefix("sm_")))


@dataclass
class Launch:
    """One recorded launch."""

    kernel: JITFunction
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Inside, launches for `target` are recorded and not run."""
    launches: list[Launch] = []

    def launch(kernel, programs, like, *args, warps, stages=1, **constants):
        launches.append(Launch(kernel, args, constants, warps, stages))

    with contextlib.ExitStack() as stack:
        for name in _MODULES:
            module = importlib.import_module(f"fusedmlp.backends.triton.{name}")
            stack.enter_context(mock.patch.object(module, "launch", launch))
        gemm = importlib.import_module("fusedmlp.backends.triton.gemm")
        stack.enter_context(mock.patch.object(gemm, "capability", lambda t: tile_target(target)))
        yield launches


def _specialized(param, value) -> tuple[str, bool]:
    """(type in the signature, is divisible by 16) as Triton's binder decides it at a launch."""
    if isinstance(value, torch.Tensor):
        return f"*{_SHORT[value.dtype]}", value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):
        block = ",".join(str(size) for size in value.block_shape)
        return f"tensordesc<{_SHORT[value.base.dtype]}[{block}]>", False
    if param.annotation_type:
        return param.annotation_type, False
    if isinstance(value, int) and not param.do_not_specialize:
        if value == 1:
            return "constexpr", False
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
    return ("fp32" if isinstance(value, float) else "i32"), False


def source(launch: Launch) -> ASTSource:
    """The kernel with the specialisation that this launch would have."""
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value = values[param.name]
        kind, aligned = "constexpr", False
        if not param.is_constexpr and value is not None:
            kind, aligned = _specialized(param, value)
        signature[param.name] = kind
        if kind == "constexpr":
            constants[param.name] = value
        elif aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _is_compiled(node: ast.stmt) -> bool:
    """A kernel, a function that kernels call, or a constant of theirs."""
    if isinstance(node, ast.FunctionDef):
        return any("jit" in ast.dump(d) for d in node.decorator_list)
    return isinstance(node, (ast.Assign, ast.AnnAssign)) and "constexpr" in ast.dump(node)


@functools.cache
def kernels_hash() -> str:
    """Of all that is compiled in the Triton files, not of host code, comments and layout."""
    found = hashlib.sha256()
    for path in sorted(Path(tiles.__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if _is_compiled(node):
                found.update(ast.unparse(node).encode())
    return found.hexdigest()


def code_hash(launch: Launch, target: str, version: str = triton.__version__) -> str:
    """Of all that decides the machine code: kernels, specialisation, target, Triton's version."""
    made = source(launch)
    parts = [version, kernels_hash(), launch.kernel.__name__, target, launch.warps, launch.stages]
    for named in (made.signature, made.constants, made.attrs):
        parts += sorted(f"{key}={value}" for key, value in named.items())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read_nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (made,) = machine_code.functions(file.name)
    counts: Counter[str] = Counter()
    for name, count in made.counts.items():
        counts[name.split(".")[0]] += count
    return {
        "registers": made.registers,
        # Local memory: a frame on the stack, or an instruction that reads or writes it.
        "local_bytes": made.stack + made.local,
        "local_accesses": made.spills,
        "instructions": counts.total(),
        "tensor_core": ", ".join(sorted(n for n in counts if n.endswith("MMA"))),
        "counts": dict(counts),
    }


def _read_amd(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    names = re.findall(r"^\s+([vs]_[a-z0-9_]+|ds_\w+|global_\w+|buffer_\w+)", assembly, re.M)
    return {
        "registers": number("vgpr_count"),
        "local_bytes": number("private_segment_fixed_size"),
        "local_accesses": number("vgpr_spill_count"),
        "instructions": len(names),
        "tensor_core": "MFMA" if any(n.startswith("v_mfma") for n in names) else "",
        "counts": {},
    }


def build(launch: Launch, target: str) -> dict[str, Any]:
    """Compiles one launch for a target; what its machine code needs and holds."""
    start = time.perf_counter()
    options = dict(num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True)
    compiled = triton.compile(source(launch), target=TARGETS[target], options=options)
    seconds = time.perf_counter() - start
    is_nvidia = target.startswith("sm_")
    read = _read_nvidia(compiled.asm["cubin"]) if is_nvidia else _read_amd(compiled.asm["amdgcn"])
    return {
        "kernel": launch.kernel.__name__,
        "target": target,
        "warps": launch.warps,
        "stages": launch.stages,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": tile_target(target).shared,
        **read,
        "seconds": round(seconds, 2),
    }


def launches_of(target: str, call: Callable[[], Any]) -> list[Launch]:
    """The launches that a call of an op would make on a target."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET must not be set: it leaves nothing to compile")
    with recording(target) as launches:
        call()
    return launches
