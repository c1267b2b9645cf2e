"""pytest plugin: backend `native` on CPU tensors is the CUDA extension, on the PTX machine.

    pytest -p tests.ptx.binding tests/autograd/test_ops.py -k native

csrc/bind/cuda.cpp registers itself for CPU tensors and launches the kernels' PTX, so that the suite
runs through the same binding, host code and kernels as on a GPU. Memory comes from torch: accesses
to it are checked for alignment only, those to shared memory for everything.
"""

from pathlib import Path

import torch

from build_tools.toolchain import Torch
from fusedmlp.backends import native

from . import library


def build() -> Path:
    installed = Torch()
    flags = [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-include",
        str(library.HERE / "device.h"),
    ]
    for path in installed.includes:
        flags += ["-isystem", str(path)]
    libraries = [f"-L{installed.root / 'lib'}", "-ltorch_cpu", "-lc10"]
    more = [library.CSRC / "bind" / "cuda.cpp"]
    return library.build("binding.so", library.ARCHS[0], more, flags, libraries)


def pytest_configure(config):
    path = build()
    torch.ops.load_library(str(path))
    config.ptx_machine = library.Library(path)
    native.unavailable = lambda device_type: (
        None if device_type == "cpu" else "only CPU tensors run on the PTX machine"
    )


def pytest_terminal_summary(terminalreporter, config):
    found = config.ptx_machine
    terminalreporter.write_line(f"launches on the PTX machine: {found.machine.launches}")
    if found.fault:
        terminalreporter.write_line(f"a fault: {found.fault}")
