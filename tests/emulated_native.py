"""pytest plugin: backend `native` on CPU tensors is the CUDA extension, on the emulated machine.

    pytest -p tests.emulated_native tests/test_ops.py -k native

csrc/ops_cuda.cpp and every csrc/cuda/*.cu, compiled by the C++ compiler, register themselves for CPU
tensors, so that the suite runs through the same binding and kernels as on a GPU.
"""

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
    torch.ops.load_library(str(build()))

    def unavailable(device_type):
        return None if device_type == "cpu" else "only CPU tensors are emulated"

    extension.unavailable = unavailable
