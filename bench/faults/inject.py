"""The preloaded library that makes the n-th allocation or the n-th write fail: building it, and
telling it when."""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FAILS, STAYS_FULL, KILLS = 1, 2, 3  # ways of faults_disk
_SOURCE = Path(__file__).with_name("inject.c")
NEVER = 1 << 60


def build(folder: Path) -> Path | None:
    """The library; None without a C compiler for Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "inject.so"
    # libstdc++ comes with it: of a library that is opened later it would not find operator new.
    words = "-O1 -shared -fPIC -Wl,--no-as-needed -lstdc++ -ldl".split()
    command = [compiler, *words[:3], _SOURCE, "-o", library, *words[3:]]
    subprocess.run(command, check=True)
    return library


def is_preloaded() -> bool:
    return hasattr(ctypes.CDLL(None), "faults_off")


@functools.cache
def _library() -> ctypes.CDLL:
    found = ctypes.CDLL(None)
    found.faults_memory.argtypes = [ctypes.c_long, ctypes.c_size_t, ctypes.c_size_t]
    found.faults_disk.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p]
    found.faults_off.restype = ctypes.c_long
    return found


def place_of(library: Path) -> tuple[int, int]:
    """The addresses between which an opened library lies."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0].split("-") for line in lines if line.endswith(str(library))]
    return min(int(a, 16) for a, _ in places), max(int(b, 16) for _, b in places)


class Count:
    number = 0


@contextlib.contextmanager
def memory(n: int, library: Path) -> Iterator[Count]:
    """The n-th allocation of the library's code, or of a tensor, fails. Yields a Count, which at
    the end holds how many there were."""
    counted = Count()
    _library().faults_memory(n, *place_of(library))
    try:
        yield counted
    finally:
        counted.number = _library().faults_off()


@contextlib.contextmanager
def disk(n: int, way: int, folder: Path) -> Iterator[Count]:
    """The n-th time that something is written to, made or renamed in the folder, it fails so."""
    counted = Count()
    _library().faults_disk(n, way, os.fsencode(f"{folder.resolve()}/"))
    try:
        yield counted
    finally:
        counted.number = _library().faults_off()
