"""Builds the optional extension; everything else about the package is in pyproject.toml.

The extension is one or two plain shared libraries, opened by fusedmlp with torch.ops.load_library:
    csrc/bind/cpu*.cpp + csrc/cpu/*.cpp  ->  fusedmlp/_native_cpu.so
    csrc/bind/cuda.cpp + csrc/cuda/*.cu  ->  fusedmlp/_native_cuda.so
They use libtorch's stable ABI, so neither is tied to one torch or one Python. What was built, and
what was left out and why, goes to fusedmlp/_build_info.json. Does not ask for a GPU, and does not
import torch: version and folder are read from its files, in 20 ms where the import takes 2 s.

FUSEDMLP_BUILD = auto (what this machine can) | cpu | cuda (the C++ part too) | none. A target asked
for by name is built or the build fails. Also read: CXX, CXXFLAGS, LDFLAGS, CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

import functools
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import sys
import time
import zlib
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

from build_tools.toolchain import (
    NVCC_FLAGS,
    ROOT,
    CannotBuild,
    Compiler,
    Ninja,
    Nvcc,
    Torch,
    find_ninja,
    output_of,
    x86_flags,
)

TARGETS = ("cpu", "cuda")
WANTED = {"auto": TARGETS, "cpu": ("cpu",), "cuda": TARGETS, "none": ()}
MODE = os.environ.get("FUSEDMLP_BUILD") or "auto"
if MODE not in WANTED:
    raise SystemExit(f"fusedmlp: FUSEDMLP_BUILD must be one of {', '.join(WANTED)}, got {MODE!r}")

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"

CXX_FLAGS = (
    "-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall".split()
)


def sources(*patterns):
    found = [path for pattern in patterns for path in sorted((ROOT / "csrc").glob(pattern))]
    if not found or found[0].parent.name != "bind":
        raise CannotBuild(f"csrc/{patterns[0]} is not in this tree")
    return found


class Builder:
    """Builds the targets; what they share is looked for once, when the first of them needs it."""

    def __init__(self):
        self.info = {}

    torch = functools.cached_property(lambda self: Torch())
    compiler = functools.cached_property(lambda self: Compiler())

    def build_cpu(self):
        ninja = self.start("cpu")
        x86 = self.compiler.x86
        self.rules(ninja, ["-DFUSEDMLP_X86"] if x86 else [], ["torch_cpu"])
        for source in sources("bind/cpu*.cpp", "cpu/*.cpp"):
            flags = x86_flags(source)
            if x86 or not flags:
                ninja.compile("cxx", source, flags)
        return ninja.run("_native_cpu.so")

    def build_cuda(self):
        files = sources("bind/cuda.cpp", "cuda/*.cu")
        ninja = self.start("cuda")
        nvcc = Nvcc(self.torch)
        defines = ["-DUSE_CUDA", "-isystem", str(nvcc.home / "include")]
        libraries = ["torch_cuda", "torch_cpu", "c10_cuda", "cudart"]
        self.rules(ninja, defines, libraries, nvcc.libraries)
        host = ["-ccbin", self.compiler.command[-1]]
        nvcc_command = [nvcc.path, *host, *NVCC_FLAGS, "-Icsrc", *nvcc.codes]
        ninja.rule("nvcc", f"{shlex.join(nvcc_command)} $flags -MD -MF $out.d -c $in -o $out")
        for source in files:
            ninja.compile("nvcc" if source.suffix == ".cu" else "cxx", source)
        library = ninja.run("_native_cuda.so")
        self.info.update(archs=nvcc.archs, cuda=nvcc.version)
        return library

    def start(self, target):
        torch, compiler = self.torch, self.compiler
        find_ninja()
        self.info.update(torch=torch.version, compiler=compiler.name)
        key = re.sub(r"[^\w.+-]", "_", f"torch-{torch.version}-{platform.machine()}")
        return Ninja(ROOT / "build" / "native" / key / target)

    def rules(self, ninja, defines, libraries, folders=()):
        """No run path: torch has loaded these libraries by the time the extension is opened."""
        includes = [word for path in self.torch.includes for word in ("-isystem", str(path))]
        flags = [*CXX_FLAGS, STABLE_ABI, "-Icsrc", *includes, *defines]
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        cxx = shlex.join([*self.compiler.command, *flags])
        ninja.rule("cxx", f"{cxx} $flags -MD -MF $out.d -c $in -o $out")
        folders = (f"-L{path}" for path in (self.torch.root / "lib", *folders))
        link = [*self.compiler.command, "-shared", "-pthread", *folders]
        strict = ["-Wl,--as-needed", "-Wl,-z,defs"] if sys.platform == "linux" else []
        extra = shlex.split(os.environ.get("LDFLAGS", ""))
        tail = [*strict, *(f"-l{name}" for name in (*libraries, "c10")), *extra]
        ninja.rule("link", f"{shlex.join(link)} $in -o $out {shlex.join(tail)}")


class build_native(Command):
    """Builds the targets of FUSEDMLP_BUILD, into the wheel or in place for an editable install."""

    description = "build the optional extension"
    user_options = [
        ("build-lib=", "d", "folder to put the libraries into"),
        ("editable-mode", "e", "build in place"),
    ]
    boolean_options = ["editable-mode"]

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def get_outputs(self):
        names = [*(f"_native_{target}.so" for target in TARGETS), "_build_info.json"]
        return [str(self.folder() / name) for name in names if (self.folder() / name).exists()]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []

    def folder(self):
        return (ROOT if self.editable_mode else Path(self.build_lib)) / "fusedmlp"

    def run(self):
        builder, built, left_out, said, checksums = Builder(), [], {}, [], {}
        for target in TARGETS:
            installed = self.folder() / f"_native_{target}.so"
            start = time.monotonic()
            try:
                if target not in WANTED[MODE]:
                    raise CannotBuild(f"FUSEDMLP_BUILD={MODE}")
                self.install(getattr(builder, f"build_{target}")(), installed)
            except CannotBuild as reason:
                if target in WANTED[MODE] and MODE != "auto":
                    told = f"fusedmlp: FUSEDMLP_BUILD={MODE}: {target}: {reason}"
                    raise SystemExit(told) from None
                left_out[target] = str(reason)
                installed.unlink(missing_ok=True)
                continue
            size, seconds = installed.stat().st_size / 1e6, time.monotonic() - start
            built.append(target)
            checksums[target] = zlib.crc32(installed.read_bytes())
            said.append(f"built {target} ({size:.1f} MB, {seconds:.1f} s)")
        self.write_info(built=built, left_out=left_out, crc32=checksums, **builder.info)
        for why in dict.fromkeys(left_out.values()):
            targets = [target for target, reason in left_out.items() if reason == why]
            said.append(f"left out {', '.join(targets)}: {why}")
        print("fusedmlp:", "; ".join(said))

    def install(self, library, installed):
        """By rename, where it is not there already: who has the old file open keeps it whole."""
        if installed.exists() and installed.stat().st_mtime_ns == library.stat().st_mtime_ns:
            return
        installed.parent.mkdir(parents=True, exist_ok=True)
        beside = installed.with_suffix(".new")
        shutil.copy2(library, beside)
        os.replace(beside, installed)

    def write_info(self, **found):
        info = dict(version=self.distribution.get_version(), torch=None, cuda=None, archs=[])
        schemas = runpy.run_path(str(ROOT / "fusedmlp" / "backends" / "schemas.py"))
        info |= dict(commit=None, compiler=None, schemas=schemas["digest"]()) | found
        if (ROOT / ".git").exists():
            info["commit"] = output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
        self.folder().mkdir(parents=True, exist_ok=True)
        (self.folder() / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


class build_all(build):
    """Without the leftovers of an earlier build: files since deleted would go into the wheel."""

    sub_commands = [*build.sub_commands, ("build_native", None)]

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class wheel(bdist_wheel):
    """Tagged for the platform, not for one Python, and only when it holds a library."""

    def get_tag(self):
        command = self.get_finalized_command("build_native")
        self.root_is_pure = not any(path.endswith(".so") for path in command.get_outputs())
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(cmdclass={"build": build_all, "build_native": build_native, "bdist_wheel": wheel})
