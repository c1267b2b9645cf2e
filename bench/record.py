"""Results files: the rows that a script finds, and what stands beside every figure. Measures
nothing. `python -m bench.record FILE MOMENT` is how gpu.sh writes down its machine and clocks."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
_NEEDED = ("name", "machine", "versions", "commit", "date", "rows")


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in pairs}
    flags = fields.get("flags", "").split()
    isa = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else platform.machine()
    name = fields.get("model name") or platform.processor() or "CPU"
    # One name covers generations that differ by half.
    family = f" of family {fields['cpu family']}" if "cpu family" in fields else ""
    return f"{name}{family}, {isa}"


def machine(device: str = "cpu") -> dict:
    """The processor, its cores, and the GPU when that is what was timed."""
    found = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"}
        found |= {"driver": gpu_state("driver_version").get("driver_version")}
    return found


def versions(packages: Sequence[str] = ()) -> dict:
    """Python, torch, CUDA and Triton; this package's own; and those of packages that are there."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda
    for name in ("triton", "fusedmlp"):
        try:
            found[name] = importlib.import_module(name).__version__
        except (ImportError, AttributeError):
            found[name] = None
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """The commit, with '+' and the number of files that differ from it; None outside git."""
    found = _said("git", "rev-parse", "--short=12", "HEAD")
    code = ("fusedmlp", "csrc", "bench/*.py", "setup.py")
    changed = _said("git", "status", "--porcelain", "--", *code).splitlines()
    return (found + (f"+{len(changed)}" if changed else "")) or None


def gpu_state(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; {} without it."""
    query = "--query-gpu=" + ",".join(fields)
    values = _said("nvidia-smi", query, "--format=csv,noheader", "-i", "0").split(",")
    return (
        dict(zip(fields, map(str.strip, values), strict=True)) if len(values) == len(fields) else {}
    )


def clocks() -> dict[str, str]:
    """Clocks, power and temperature now."""
    return gpu_state("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def header(
    name: str,
    module: str,
    argv: list[str] | None,
    device: str = "cpu",
    packages: Sequence[str] = (),
) -> dict:
    """What a results file opens with; its figures follow under 'rows'.

    packages  what else is timed
    """
    given = sys.argv[1:] if argv is None else argv
    # Where something lies on one machine is of no use on another.
    arguments = shlex.join("DIR" if Path(a).is_absolute() else a for a in given)
    return {
        "name": name,
        "machine": machine(device),
        "versions": versions(packages),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python -m {module} {arguments}".rstrip(),
    }


def _rounded(value):
    """Five digits: more would only make the files large."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def write(path: Path, found: dict) -> None:
    """One row a line, so that a change can be read; in place of the old file only when complete."""
    head = {key: value for key, value in found.items() if key != "rows"}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = ",\n".join("  " + json.dumps(_rounded(row)) for row in found["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text("{\n" + ",\n".join([*lines, f' "rows": [\n{rows}\n ]']) + "\n}\n")
    partial.replace(path)


def read(path: Path) -> dict:
    """A results file; raises ValueError that names what is missing."""
    found = json.loads(path.read_text())
    if missing := [key for key in _NEEDED if key not in found]:
        raise ValueError(f"bench: {path} must hold {', '.join(missing)}")
    return found


def kept(path: Path | None, is_valid: Callable[[dict], bool] = lambda row: True) -> list[dict]:
    """Valid rows of an earlier run; none where there is no file or it is damaged."""
    try:
        return [row for row in read(path)["rows"] if is_valid(row)] if path else []
    except (OSError, ValueError):
        return []


def resumed(head: dict, out: Path) -> Results:
    """The rows of an earlier run, to which this one adds; what was known of it stands in the head
    under `earlier`."""
    rows = kept(out)
    if rows:
        before = read(out)
        heads = [*before.pop("earlier", []), {k: v for k, v in before.items() if k != "rows"}]
        head = head | {"earlier": heads}
    return Results(head, out, rows)


class Results:
    """The rows of one run: each is printed as it is found, and the file is written anew, so that
    a stop loses nothing.

    head  what header() returns; keys that are added to it are written too
    out   None: the rows are only printed
    """

    def __init__(self, head: dict, out: Path | None, rows: list[dict] | None = None):
        self.head, self.out, self.rows = head, out, rows or []

    def add(self, *rows: dict, columns: tuple[str, ...] = ()) -> None:
        """columns: those that are printed, in this order; all when none is named."""
        self.rows += rows
        for row in rows:
            print(line(row, columns), flush=True)
        self.write()

    def write(self) -> None:
        if self.out:
            write(self.out, self.head | {"rows": self.rows})


def line(row: dict, columns: tuple[str, ...] = ()) -> str:
    """A row for the terminal: texts as they are, numbers with their names, three numbers as
    median [p20, p80]."""
    cells = []
    for name in columns or row:
        value = _rounded(row.get(name))
        if isinstance(value, str):
            cells.append(value)
        elif isinstance(value, list) and len(value) == 3 and isinstance(value[0], float):
            cells.append("{} {:.4g} [{:.4g}, {:.4g}]".format(name, *value))
        elif value is not None:
            cells.append(f"{name} {value}")
    return "  ".join(cell for cell in cells if cell)


def main(argv: list[str]) -> int:
    """Adds to a file what is run here, and the clocks at a moment."""
    path, moment = Path(argv[0]), argv[1]
    found = json.loads(path.read_text()) if path.exists() else {"clocks": {}}
    gpu = torch.cuda.get_device_properties(0)
    found |= header("machine", "bench.record", argv, "cuda")
    found |= {"multiprocessors": gpu.multi_processor_count, "memory_bytes": gpu.total_memory}
    found["nvcc"] = " ".join(_said("nvcc", "--version").splitlines()[-2:-1]) or None
    more = ("clocks.max.sm", "power.limit", "clocks_throttle_reasons.active")
    found["clocks"][moment] = clocks() | gpu_state(*more)
    path.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
