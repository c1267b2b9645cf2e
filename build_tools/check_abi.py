"""Checks that the built extension runs under another torch than the one it was built with.

    python -m build_tools.check_abi OTHER_PYTHON [OTHER_PYTHON ...]

Opens the very files of this tree (fusedmlp/_native_*.so) in each other Python, and there runs every
op, activation and dtype of the CPU one against fp64, the check behind `fusedmlp verify`. The CUDA
one is opened where that torch is a CUDA build; elsewhere every function of libtorch that it needs
is looked up in that torch's libraries. Needs nothing but torch in the other Python; the lookup
needs `nm`. Exit status 1 if anything is wrong, 2 if there is nothing to check.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "fusedmlp" / "_native_cuda.so"
# Runs in the other Python; a line of JSON is its answer.
_CODE = """
import json, platform, torch
from pathlib import Path
from fusedmlp import ops
from fusedmlp.backends import native as extension
from fusedmlp.commands import cases, verify
from fusedmlp.spec import dtypes

has = torch._C._dispatch_has_kernel_for_dispatch_key
found = {
    "torch": torch.__version__,
    "python": platform.python_version(),
    "built": (extension.build_info() or {}).get("torch"),
    "libraries": str(Path(torch.__file__).parent / "lib"),
    "refused": extension.unavailable("cpu"),
    "cases": 0,
    "wrong": [],
}
if found["refused"] is None:
    found["ops"] = [op for op in ops.SCHEMAS if has(f"fusedmlp::{op}.native", "CPU")]
    for op in cases.OPS:
        for dtype in dtypes.KERNEL:
            who = [r for r in verify.runners(op, dtype, "cpu") if r.backend == "native"]
            for v in verify.verify_cases(who, cases.spread(cases.table(op, dtype)) if who else []):
                found["cases"] += v.cases
                if not v.ok:
                    found["wrong"].append(f"{v.runner} {op} {v.dtype}: {v.error or 'masks differ'}")
found["cuda_build"] = torch.version.cuda
if torch.version.cuda and extension.library("cuda").exists():
    try:
        torch.ops.load_library(str(extension.library("cuda")))
        found["cuda_ops"] = [op for op in ops.SCHEMAS if has(f"fusedmlp::{op}.native", "CUDA")]
    except OSError as error:
        found["wrong"].append(f"_native_cuda.so cannot be opened: {error}")
print(json.dumps(found))
"""


def ask(python: str) -> dict:
    """What the extension does under another Python; raises RuntimeError if that cannot be asked."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDMLP_")}
    environment["PYTHONPATH"] = str(ROOT)
    try:
        run = subprocess.run(
            [python, "-c", _CODE], cwd=ROOT, env=environment, capture_output=True, text=True
        )
    except OSError as error:
        raise RuntimeError(f"{python} cannot be run: {error.strerror}") from None
    if run.returncode:
        raise RuntimeError(f"{python} failed: {(run.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def _symbols(nm: str, which: str, library: Path) -> set[str]:
    listed = subprocess.run(
        [nm, "-D", f"--{which}-only", str(library)], capture_output=True, text=True, check=True
    )
    return {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}


def missing_symbols(libraries: Path, library: Path = CUDA) -> tuple[set[str], set[str]]:
    """(functions of libtorch that `library` needs, those that no library of `libraries` has).

    Without libtorch_cuda.so in `libraries` the functions that it would have are left out.
    """
    nm = shutil.which("nm")
    if nm is None:
        raise RuntimeError("nm (of binutils) is not installed")
    files = [libraries / f"lib{name}.so" for name in ("torch_cpu", "torch_cuda", "c10")]
    there = set().union(*(_symbols(nm, "defined", f) for f in files if f.exists()))
    needed = {s for s in _symbols(nm, "undefined", library) if re.match(r"(aoti_)?torch_", s)}
    if not (libraries / "libtorch_cuda.so").exists():
        needed = {s for s in needed if "_cuda_" not in s}
    return needed, needed - there


def check(python: str) -> list[str]:
    """Prints one Python's report; what is wrong."""
    found = ask(python)
    name = f"torch {found['torch']}, Python {found['python']}"
    print(f"{name}: the extension, built with torch {found['built']}")
    if found["refused"]:
        return [f"{name}: {found['refused']}"]
    wrong = [f"{name}: {line}" for line in found["wrong"]]
    print(f"  CPU:  opened, {len(found['ops'])} ops; {found['cases']} cases against fp64")
    if not CUDA.exists():
        print("  CUDA: not built here")
    elif found["cuda_build"]:
        print(f"  CUDA: {'opened' if found.get('cuda_ops') else 'NOT opened'}", end="")
        print(f", {len(found.get('cuda_ops', ()))} ops")
    else:
        needed, missing = missing_symbols(Path(found["libraries"]))
        print(f"  CUDA: this torch is not a CUDA build; has {len(needed - missing)} of the")
        print(f"        {len(needed)} functions that the library needs of libtorch_cpu")
        wrong += [f"{name}: libtorch has no {s}" for s in sorted(missing)]
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="build_tools.check_abi", description=__doc__.splitlines()[0]
    )
    parser.add_argument("python", nargs="+", help="a Python that has another torch")
    args = parser.parse_args(argv)
    if not (ROOT / "fusedmlp" / "_native_cpu.so").exists():
        print("check_abi: the extension is not built (make info says why)", file=sys.stderr)
        return 2
    wrong = []
    for python in args.python:
        try:
            wrong += check(python)
        except RuntimeError as error:
            wrong.append(str(error))
    for line in wrong:
        print(f"check_abi: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
