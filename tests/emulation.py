"""The CUDA kernels on the CPU: csrc/cuda/*.cu compiled by the C++ compiler, run by csrc/emulation.

The launchers are called through ctypes on CPU tensors. Every call names the memory it may touch,
so that an access outside of it is an error, as are misaligned accesses and barriers that not all
threads reach. Imports nothing of the package's kernels.
"""

import ctypes
import fcntl
import hashlib
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch

from build_tools.toolchain import CannotBuild, Compiler
from fusedmlp import activations

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted([*(CSRC / "cuda").glob("*.cu"), *(CSRC / "emulation").glob("*.cpp")])
FLAGS = "-O1 -std=c++20 -fPIC -fvisibility=hidden -Wall -Werror -DFUSEDMLP_EMULATE -I".split()
DTYPE_IDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TILES = {"by size": 0, "small": 1, "medium": 2, "large": 3}
ORDERS = {"forwards": 0, "backwards": 1, "shuffled": 2}


class Dropout(Structure):
    _fields_ = [
        ("state", c_void_p),
        ("threshold", c_uint64),
        ("scale", c_float),
        ("layer", c_int64),
        ("row_offset", c_int64),
    ]


class Epilogue(Structure):
    _fields_ = [
        ("bias", c_void_p),
        ("slope", c_void_p),
        ("bias_dtype", c_int),
        ("slope_dtype", c_int),
        ("slope_size", c_int64),
        ("act", c_int),
        ("alpha", c_float),
        ("drop", Dropout),
        ("dtype", c_int),
        ("rows", c_int64),
        ("cols", c_int64),
    ]


class Fwd(Structure):
    _fields_ = [("y", c_void_p), ("x", c_void_p), ("e", Epilogue)]


class Bwd(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("dz", "db", "dslope", "dy", "saved")),
        ("saves", c_int),
        ("e", Epilogue),
    ]


class Linear(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("y", "h", "x", "w")),
        *((name, c_int64) for name in ("x_stride", "w_stride", "k")),
        ("e", Epilogue),
    ]


class CrossEntropy(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("losses", "dx", "x", "target")),
        ("ignore_index", c_int64),
        ("smoothing", c_float),
        ("factor", c_float),
        ("dtype", c_int),
        ("rows", c_int64),
        ("cols", c_int64),
    ]


def compile_all(sources, folder: Path, name: str, flags=(), libraries=()) -> Path:
    """A shared library of C++ sources in `folder`, made once for the same text and compiler."""
    compiler = Compiler().command
    texts = [p.read_bytes() for p in sorted(CSRC.rglob("*")) if p.is_file()]
    key = hashlib.sha256(b"".join([*texts, shlex.join([*compiler, *flags]).encode()])).hexdigest()
    folder = folder / key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / name
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library

        def compile_one(source):
            target = folder / f"{source.name}.o"
            command = [*compiler, *FLAGS, str(CSRC), *flags]
            command += ["-x", "c++", "-c", str(source), "-o", str(target)]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            return str(target)

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        link = [*compiler, "-shared", *objects, "-o", str(library) + ".new", *libraries]
        subprocess.run(link, check=True)
        Path(str(library) + ".new").rename(library)
    return library


def cannot_build() -> str | None:
    try:
        Compiler()
    except CannotBuild as reason:
        return str(reason)
    return None


@cache
def library() -> ctypes.CDLL:
    path = compile_all(SOURCES, ROOT / "build" / "emulation", "emulated.so")
    lib = ctypes.CDLL(str(path))
    lib.fusedmlp_emulation_launches.restype = c_int64
    lib.fusedmlp_emulation_memory.argtypes = [c_void_p, c_int64, c_int]
    for name, params in (
        ("emulate_bias_act_dropout_fwd", Fwd),
        ("emulate_bias_act_dropout_bwd", Bwd),
        ("emulate_linear_act", Linear),
        ("emulated_linear_act_takes", Linear),
        ("emulate_cross_entropy", CrossEntropy),
    ):
        getattr(lib, f"fusedmlp_{name}").argtypes = [POINTER(params)]
    lib.fusedmlp_emulate_linear_act.argtypes = [POINTER(Linear), c_int]
    return lib


def set_machine(order: str = "forwards", late_copies: bool = True) -> None:
    library().fusedmlp_emulation_set(ORDERS[order], int(late_copies))


class KernelError(RuntimeError):
    """A launcher returned an error."""


def _span(t: torch.Tensor) -> int:
    """Bytes from the first to one beyond the last element, for any strides."""
    if t.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def _launch(name: str, params: Structure, reads, writes, *extra: int) -> None:
    lib = library()
    lib.fusedmlp_emulation_memory(None, 0, 0)
    for tensors, writable in ((reads, 0), (writes, 1)):
        for t in tensors:
            if t is not None and t.numel():
                lib.fusedmlp_emulation_memory(t.data_ptr(), _span(t), writable)
    error = getattr(lib, f"fusedmlp_{name}")(byref(params), *extra)
    lib.fusedmlp_emulation_memory(None, 0, 0)
    if error:
        raise KernelError(f"{name}: error {error}")


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An output before its kernel: NaN, so that an element that is not written is seen."""
    return torch.full(shape, float("nan"), dtype=dtype)


def _pointer(t: torch.Tensor | None):
    return None if t is None or t.numel() == 0 else t.data_ptr()


def epilogue(like, cols, rows, b, slope, state, act, alpha, threshold, scale, layer, row_offset):
    def dtype_of(t):
        return DTYPE_IDS[like.dtype if t is None else t.dtype]

    return Epilogue(
        _pointer(b),
        _pointer(slope),
        dtype_of(b),
        dtype_of(slope),
        0 if slope is None else slope.numel(),
        act,
        alpha,
        Dropout(_pointer(state), threshold, scale, layer, row_offset),
        dtype_of(None),
        rows,
        cols,
    )


# The functions of a backend (see fusedmlp/kernels/), for contiguous 2-D tensors.


def bias_act_dropout_fwd(x, b, slope, state, *numbers, y=None):
    y = unwritten(*x.shape, dtype=x.dtype) if y is None else y
    e = epilogue(x, x.shape[1], x.shape[0], b, slope, state, *numbers)
    params = Fwd(_pointer(y), _pointer(x), e)
    _launch("emulate_bias_act_dropout_fwd", params, (x, b, slope, state), (y,))
    return y


def bias_act_dropout_bwd(dy, saved, b, slope, state, *rest, dz=None):
    *numbers, saves, need_db, need_dslope = rest
    dz = unwritten(*dy.shape, dtype=dy.dtype) if dz is None else dz
    db = unwritten(dy.shape[1] if need_db else 0, dtype=b.dtype if need_db else dy.dtype)
    dslope = torch.full_like(slope, float("nan")) if need_dslope else dy.new_empty(0)
    e = epilogue(dy, dy.shape[1], dy.shape[0], b, slope, state, *numbers)
    pointers = (_pointer(t) for t in (dz, db, dslope, dy, saved))
    params = Bwd(*pointers, saves, e)
    reads, writes = (dy, saved, b, slope, state), (dz, db, dslope)
    _launch("emulate_bias_act_dropout_bwd", params, reads, writes)
    return dz, db, dslope


def linear_params(x, w, b, slope, state, *numbers, y, h=None):
    e = epilogue(x, w.shape[0], x.shape[0], b, slope, state, *numbers)
    pointers = (_pointer(t) for t in (y, h, x, w))
    return Linear(*pointers, x.stride(0), w.stride(0), x.shape[1], e)


def linear_act_fwd(x, w, b, slope, state, *numbers, want_h=True, tile="by size"):
    """y and h by the tensor-core kernel; unit stride along K, the rest multiples of 16 bytes."""
    y = unwritten(x.shape[0], w.shape[0], dtype=x.dtype)
    h = torch.full_like(y, float("nan")) if want_h else None
    params = linear_params(x, w, b, slope, state, *numbers, y=y, h=h)
    reads = (x, w, b, slope, state)
    _launch("emulate_linear_act", params, reads, (y, h), TILES[tile])
    return y, h


def takes(x, w, y) -> bool:
    numbers = (activations.NONE, 0.0, 0, 1.0, 0, 0)
    params = linear_params(x, w, None, None, None, *numbers, y=y)
    return bool(library().fusedmlp_emulated_linear_act_takes(byref(params)))


def cross_entropy(x, target, smoothing=0.0, ignore_index=-100, grad_scale=1.0):
    losses, dx = unwritten(x.shape[0], dtype=torch.float32), torch.full_like(x, float("nan"))
    pointers = (_pointer(t) for t in (losses, dx, x, target))
    numbers = ignore_index, smoothing, grad_scale, DTYPE_IDS[x.dtype]
    params = CrossEntropy(*pointers, *numbers, *x.shape)
    _launch("emulate_cross_entropy", params, (x, target), (losses, dx))
    return losses, dx
