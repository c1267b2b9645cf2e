"""Opens the compiled extension once per device type, or says why it cannot.

Two shared objects, as the CUDA one needs libtorch_cuda: _native_cpu.so and _native_cuda.so, beside
a _build_info.json that the build writes. Never compiles anything, and raises only for a value of
FUSEDMLP_CPU_ISA that does not exist.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import compat, context, environment
from ..spec import activations
from . import schemas

log = logging.getLogger("fusedmlp")

_FOLDER = Path(__file__).resolve().parents[1]
_TARGETS = {"cpu": "cpu", "cuda": "cuda"}  # device type -> build target
_OLDEST_TORCH = (2, 11)
_HOW = "FUSEDMLP_BUILD={} pip install --no-build-isolation ."
_NEVER = {("cross_entropy", "cpu")}  # PyTorch's own is as fast there


def library(target: str) -> Path:
    """The shared object of a build target, whether or not it is there."""
    return _FOLDER / f"_native_{target}.so"


def build_info() -> dict | None:
    """What the build has written down, or None where there was no build."""
    try:
        return json.loads((_FOLDER / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None


def _answer(path: Path, function: str) -> str:
    """Of a function of the library that returns a text."""
    call = getattr(ctypes.CDLL(str(path)), function)
    call.restype = ctypes.c_char_p
    return call().decode()


def asked_isa() -> str | None:
    """FUSEDMLP_CPU_ISA, or None; ValueError where there is no such instruction set."""
    return environment.read("FUSEDMLP_CPU_ISA")


def cpu_isa() -> str:
    """The instruction set in use, which is lower than the one that was asked for where the
    processor lacks that. The extension for the CPU can be opened."""
    return _answer(library("cpu"), "fusedmlp_cpu_isa")


def bf16_isa() -> str:
    """The instruction set of the training engine's products in bf16, or "" where there is none.
    The extension for the CPU can be opened."""
    return _answer(library("cpu"), "fusedmlp_bf16_isa")


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[bool]:
    """Inside, the highest instruction set of all threads is this one instead of the one that was
    asked for; whether the processor has it. For tests: calls that are under way may use either."""
    change = ctypes.CDLL(str(library("cpu"))).fusedmlp_set_cpu_isa
    try:
        yield bool(change(name.encode()))
    finally:
        change(None)


def cpu_isas() -> list[str]:
    """The instruction sets that the ops can use on this processor, from the lowest up."""
    found = []
    for name in environment.CHOICES["FUSEDMLP_CPU_ISA"]:
        with instruction_set(name):
            found += [name] if cpu_isa() == name else []
    return found


def _lacks(device_type: str) -> list[str]:
    """The ops that this version has for the device and the opened library does not."""
    has, key = compat.has_kernel, device_type.upper()
    names = compat.all_op_names()
    ours = (n for n in names if n.startswith("fusedmlp::") and n.endswith(".native"))
    short = {n.removeprefix("fusedmlp::").removesuffix(".native"): n for n in ours}
    return sorted(
        op for op, n in short.items() if (op, device_type) not in _NEVER and not has(n, key)
    )


def _not_built(target: str) -> str:
    info = build_info() or {}
    reason = (info.get("left_out") or {}).get(target)
    how = _HOW.format(target)
    if reason:
        return f"the extension was built without {target}: {reason}; build it with {how}"
    return f"the extension is not built for {target}; build it with {how}"


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def unavailable(device_type: str) -> str | None:
    """Why no native kernel runs on tensors of this device type, or None; opens the library."""
    context.watch_forks()
    target = _TARGETS.get(device_type)
    if target is None:
        return f"the extension has kernels for cpu and cuda tensors, not for {device_type!r}"
    path = library(target)
    if not path.exists():
        return _not_built(target)
    isa = asked_isa()
    built = build_info() or {}
    if _torch_version() < _OLDEST_TORCH:
        return f"the extension needs torch 2.11 or newer, this is {torch.__version__}"
    if device_type == "cuda" and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is not a CUDA build"
    rebuild = f"rebuild with {_HOW.format(target)}"
    try:
        if built.get("schemas") != schemas.digest():
            return (
                f"{path.name} was built from another version, whose ops take other arguments; "
                f"{rebuild}"
            )
        # Code with other bytes would compute anything, and a file that ends early ends the process.
        if built.get("crc32", {}).get(target) != zlib.crc32(path.read_bytes()):
            return f"{path.name} is damaged: it is not the file that was built; {rebuild}"
        torch.ops.load_library(str(path))
        found = _answer(path, "fusedmlp_activations")
    except (OSError, AttributeError) as error:
        return (
            f"{path.name}, built for torch {built.get('torch')}, cannot be opened under torch "
            f"{torch.__version__}: {error}; {rebuild}"
        )
    expected = " ".join(f"{a.name}={a.id}" for a in activations.TABLE)
    if found != expected:
        return (
            f"{path.name} was built from another version: its activations are '{found}', wanted "
            f"'{expected}'; {rebuild}"
        )
    if lacking := _lacks(device_type):
        return (
            f"{path.name} was built from another version: it has no {', '.join(lacking)}; {rebuild}"
        )
    if device_type == "cpu" and isa is not None and isa not in (cpu_isa(), bf16_isa()):
        log.info("FUSEDMLP_CPU_ISA=%s: this processor lacks it, %s is used", isa, cpu_isa())
    return _no_gpu_for_it() if device_type == "cuda" else None


def _no_gpu_for_it() -> str | None:
    """Why the CUDA kernels, which open without a GPU, cannot run here."""
    if not torch.cuda.is_available():
        return "no GPU is available to torch"
    archs = (build_info() or {}).get("archs") or []
    major, minor = torch.cuda.get_device_capability()
    # Machine code runs on the same major version from its own minor on; +PTX on anything newer.
    for arch in archs:
        number, _, ptx = arch.partition("+")
        a, b = (int(part) for part in number.rstrip("af").split("."))
        if (a == major and b <= minor) or (ptx and (a, b) <= (major, minor)):
            return None
    return (
        f"the extension was built for {', '.join(archs) or 'no GPU'}, this GPU is {major}.{minor}"
    )
