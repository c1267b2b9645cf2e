"""Builds csrc/cuda with nvcc for the PTX machine, once for the same text, and loads it.

Host code launches through runtime.cpp; the PTX lies in the library as text.
"""

import ctypes
import fcntl
import hashlib
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ctypes import CFUNCTYPE, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from pathlib import Path

from build_tools.toolchain import NVCC_FLAGS, CannotBuild, Nvcc, Torch

from .machine import Machine
from .memory import Fault
from .parse import Kernel, kernels_of

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "ptx"
ARCHS = (80, 120)  # nvcc has a compiler for each of these; that of 80 also makes 90
INVALID_FUNCTION, LAUNCH_FAILURE = 98, 719  # of cudaError_t


@cache
def nvcc() -> Nvcc:
    return Nvcc(Torch())


@cache
def cannot_build() -> str | None:
    """Why the PTX tests cannot run here."""
    try:
        known = subprocess.run([nvcc().path, "--list-gpu-arch"], capture_output=True, text=True)
    except CannotBuild as reason:
        return str(reason)
    missing = [a for a in ARCHS if f"compute_{a}" not in known.stdout]
    return f"nvcc {nvcc().version} does not know compute_{missing[0]}" if missing else None


def _once(target: Path, make) -> Path:
    """A file that is made by one process and kept."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            new = target.with_name("new-" + target.name)
            command = [*make, "-o", str(new)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{shlex.join(command)}\n{run.stdout}{run.stderr}")
            new.rename(target)
    return target


def _key(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def build(name: str, arch: int, more=(), flags=(), libraries=()) -> Path:
    """A shared library of csrc/cuda, runtime.cpp and `more` sources, with PTX for one target."""
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "runtime.cpp", *more]
    headers = [p for p in sorted(CSRC.rglob("*.*h")) if CSRC / "cpu" not in p.parents]
    headers = b"".join(p.read_bytes() for p in headers)
    command = [nvcc().path, *NVCC_FLAGS, f"-arch=compute_{arch}", f"-code=compute_{arch}"]
    command += ["--no-compress", f"-I{CSRC}"]

    def compile_one(source):
        how, texts = command, [headers, source.read_bytes(), nvcc().version.encode()]
        if source in more:
            how = [*command, *flags]
            texts += [p.read_bytes() for p in sorted(HERE.glob("*.h"))]
        key = _key(*texts, shlex.join(how).encode())
        return _once(FOLDER / f"{key}-{source.stem}.o", [*how, "-c", str(source)])

    with ThreadPoolExecutor(2) as pool:
        objects = [str(o) for o in pool.map(compile_one, sources)]
    link = [*command, "-shared", "-cudart", "none", "-Xlinker", "-Bsymbolic", *objects, *libraries]
    return _once(FOLDER / f"{_key(shlex.join(link).encode())}-{name}", link)


def ptx_of(library: Path) -> list[str]:
    """The PTX modules in a library, as nvcc wrote them."""
    found = re.findall(rb"\.version \d+\.\d+\s+\.target .*?\0", library.read_bytes(), re.S)
    return [text.rstrip(b"\0").decode() for text in found]


def mistaken(arch: int, name: str, edits, keep=()) -> dict[str, Kernel]:
    """Kernels of one .cu with `edits` made to the sources: (file, pattern, replacement) each.

    `keep` are edits that leave fewer kernels to compile. Host code stays that of the library, so
    names are without the part that depends on the file.
    """
    csrc = {p.name: p for folder in ("cuda", "common") for p in (CSRC / folder).iterdir()}
    texts = {file: path.read_text() for file, path in csrc.items()}
    for file, there, instead in [*edits, *keep]:
        texts[file], changed = re.subn(there, instead, texts[file], flags=re.S)
        if not changed:
            raise LookupError(f"{there} is not in {file} any more")
    key = _key(*(t.encode() for t in texts.values()), name.encode(), nvcc().version.encode())
    ptx, copy = FOLDER / f"{key}.ptx", FOLDER / f"{key}-sources"
    if not ptx.exists():
        for file, path in csrc.items():
            target = copy / path.relative_to(CSRC)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(texts[file])
        flags = [*NVCC_FLAGS, f"-arch=compute_{arch}", f"-I{copy}"]
        _once(ptx, [nvcc().path, *flags, "-ptx", str(copy / "cuda" / name)])
        shutil.rmtree(copy, ignore_errors=True)
    return {plain_name(k): kernel for k, kernel in kernels_of(ptx.read_text()).items()}


def plain_name(text: str) -> str:
    """Without what nvcc adds to names of an anonymous namespace, which depends on the file."""
    return re.sub(r"_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}", "", text)


class Library:
    """The launchers of csrc/cuda, on a machine."""

    LAUNCH = CFUNCTYPE(c_int, c_char_p, c_uint, c_uint, c_size_t, c_void_p)
    FILL = CFUNCTYPE(c_int, c_void_p, c_int, c_size_t)

    def __init__(self, path: Path):
        self.path, self.machine, self.fault = path, Machine(), None
        for text in ptx_of(path):
            self.machine.load(text)
        self.calls = ctypes.CDLL(str(path))
        self._callbacks = self.LAUNCH(self._launch), self.FILL(self._fill)
        self.calls.ptx_machine(*self._callbacks)

    def _launch(self, name, blocks, threads, shared, params):
        kernel = self.machine.kernels.get(name.decode())
        if kernel is None:
            return INVALID_FUNCTION
        values = ctypes.string_at(params, kernel.param_bytes)
        return self._guarded(self.machine.launch, name.decode(), blocks, threads, shared, values)

    def _fill(self, at, value, size):
        return self._guarded(self.machine.fill, at, value, size)

    def _guarded(self, call, *args) -> int:
        """Keeps an exception, which must not pass through C++, for `raise_fault`."""
        try:
            call(*args)
        except Exception as fault:
            self.fault = fault
            return LAUNCH_FAILURE
        return 0

    @contextmanager
    def replaced(self, kernels: dict[str, Kernel]):
        """Other code for kernels, by plain name."""
        machine, before = self.machine, dict(self.machine.kernels)
        names = {name: plain_name(name) for name in before}
        machine.kernels |= {n: kernels[plain] for n, plain in names.items() if plain in kernels}
        machine.codes.clear()
        try:
            yield
        finally:
            machine.kernels = before
            machine.codes.clear()

    def raise_fault(self, error: int) -> None:
        """After a call that returned `error`."""
        fault, self.fault = self.fault, None
        if fault:
            raise fault
        if error:
            raise Fault(f"the launcher returned error {error}")


@cache
def library(arch: int) -> Library:
    return Library(build("kernels.so", arch, more=[HERE / "exports.cpp"]))
