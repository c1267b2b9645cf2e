"""A small launch of each CUDA kernel without torch, for compute-sanitizer on a GPU.

    python -m tests.ptx.harness               on a GPU that the extension was built for
    python -m tests.ptx.harness --machine     on the PTX machine, to see that the cases run

torch takes seconds to start, far more when it is instrumented, and its allocator hides where a
tensor ends. Whether values are right is what the other tests ask; here they have to be finite.
"""

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Iterator
from ctypes import byref, c_void_p
from itertools import product
from pathlib import Path

import numpy as np

from build_tools.toolchain import NVCC_FLAGS, ROOT, CannotBuild, Nvcc, Torch

from .params import DTYPE_IDS, TILES, Bwd, CrossEntropy, Dropout, Epilogue, Fwd, Linear, declare

HERE = Path(__file__).parent
RAW = {"fp32": np.float32, "fp16": np.uint16, "bf16": np.uint16, "int64": np.int64}
# An activation of each family, and what its backward reads: nothing, y or x.
ACTS = {"none": (0, 0), "relu": (1, 1), "prelu": (3, 2), "gelu": (8, 2)}
SEED, P = (0x5EED, 1), 0.3


def built() -> Path:
    """The launchers for this GPU, linked of the objects that the extension was built of."""
    folders = sorted((ROOT / "build" / "native").glob("*/cuda"), key=lambda f: f.stat().st_mtime)
    kernels = sorted(folders[-1].glob("cuda_*.o")) if folders else []
    if not kernels:
        raise CannotBuild("no CUDA objects in build/native: build the extension first")
    library = folders[-1] / "harness.so"
    more = [str(HERE / name) for name in ("exports.cpp", "gpu_memory.cpp")]
    command = [Nvcc(Torch()).path, *NVCC_FLAGS, f"-I{ROOT / 'csrc'}", "-shared", *more]
    subprocess.run([*command, *map(str, kernels), "-o", str(library)], check=True)
    return library


class Gpu:
    """Every array has memory of its own, of its very size."""

    def __init__(self):
        self.calls, self.held = ctypes.CDLL(str(built())), []
        declare(self.calls)

    def _did(self, what: str, *arguments) -> None:
        if error := getattr(self.calls, what)(*arguments):
            raise RuntimeError(f"{what}: CUDA error {error}")

    def room(self, kind: str, *shape: int) -> int:
        at, size = c_void_p(), int(np.prod(shape)) * np.dtype(RAW[kind]).itemsize
        self._did("gpu_new", byref(at), ctypes.c_size_t(max(size, 1)))
        self.held.append(at)
        return at.value

    def put(self, kind: str, values: np.ndarray) -> int:
        at = self.room(kind, *values.shape)
        self._did("gpu_copy", c_void_p(at), c_void_p(values.ctypes.data), values.nbytes)
        return at

    def get(self, at: int, kind: str, *shape: int) -> np.ndarray:
        values = np.empty(shape, RAW[kind])
        self._did("gpu_copy", c_void_p(values.ctypes.data), c_void_p(at), values.nbytes)
        return values

    def launch(self, name: str, params: ctypes.Structure, *more) -> None:
        self._did(f"ptx_{name}", byref(params), *more)

    def forget(self) -> None:
        while self.held:
            self._did("gpu_delete", self.held.pop())


class OnMachine(Gpu):
    """The same on the PTX machine, where memory is NumPy's."""

    def __init__(self):
        from . import library

        self.library, self.arrays = library.library(library.ARCHS[0]), {}
        self.calls = self.library.calls
        declare(self.calls)

    def room(self, kind, *shape, values=None):
        wide = np.zeros(int(np.prod(shape)) + 64, RAW[kind])
        array = wide[-wide.ctypes.data % 64 // wide.itemsize :][: int(np.prod(shape))]
        if values is not None:
            array[:] = values.ravel()
        written = values is not None
        if array.size:
            place = array.ctypes.data, array.nbytes, array.itemsize
            self.library.machine.memory.name(*place, not written, written)
        self.arrays[array.ctypes.data] = array
        return array.ctypes.data

    def put(self, kind, values):
        return self.room(kind, *values.shape, values=values)

    def get(self, at, kind, *shape):
        return self.arrays[at].reshape(shape)

    def launch(self, name, params, *more):
        self.library.raise_fault(getattr(self.calls, f"ptx_{name}")(byref(params), *more))

    def forget(self):
        self.library.machine.memory.buffers.clear()
        self.arrays.clear()


class Case:
    """One op at one size: puts its inputs on the device, and takes its outputs from there."""

    def __init__(self, gpu: Gpu, dtype: str, rows: int, columns: int):
        self.gpu, self.dtype, self.rows, self.columns = gpu, dtype, rows, columns
        self.random, self.outputs = np.random.default_rng(0), []

    def normal(self, *shape: int) -> int:
        values = self.random.standard_normal(shape, dtype=np.float32)
        if self.dtype == "fp16":
            values = values.astype(np.float16).view(np.uint16)
        elif self.dtype == "bf16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        return self.gpu.put(self.dtype, values)

    def output(self, *shape: int, kind: str | None = None) -> int:
        kind = kind or self.dtype
        self.outputs.append((self.gpu.room(kind, *shape), kind, *shape))
        return self.outputs[-1][0]

    def epilogue(self, act: str, p: float) -> Epilogue:
        n, kind = self.columns, DTYPE_IDS[self.dtype]
        state = self.gpu.put("int64", np.array(SEED)) if p else None
        drop = Dropout(state, round(p * 2**32), 1 / (1 - p), 3, 11)
        slope = (self.normal(n), kind, kind, n) if act == "prelu" else (None, kind, kind, 0)
        return Epilogue(self.normal(n), *slope, ACTS[act][0], 0.01, drop, kind, self.rows, n)

    def elementwise(self, act: str, p: float) -> None:
        shape, e = (self.rows, self.columns), self.epilogue(act, p)
        x = self.normal(*shape)
        self.gpu.launch("bias_act_dropout_fwd", Fwd(self.output(*shape), x, e))
        saves, slopes = ACTS[act][1], self.output(self.columns) if act == "prelu" else None
        sums = self.output(self.columns), slopes
        back = Bwd(self.output(*shape), *sums, self.normal(*shape), x, saves, e)
        scratch = self.gpu.room(
            "fp32", self.gpu.calls.ptx_bias_act_dropout_bwd_scratch(byref(back))
        )
        self.gpu.launch("bias_act_dropout_bwd", back, c_void_p(scratch))

    def linear(self, act: str, p: float, k: int, tile: str) -> None:
        shape, e = (self.rows, self.columns), self.epilogue(act, p)
        stride = -(-k // 8) * 8
        x, w = self.normal(self.rows, stride), self.normal(self.columns, stride)
        outputs = self.output(*shape), self.output(*shape)
        self.gpu.launch("linear_act", Linear(*outputs, x, w, stride, stride, k, e), TILES[tile])

    def cross_entropy(self) -> None:
        m, n = self.rows, self.columns
        target = self.gpu.put("int64", np.arange(m) % n)
        outputs = self.output(m, kind="fp32"), self.output(m, n)
        numbers = -100, 0.1, 1.0, DTYPE_IDS[self.dtype], m, n
        self.gpu.launch(
            "cross_entropy", CrossEntropy(*outputs, self.normal(m, n), target, *numbers)
        )

    def end(self) -> None:
        """Raises ValueError where an output is not finite."""
        for at, kind, *shape in self.outputs:
            bits = self.gpu.get(at, kind, *shape).view(np.uint32 if kind == "fp32" else np.uint16)
            exponent = {"fp32": 0x7F800000, "fp16": 0x7C00, "bf16": 0x7F80}[kind]
            if ((bits & exponent) == exponent).any():
                raise ValueError(f"an output of {self.dtype}, {shape}, is not finite")
        self.gpu.forget()


def cases() -> Iterator[tuple[str, str, int, int, str, tuple]]:
    """What it is, and dtype, rows, columns, method and arguments of a Case."""
    for dtype, columns, (act, p) in product(
        ("fp32", "fp16", "bf16"), (40, 37), zip(ACTS, (P, P, P, 0.0), strict=True)
    ):
        yield f"elementwise {dtype} {act} {columns}", dtype, 600, columns, "elementwise", (act, p)
    for dtype, tile in product(("fp16", "bf16"), ("small", "medium", "large")):
        for act, k, columns in (("relu", 72, 40), ("prelu", 203, 72), ("gelu", 520, 37)):
            name = f"linear_act {dtype} {tile} {act} {k}"
            yield name, dtype, 150, columns, "linear", (act, P, k, tile)
    for dtype, columns in product(("fp32", "fp16", "bf16"), (10, 1500)):
        yield f"cross_entropy {dtype} {columns}", dtype, 70, columns, "cross_entropy", ()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.ptx.harness", description=__doc__.splitlines()[0])
    parser.add_argument("--machine", action="store_true", help="the PTX machine instead of a GPU")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    args = parser.parse_args(argv)
    try:
        gpu = OnMachine() if args.machine else Gpu()
    except CannotBuild as reason:
        print(f"harness: {reason}", file=sys.stderr)
        return 2
    ran, wrong = 0, 0
    for name, dtype, rows, columns, method, arguments in cases():
        if args.only not in name:
            continue
        ran += 1
        case = Case(gpu, dtype, rows, columns)
        try:
            getattr(case, method)(*arguments)
            case.end()
        except (RuntimeError, ValueError) as error:
            wrong += 1
            print(f"{name}: {error}", flush=True)
    print(f"{ran} cases, {wrong} wrong")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
