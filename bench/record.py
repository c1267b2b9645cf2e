"""What stands beside every figure: machine, versions, commit, date, command. Measures nothing."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    isa = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else platform.machine()
    return f"{fields.get('model name') or platform.processor() or 'CPU'}, {isa}"


def machine(device: str = "cpu") -> dict:
    """The processor, its cores, and the GPU when that is what was timed."""
    found = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "driver": gpu_state("driver_version").get("driver_version"),
        }
    return found


def versions() -> dict:
    """Python, torch, CUDA and Triton; this package's own."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda
    for name in ("triton", "fusedmlp"):
        try:
            found[name] = importlib.import_module(name).__version__
        except (ImportError, AttributeError):
            found[name] = None
    return found


def commit() -> str | None:
    """The commit, with '+' and the number of files that differ from it; None outside git."""
    found = _said("git", "rev-parse", "--short=12", "HEAD")
    code = ("fusedmlp", "csrc", "bench/*.py", "setup.py")
    changed = _said("git", "status", "--porcelain", "--", *code).splitlines()
    return (found + (f"+{len(changed)}" if changed else "")) or None


def gpu_state(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; {} without it."""
    asked = _said(
        "nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader", "-i", "0"
    )
    values = [value.strip() for value in asked.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def clocks() -> dict[str, str]:
    """Clocks, power and temperature now."""
    return gpu_state("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def header(name: str, module: str, argv: list[str] | None, device: str = "cpu") -> dict:
    """What a results file opens with; its figures follow under 'rows'."""
    given = sys.argv[1:] if argv is None else argv
    # Where something lies on one machine is of no use on another.
    arguments = shlex.join("DIR" if Path(a).is_absolute() else a for a in given)
    return {
        "name": name,
        "machine": machine(device),
        "versions": versions(),
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
    missing = [
        key for key in ("name", "machine", "versions", "commit", "date", "rows") if key not in found
    ]
    if missing:
        raise ValueError(f"bench: {path} must hold {', '.join(missing)}")
    return found
