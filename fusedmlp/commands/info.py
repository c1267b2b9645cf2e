"""What this machine can run: versions, devices, the extension, each backend with reasons."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform

import torch

from .. import environment
from .._version import __version__
from ..backends import choice, measured, registry
from ..spec import dtypes


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _extension_lines() -> list[str]:
    from ..backends import native

    build = native.build_info()
    if build is None:
        return ["extension   not built (FUSEDMLP_BUILD=auto pip install --no-build-isolation .)"]
    made = ", ".join(build.get("built", [])) or "nothing"
    lines = [f"extension   built for {made} with torch {build.get('torch')}"]
    if build.get("cuda"):
        lines[0] += f", CUDA {build['cuda']}, {' '.join(build.get('archs') or [])}"
    for target, reason in (build.get("left_out") or {}).items():
        lines.append(f"            {target} left out: {reason}")
    return lines + _isa_lines()


def _isa_lines() -> list[str]:
    """The instruction set of the CPU kernels, where they can be opened."""
    from ..backends import native

    wrong = any(problem.startswith("FUSEDMLP_CPU_ISA") for problem in environment.problems())
    if wrong or _unavailable(registry.BACKENDS[0], "cpu") is not None:
        return []
    asked, used, bf16 = native.asked_isa(), native.cpu_isa(), native.bf16_isa()
    lacks = asked not in (None, used, bf16)
    short = f"; this processor lacks {asked}, which was asked for" if lacks else ""
    return [f"            the CPU kernels use {used}, training in bf16 {bf16 or 'cannot'}{short}"]


def _unavailable(backend: registry.Backend, device: str) -> str | None:
    """A report names a wrong value of the environment, which ends a call."""
    try:
        return backend.unavailable(device)
    except ValueError as error:
        return str(error)


def _choice(p: float, device: str) -> str:
    try:
        return str(choice.explain(p=p, device=device)).splitlines()[0]
    except ValueError as error:
        return str(error)


def lines() -> list[str]:
    """The report, a line each."""
    out = [
        f"fusedmlp    {__version__}",
        f"python      {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch       {torch.__version__} (CUDA {torch.version.cuda}), "
        f"{torch.get_num_threads()} threads",
        f"triton      {_version('triton')}",
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            out.append(f"GPU {i}       {p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB")
    else:
        out.append("GPU         none is available to torch")
    out += _extension_lines()
    missing = [
        name
        for name, module in (
            ("tyro", "tyro"),
            ("rich", "rich"),
            ("matplotlib", "matplotlib"),
            ("safetensors", "safetensors"),
            ("torchvision", "torchvision"),
            ("scikit-learn", "sklearn"),
        )
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        out.append(f"train extra {', '.join(missing)} missing: pip install 'fusedmlp[train]'")
    else:
        out.append("train extra complete")
    out.append("")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for backend in registry.BACKENDS:
        for device in devices:
            reason = _unavailable(backend, device)
            takes = ", ".join(dtypes.SHORT[d] for d in backend.dtypes)
            for op in choice.OPS:
                state = f"ok ({takes})" if reason is None else reason
                out.append(f"{backend.name:10} {device:5} {op:17} {state}")
    out.append("")
    out += _choices(devices)
    out.append("")
    out += _table(devices)
    set_here = {k: os.environ[k] for k in environment.VARIABLES if k in os.environ}
    if set_here:
        out += ["", "environment " + ", ".join(f"{k}={v}" for k, v in set_here.items())]
        out += [f"            wrong: {problem}" for problem in environment.problems()]
    return out


def _choices(devices: list[str]) -> list[str]:
    out = ["automatic choice, 256 rows, fp32:"]
    try:
        named = registry.explicit(None)
    except ValueError as error:
        return [*out, f"  none: {error}"]
    for device in devices:
        for p in (0.0, 0.5):
            out.append("  " + _choice(p, device))
        if device != "cpu" and named is None:
            out.append(f"  {choice.unmeasured(device)}")
    if named is not None:
        out.append(f"  (backend {named!r} is set here)")
    return out


_SHOWN = 20  # rows of each device


def _table(devices: list[str]) -> list[str]:
    """The measured choices that are in use."""
    out = [f"measured choices: shipped for {'; '.join(measured.shipped())}"]
    out.append(f"  of this machine in {measured.path()}:")
    before = len(out)
    for device in devices:
        try:
            entry = measured.own(device)
        except ValueError as error:
            return [*out, f"  not used: {error}"]
        calls = entry.get("calls", {})
        for key, row in list(calls.items())[:_SHOWN]:
            times = sorted(row["times"].items(), key=lambda pair: pair[1])
            told = [f"{name} {us:.3g} us" for name, us in times]
            told += [f"{name} WRONG: {reason}" for name, reason in row["wrong"].items()]
            out.append(f"  {device}, {key}: {', '.join(told)}")
        if len(calls) > _SHOWN:
            out.append(f"  {device}: {len(calls) - _SHOWN} sizes more")
        for part in ("classes", "tiles"):
            if part in entry:
                what = {"classes": "classes of networks", "tiles": "tiles of Triton's products"}
                out.append(f"  {device}: {len(entry[part])} {what[part]}")
    if len(out) == before:
        out.append("  none (`fusedmlp tune` measures)")
    return out


def info_command(argv: list[str]) -> int:
    """`fusedmlp info`."""
    argparse.ArgumentParser(
        prog="fusedmlp info",
        description="Versions, devices, and what each backend can run here, with every reason.",
    ).parse_args(argv)
    print("\n".join(lines()))
    return 0


def verify_command(argv: list[str]) -> int:
    """`fusedmlp verify`."""
    from . import verify

    return verify.command(argv)
