"""Opens the compiled extension once per device type, or says why it cannot.

Two shared objects, as the CUDA one needs libtorch_cuda: _native_cpu.so and _native_cuda.so, beside
a _build_info.json that the build writes. Never compiles anything and never raises.
"""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path

import torch

from ... import activations

_FOLDER = Path(__file__).resolve().parents[2]
_TARGETS = {"cpu": "cpu", "cuda": "cuda"}  # device type -> build target
_OLDEST_TORCH = (2, 11)
_HOW = "FUSEDMLP_BUILD={} pip install --no-build-isolation ."


def library(target: str) -> Path:
    """The shared object of a build target, whether or not it is there."""
    return _FOLDER / f"_native_{target}.so"


def build_info() -> dict | None:
    """What the build has written down, or None where there was no build."""
    try:
        return json.loads((_FOLDER / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None


def _activation_ids(path: Path) -> str:
    """'none=0 relu=1 ...' as the library was compiled."""
    table = ctypes.CDLL(str(path)).fusedmlp_activations
    table.restype = ctypes.c_char_p
    return table().decode()


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
    target = _TARGETS.get(device_type)
    if target is None:
        return f"the extension has kernels for cpu and cuda tensors, not for {device_type!r}"
    path = library(target)
    if not path.exists():
        return _not_built(target)
    built_for = (build_info() or {}).get("torch", "an unknown torch")
    if _torch_version() < _OLDEST_TORCH:
        return f"the extension needs torch 2.11 or newer, this is {torch.__version__}"
    if device_type == "cuda" and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is not a CUDA build"
    try:
        torch.ops.load_library(str(path))
        found = _activation_ids(path)
    except (OSError, AttributeError) as error:
        return (
            f"{path.name}, built for torch {built_for}, cannot be opened under torch "
            f"{torch.__version__}: {error}; rebuild with {_HOW.format(target)}"
        )
    expected = " ".join(f"{a.name}={a.id}" for a in activations.TABLE)
    if found != expected:
        return (
            f"{path.name} was built from another version: its activations are '{found}', wanted "
            f"'{expected}'; rebuild with {_HOW.format(target)}"
        )
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
