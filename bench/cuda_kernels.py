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
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

from . import machine_code, record
from .machine_code import Function

LIBRARY = record.ROOT / "fusedmlp" / "_native_cuda.so"
FAMILIES = {0: "plain", 1: "prelu", 2: "smooth"}  # Family in csrc/cuda/epilogue.cuh
# Bytes of shared memory that launches ask for (the binary does not say): kSumShared and the like.
DYNAMIC_SHARED = {"bias_act_dropout_bwd": 4096, "add_rows": 1024, "add_column": 1024}


SOURCES = ("csrc/cuda", "csrc/common")


def sources_hash() -> str:
    """Of what the kernels are compiled from, without comments and layout."""
    found = hashlib.sha256()
    for path in sorted(p for folder in SOURCES for p in (record.ROOT / folder).iterdir()):
        text = re.sub(r"//[^\n]*", "", path.read_text())
        found.update(f"{path.name} {' '.join(text.split())}".encode())
    return found.hexdigest()[:16]


def built_of_others(library: Path) -> str:
    """Why a library beside its build record is not of the sources of this checkout; '' if it is."""
    info = library.with_name("_build_info.json")
    commit = json.loads(info.read_text()).get("commit") if info.exists() else None
    git = ["git", "-C", str(record.ROOT), "diff", "--quiet", commit or "", "--", *SOURCES]
    if commit and subprocess.run(git, capture_output=True).returncode == 1:
        return f"{library} was built at commit {commit}, with other sources: build it again"
    return ""


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
    flags = re.findall(r"Lb([01])E", rest)[:1]
    words = ["vector" if flag == "1" else "scalar" for flag in flags]
    return short, " ".join([dtype, *words, *(FAMILIES[n] for n in numbers[:1])])


def dynamic_shared(name: str, variant: str) -> int:
    tile = re.search(r"(\d+)x(\d+)x(\d+) (\d+) stages (\d+) warps", variant)
    if tile is None:
        return DYNAMIC_SHARED.get(name, 0)
    bm, bn, bk, stages, warps = (int(n) for n in tile.groups())
    pipeline = stages * (bm + bn) * bk * 2
    staged = 4 * (bm * bn + 8 * bm * (2 if warps > 2 else 1))  # two warps side by side
    return max(pipeline, staged)


def row(f: Function) -> dict[str, str | int]:
    """What a results file keeps of a kernel; `wrong` is what speaks against it, or ''."""
    name, variant = named(f.symbol)
    found = {"kernel": name, "variant": variant, "arch": f.arch, "registers": f.registers}
    found |= {"stack": f.stack, "local": f.local}
    found["shared"] = f.shared + dynamic_shared(name, variant)
    found |= {"instructions": f.counts.total(), "spills": f.spills, "tensor_core": f.count("HMMA")}
    wrong = ""
    if f.local or f.spills:
        wrong = f"local memory: {f.local} bytes, {f.spills} accesses"
    elif name == "linear_act" and f.arch != "sm_75" and not found["tensor_core"]:
        wrong = "no tensor-core instructions"
    return found | {"async_copies": f.count("LDGSTS"), "wrong": wrong}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.cuda_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--out", type=Path, help="write everything that was found, as JSON")
    args = parser.parse_args(argv)
    if not args.library.exists():
        print(f"{args.library} is not built (FUSEDMLP_BUILD=cuda)", file=sys.stderr)
        return 2
    if machine_code.cuobjdump() is None:
        print("no cuobjdump: neither a CUDA toolkit's nor Triton's", file=sys.stderr)
        return 2
    if why := built_of_others(args.library):
        print(why, file=sys.stderr)
        return 2
    size = args.library.stat().st_size
    head = record.header("cuda_kernels", "bench.cuda_kernels", argv)
    head |= {"bytes": size, "sources": sources_hash()}
    results = record.Results(head, args.out)
    results.add(*map(row, machine_code.functions(args.library)))
    wrong = [found for found in results.rows if found["wrong"]]
    print(f"{len(results.rows)} kernels, {size / 1e6:.1f} MB, {len(wrong)} wrong")
    return 1 if wrong or not results.rows else 0


if __name__ == "__main__":
    sys.exit(main())
