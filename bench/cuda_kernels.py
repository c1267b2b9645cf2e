"""The CUDA half of `make kernels`: what nvcc made of every kernel, for every architecture.

    python -m bench.cuda_kernels                          of fusedmlp/_native_cuda.so
    python -m bench.cuda_kernels --out bench/results/cuda_kernels.json

Registers, stack and local memory come from cuobjdump's resource report; accesses to local memory
(spills), tensor-core instructions, asynchronous copies and the widths of global accesses are
counted in the disassembly. No GPU is needed. Exit status 1 if a kernel uses local memory, or if
a kernel that is meant to run on tensor cores has none of their instructions.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from . import record

LIBRARY = Path(__file__).resolve().parent.parent / "fusedmlp" / "_native_cuda.so"
FAMILIES = {0: "plain", 1: "prelu", 2: "smooth"}  # Family in csrc/cuda/epilogue.cuh
# Bytes of shared memory that launches ask for (the binary does not say): kSumShared and the like.
DYNAMIC_SHARED = {"bias_act_dropout_bwd": 4096, "add_rows": 1024, "add_column": 1024}


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    variant: str
    arch: str  # sm_90
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0  # static and dynamic
    instructions: int = 0
    found: dict[str, int] = field(default_factory=dict)

    @property
    def spills(self) -> int:
        """Instructions that access local memory."""
        return self.found.get("LDL", 0) + self.found.get("STL", 0)

    @property
    def tensor(self) -> int:
        return self.found.get("HMMA", 0)

    def row(self) -> dict[str, str | int]:
        """What a results file keeps."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        counted = row.pop("found")
        row = {"kernel": row.pop("name")} | row
        row |= {"spills": self.spills, "tensor_core": self.tensor}
        return row | {"async_copies": counted.get("LDGSTS", 0), "wrong": self.wrong()}

    def wrong(self) -> str:
        """What speaks against this kernel, or ''."""
        if self.local or self.spills:
            return f"local memory: {self.local} bytes, {self.spills} accesses"
        if self.name == "linear_act" and self.arch != "sm_75" and not self.tensor:
            return "no tensor-core instructions"
        return ""


def tool(name: str) -> str | None:
    """The path of a CUDA binary tool: on PATH, in CUDA_HOME, or the one that Triton brings."""
    homes = [os.environ.get(v) for v in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(h) / "bin" for h in homes if h]
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    found = shutil.which(name)
    paths = [Path(found)] if found else []
    paths += [f / name for f in folders]
    return next((str(p) for p in paths if os.access(p, os.X_OK)), None)


def named(mangled: str) -> tuple[str, str]:
    """Name and variant of a kernel from its symbol."""
    name = re.search(r"\d+([a-z][a-z_]*)_kernel", mangled)
    short = name[1] if name else mangled
    rest = mangled[name.end() :] if name else ""
    if not rest.startswith("I"):
        return short, ""
    dtype = "bf16" if "BFloat" in rest else "fp16" if "Half" in rest else "fp32"
    numbers = [int(n) for n in re.findall(r"Li(\d+)E", rest)]
    if "Tile" in rest:
        bm, bn, bk, stages, warps_m, warps_n = numbers
        return short, f"{dtype} {bm}x{bn}x{bk} {stages} stages {warps_m * warps_n} warps"
    flags = re.findall(r"Lb([01])E", rest)
    words = [dtype]
    if flags:
        words.append("vector" if flags[0] == "1" else "scalar")
    if numbers:
        words.append(FAMILIES[numbers[0]])
    return short, " ".join(words)


def dynamic_shared(name: str, variant: str) -> int:
    tile = re.search(r"(\d+)x(\d+)x(\d+) (\d+) stages (\d+) warps", variant)
    if tile is None:
        return DYNAMIC_SHARED.get(name, 0)
    bm, bn, bk, stages, warps = (int(n) for n in tile.groups())
    pipeline = stages * (bm + bn) * bk * 2
    staged = 4 * (bm * bn + 8 * bm * (2 if warps > 2 else 1))  # two warps side by side
    return max(pipeline, staged)


WANTED = re.compile(
    r"\b(HMMA|IMMA|HGMMA|LDGSTS|LDSM|LDL|STL|LDG\.E\.128|STG\.E\.128|LDG|STG|MUFU|ATOM|RED)\b"
)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels(library: Path, cuobjdump: str) -> Iterator[Kernel]:
    """Every kernel in the machine code of a library, by architecture."""
    made: dict[tuple[str, str], Kernel] = {}
    arch = ""
    current: Kernel | None = None
    usage = _output(cuobjdump, "--dump-resource-usage", str(library))
    for line in usage.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            current = made[arch, match[1]] = Kernel(*named(match[1]), arch)
        elif current and "REG:" in line:
            numbers = {k: int(v) for k, v in re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", line)}
            current.registers, current.stack = numbers["REG"], numbers.get("STACK", 0)
            current.local = numbers.get("LOCAL", 0)
            current.shared = numbers.get("SHARED", 0)
            current.shared += dynamic_shared(current.name, current.variant)
    counts: Counter[str] = Counter()
    current = None
    for line in [*_output(cuobjdump, "-sass", str(library)).splitlines(), "Function : end"]:
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            if current:
                current.instructions, current.found = counts.pop("", 0), dict(counts)
            counts = Counter()
            current = made.get((arch, match[1]))
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            counts[""] += 1
            counts.update(WANTED.findall(line))
    yield from (k for k in made.values() if k.registers)


def table(found: list[Kernel]) -> str:
    """One line a kernel, architectures side by side."""
    archs = sorted({k.arch for k in found}, key=lambda a: int(re.sub(r"\D", "", a)))
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for k in found:
        rows.setdefault((k.name, k.variant), {})[k.arch] = k
    head = f"{'kernel':22} {'variant':36} {'shared':>6}"
    lines = [head + "".join(f" {a + ' reg/spill/mma':>22}" for a in archs)]
    for (name, variant), by_arch in sorted(rows.items()):
        line = f"{name:22} {variant:36} {next(iter(by_arch.values())).shared:6}"
        for arch in archs:
            k = by_arch.get(arch)
            cell = "" if k is None else f"{k.registers}/{k.spills}/{k.tensor}"
            line += f" {cell:>22}"
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--out", type=Path, help="write everything that was found, as JSON")
    args = parser.parse_args(argv)
    if not args.library.exists():
        print(f"{args.library} is not built (FUSEDMLP_BUILD=cuda)", file=sys.stderr)
        return 2
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        print("no cuobjdump: neither a CUDA toolkit's nor Triton's", file=sys.stderr)
        return 2
    found = list(kernels(args.library, cuobjdump))
    print(table(found))
    size = args.library.stat().st_size
    print(f"{len(found)} kernels, {size / 1e6:.1f} MB")
    if args.out:
        head = record.header("cuda_kernels", "bench.cuda_kernels", argv)
        record.write(args.out, head | {"bytes": size, "rows": [k.row() for k in found]})
    wrong = [(k, k.wrong()) for k in found if k.wrong()]
    for k, why in wrong:
        print(f"{k.arch} {k.name} {k.variant}: {why}", file=sys.stderr)
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main())
