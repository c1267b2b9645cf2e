"""pytest plugin: backend `native` on CPU tensors is the CUDA extension, on the emulated machine.

    pytest -p tests.emulated_native tests/test_ops.py -k native

csrc/ops_cuda.cpp and every csrc/cuda/*.cu, compiled by the C++ compiler, register themselves for
CPU tensors, so that the suite runs through the same binding and kernels as on a GPU.
"""

import ctypes
from pathlib import Path

import torch

from build_tools.toolchain import Torch
from fusedmlp.kernels.native import extension

from . import emulation


def build() -> Path:
    installed = Torch()
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    for path in installed.includes:
        flags += ["-isystem", str(path)]
    libraries = [f"-L{installed.root / 'lib'}", "-ltorch_cpu", "-lc10"]
    sources = [p for p in emulation.SOURCES if p.name != "exports.cpp"]
    sources.append(emulation.CSRC / "ops_cuda.cpp")
    folder = emulation.ROOT / "build" / "emulation"
    return emulation.compile_all(sources, folder, "binding.so", flags, libraries)


def pytest_configure(config):
    path = str(build())
    torch.ops.load_library(path)
    launches = ctypes.CDLL(path).fusedmlp_emulation_launches
    launches.restype = ctypes.c_int64
    config.emulated_launches = launches
    extension.unavailable = lambda device_type: (
        None if device_type == "cpu" else "only CPU tensors are emulated"
    )


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(f"emulated launches: {config.emulated_launches()}")
