"""Finds what the extension is built with (torch, C++ compiler, nvcc, ninja), or says why not.

Imports neither torch nor anything else outside the standard library.
"""

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_AT_LEAST = (2, 11)
ARCHS = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX")
OLDEST_ARCH = 75
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mprfchw", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_FLAGS = {
    "_avx2": AVX2,
    "_avx512": AVX512,
    "_avx512_bf16": [*AVX512, "-mavx512bf16"],
    "_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
NVCC_FLAGS = "-O3 -std=c++20 -Xcompiler -fPIC,-fvisibility=hidden --expt-relaxed-constexpr".split()


class CannotBuild(Exception):
    """A reason, in one line, why a target cannot be built here."""


def output_of(*command):
    """What a command prints, or None when it cannot be run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Torch:
    """Where torch is and what it was built for, without importing it."""

    def __init__(self):
        spec = importlib.util.find_spec("torch")
        if spec is None or not spec.submodule_search_locations:
            raise CannotBuild(
                "torch is not installed where the build runs; install torch, then "
                "pip install --no-build-isolation ."
            )
        self.root = Path(next(iter(spec.submodule_search_locations)))
        version = runpy.run_path(str(self.root / "version.py"))
        self.version, self.cuda = version["__version__"], version.get("cuda")
        numbers = tuple(int(n) for n in re.findall(r"\d+", self.version)[:2])
        if numbers < TORCH_AT_LEAST:
            raise CannotBuild(f"torch is {self.version}, 2.11 or newer is needed")
        include = self.root / "include"
        self.includes = [include, include / "torch" / "csrc" / "api" / "include"]


class Compiler:
    """The C++ compiler, tried on a small C++20 program before anything else is started."""

    # __cplusplus is 201709 in gcc 10, which lacks parts of C++20 that torch's headers use
    PROBE = """
        #include <concepts>
        #include <span>
        static_assert(__cplusplus >= 202002L, "error: not a C++20 compiler");
        template <std::integral T> T twice(T x) { return 2 * x; }
        int four = twice(2);
    """

    def __init__(self):
        if sys.platform == "win32":
            raise CannotBuild("the extension is not built on Windows")
        named = shlex.split(os.environ.get("CXX", ""))
        found = [named] if named else [[c] for c in ("c++", "g++", "clang++") if shutil.which(c)]
        if not found:
            raise CannotBuild("no C++ compiler (c++, g++ or clang++) on PATH, and CXX is not set")
        refused = []
        for self.command in found:
            first_line = (output_of(*self.command, "--version") or "").splitlines()
            self.name = first_line[0] if first_line else shlex.join(self.command)
            try:
                self.probe()
                break
            except CannotBuild as reason:
                refused.append(reason)
        else:
            raise refused[0]
        target = output_of(*self.command, "-dumpmachine") or platform.machine()
        self.x86 = target.startswith(("x86_64", "amd64"))

    def probe(self):
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
            source.write_text(self.PROBE)
            options = ["-std=c++20", "-fPIC", "-shared", str(source), "-o", str(library)]
            try:
                run = subprocess.run([*self.command, *options], capture_output=True, text=True)
            except OSError as error:
                raise CannotBuild(f"the C++ compiler cannot be run: {error}") from None
            if run.returncode or not library.exists():
                why = first_error(run.stderr) or f"exit status {run.returncode}, no output"
                raise CannotBuild(
                    f"the C++ compiler ({self.name}) does not build a C++20 library, "
                    f"as gcc 11, clang 14 or newer do: {why}"
                )


class Nvcc:
    """The CUDA toolkit: its real folder, as nvcc on PATH may be a wrapper, and what it can do."""

    def __init__(self, torch):
        if torch.cuda is None:
            raise CannotBuild(f"torch {torch.version} is not a CUDA build")
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        path = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
        if path is None or not os.access(path, os.X_OK):
            where = f"at {path} (CUDA_HOME)" if home else "on PATH, and CUDA_HOME is not set"
            raise CannotBuild(f"no nvcc {where}")
        release = re.search(r"release (\d+)\.(\d+)", output_of(path, "--version") or "")
        if release is None:
            raise CannotBuild(f"{path} does not work: it does not answer --version")
        self.path, self.version = path, ".".join(release.groups())
        if release[1] != torch.cuda.split(".")[0]:
            raise CannotBuild(
                f"nvcc is CUDA {self.version} and torch {torch.version} is built for CUDA "
                f"{torch.cuda}: the major versions must be equal"
            )
        self.home = self.find_home(home)
        self.libraries = [p for p in (self.home / "lib64", self.home / "lib") if p.is_dir()]
        known = re.findall(r"compute_(\d+)", output_of(path, "--list-gpu-arch") or "")
        self.archs, self.codes = self.choose_archs({int(n) for n in known})

    def find_home(self, named):
        dry_run = subprocess.run(
            [self.path, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
        )
        top = re.search(r"TOP=(.*)", dry_run.stderr)
        candidates = [named, top and top[1], Path(self.path).resolve().parent.parent]
        for candidate in filter(None, candidates):
            home = Path(str(candidate).strip()).resolve()
            if (home / "include" / "cuda_runtime.h").is_file():
                return home
        raise CannotBuild(f"{self.path}: no include/cuda_runtime.h in its toolkit; set CUDA_HOME")

    def choose_archs(self, known):
        named = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(";, "))
        wanted = named if named[0] else ARCHS
        archs, codes = [], []
        for arch in wanted:
            match = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", arch)
            if match is None:
                raise CannotBuild(
                    f"TORCH_CUDA_ARCH_LIST: {arch!r} is not understood; write it like '8.0;9.0+PTX'"
                )
            number = int(match[1] + match[2])
            if number < OLDEST_ARCH or (known and number not in known):
                continue
            name = f"{number}{match[3]}"
            codes.append(f"-gencode=arch=compute_{name},code=sm_{name}")
            if match[4]:
                codes.append(f"-gencode=arch=compute_{name},code=compute_{name}")
            archs.append(arch)
        if archs and wanted is ARCHS and not archs[-1].endswith("+PTX"):
            newest = archs[-1].replace(".", "")
            codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
            archs[-1] += "+PTX"
        if not archs:
            raise CannotBuild(
                f"nvcc {self.version} and this package (7.5 or newer) can build none of the "
                f"architectures {' '.join(wanted)}"
            )
        return archs, codes


def first_error(log):
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|\bfatal\b|undefined", line, re.I)]
    return (errors or lines or [""])[0][:300]


def find_ninja():
    beside_python = Path(sys.executable).with_name("ninja")
    path = str(beside_python) if beside_python.exists() else shutil.which("ninja")
    if path is None:
        raise CannotBuild("no ninja; pip install ninja")
    return path


def cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def x86_flags(source):
    """Of a file of kernels for one instruction set of x86, which its name ends with; else none."""
    return next((flags for end, flags in X86_FLAGS.items() if f"_{source.stem}".endswith(end)), [])


class Ninja:
    """One target's build.ninja: objects are kept, so an unchanged tree is up to date in no time."""

    def __init__(self, folder):
        self.folder = folder.relative_to(ROOT)
        self.lines = [f"builddir = {self.escape(self.folder)}"]
        self.objects = []

    @staticmethod
    def escape(path):
        return re.sub(r"([$ :])", r"$\1", str(path))

    def rule(self, name, command):
        self.lines += [f"rule {name}", f"  command = {command}"]
        if name != "link":
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule, source, flags=()):
        name = "_".join(source.relative_to(ROOT / "csrc").parts) + ".o"
        target = self.escape(self.folder / name)
        self.lines += [f"build {target}: {rule} {self.escape(source.relative_to(ROOT))}"]
        self.lines += [f"  flags = {shlex.join(flags)}"]
        self.objects.append(target)

    def run(self, library):
        target = self.folder / library
        self.lines += [f"build {self.escape(target)}: link {' '.join(self.objects)}", ""]
        (ROOT / self.folder).mkdir(parents=True, exist_ok=True)
        file = ROOT / self.folder / "build.ninja"
        file.write_text("\n".join(self.lines))
        command = [find_ninja(), "-f", str(file), "-j", os.environ.get("MAX_JOBS") or str(cpus())]
        run = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if run.returncode:
            print(run.stdout, file=sys.stderr)
            raise CannotBuild(f"build failed: {first_error(run.stdout)}")
        return ROOT / target
