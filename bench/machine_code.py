"""Reads the machine code of NVIDIA GPUs in a file, with the tools of CUDA or those of Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.M)


@dataclass
class Function:
    """A kernel for one architecture, such as sm_90; sizes are bytes."""

    symbol: str
    arch: str
    registers: int
    stack: int
    local: int
    shared: int  # what is static
    counts: Counter[str] = field(default_factory=Counter)  # instructions by their full names

    def count(self, *names: str) -> int:
        """Instructions whose name is one of these, with whatever suffixes."""
        begins = tuple(f"{name}." for name in names)
        return sum(n for found, n in self.counts.items() if f"{found}.".startswith(begins))

    @property
    def spills(self) -> int:
        """Instructions that access local memory."""
        return self.count("LDL", "STL")


@functools.cache
def cuobjdump() -> str | None:
    """Its path: on PATH, in CUDA_HOME, or the one that Triton brings."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    paths = [shutil.which("cuobjdump"), *(f"{home}/bin/cuobjdump" for home in homes if home)]
    triton = importlib.util.find_spec("triton")
    if triton:
        paths.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((path for path in paths if path and os.access(path, os.X_OK)), None)


def _output(*arguments: str) -> str:
    command = [cuobjdump(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(path: str | Path) -> Iterator[Function]:
    """Every kernel in the machine code of a library or a cubin, by architecture."""
    made: dict[tuple[str, str], Function] = {}
    arch = symbol = ""
    for line in _output("--dump-resource-usage", str(path)).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            symbol = match[1]
        elif symbol and "REG:" in line:
            numbers = {k: int(v) for k, v in re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", line)}
            sizes = (numbers.get(name, 0) for name in ("REG", "STACK", "LOCAL", "SHARED"))
            made[arch, symbol] = Function(symbol, arch, *sizes)
    arch = ""
    # What stands between one "Function :" and the next is its code.
    for part in re.split(r"(?=Function : |arch = sm_)", _output("-sass", str(path))):
        if match := re.match(r"arch = (sm_\w+)", part):
            arch = match[1]
        elif (match := re.match(r"Function : (\S+)", part)) and (arch, match[1]) in made:
            made[arch, match[1]].counts.update(_INSTRUCTION.findall(part))
    yield from made.values()
