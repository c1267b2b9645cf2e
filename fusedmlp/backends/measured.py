"""The table of measured choices: what was shipped, and what was measured on this machine.

A file of JSON in the user's cache folder, one entry a kind of device; `shipped.json` beside this
file has the same form. An entry holds

    versions  of what decides on times: driver, torch, triton, this package
    calls     size class of a network -> microseconds of each candidate, and those that are wrong
    classes   class of networks -> eager's time over each candidate's, least and median
    tiles     size class of a product -> Triton's tile

Entries that were made with other versions are stale: not used, which is said once, and measured
anew where something measures. So is a file that cannot be read. Torch's deterministic mode reads
what was shipped alone, as that is the same on every machine of a kind.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from .. import environment
from .._version import __version__
from ..spec import activations, dtypes
from ..whole_file import whole_file

log = logging.getLogger("fusedmlp")

SHIPPED = Path(__file__).with_name("shipped.json")
PARTS = ("calls", "classes", "tiles")

_kept: dict[str, dict] | None = None


def path() -> Path:
    """Where the table is kept: under XDG_CACHE_HOME, by default ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fusedmlp" / "measured.json"


@functools.cache
def _cpu() -> str:
    """Vendor, family and instruction set. AMD's family 25 multiplies a vector of AVX-512 in two
    halves and family 26 at once: other ops are faster than PyTorch's there."""
    about = {"vendor_id": platform.processor() or platform.machine()}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if not line:
                break  # the end of the first processor
            name, _, value = line.partition(":")
            about[name.strip()] = value.strip()
    except OSError:
        pass
    family = f" family {about['cpu family']}" if "cpu family" in about else ""
    return f"{about['vendor_id']}{family} {torch.backends.cpu.get_cpu_capability()}"


def kind(device_type: str) -> str:
    """What measurements belong to: the present GPU's name, or the CPU's and the threads."""
    if device_type == "cpu":
        return f"{_cpu()}, threads {torch.get_num_threads()}"
    if device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return device_type


@functools.cache
def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


@functools.cache
def versions(device_type: str) -> dict[str, str | None]:
    """What an entry must have been made with."""
    found = {"torch": torch.__version__, "fusedmlp": __version__}
    if device_type == "cuda":
        found |= {"driver": _driver(), "triton": _triton_version()}
    return found


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    return next((word for word in text.split() if word[:1].isdigit() and "." in word), None)


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _is_entry(entry: object) -> bool:
    """Whether an entry has the form that is written here; a file can be anything."""
    if not isinstance(entry, dict) or not isinstance(entry.get("versions"), dict):
        return False
    if not all(isinstance(entry.get(part, {}), dict) for part in PARTS):
        return False
    for row in entry.get("calls", {}).values():
        fine = isinstance(row, dict) and isinstance(row.get("wrong"), dict)
        times = row.get("times") if fine else None
        if not isinstance(times, dict) or not all(map(_number, times.values())):
            return False
    for row in entry.get("classes", {}).values():
        if not isinstance(row, dict) or not isinstance(row.get("ratios"), dict):
            return False
        for pair in row["ratios"].values():
            if not isinstance(pair, list) or len(pair) != 2 or not all(map(_number, pair)):
                return False
    return all(
        isinstance(tile, list) and all(isinstance(n, int) for n in tile)
        for tile in entry.get("tiles", {}).values()
    )


def _read(file: Path) -> dict[str, dict]:
    """raises   OSError, ValueError"""
    found = json.loads(file.read_text())
    if not isinstance(found, dict):
        raise ValueError("it holds no table")
    for name, entry in found.items():
        if not _is_entry(entry):
            raise ValueError(f"the entry of {name!r} is damaged")
    return found


def _load() -> dict[str, dict]:
    global _kept
    if _kept is None:
        _kept = {}
        try:
            _kept = _read(path())
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            log.warning(
                "measured choices are not used: %s cannot be read: %s; `fusedmlp tune` writes it "
                "anew",
                path(),
                error,
            )
    return _kept


@functools.cache
def shipped() -> dict[str, dict]:
    """The entries that come with the package."""
    return _read(SHIPPED)


@functools.cache
def _warn_stale(file: Path, name: str, changes: str) -> None:
    log.warning(
        "measured choices for %s in %s are not used, as they were made with other versions (%s); "
        "`fusedmlp tune` measures again",
        name,
        file,
        changes,
    )


def own(device_type: str) -> dict:
    """The entry of this machine's file for the present device; empty where it has none, is stale,
    or must not be used."""
    if environment.read("FUSEDMLP_AUTOTUNE") == "0" or torch.are_deterministic_algorithms_enabled():
        return {}
    name = kind(device_type)
    entry = _load().get(name)
    if entry is None:
        return {}
    now, was = versions(device_type), entry["versions"]
    if was != now:
        changed = sorted(key for key in now | was if was.get(key) != now.get(key))
        told = ", ".join(f"{key} {was.get(key)}, now {now.get(key)}" for key in changed)
        _warn_stale(path(), name, told)
        return {}
    return entry


def keep(device_type: str, part: str, key: str, value: dict | list) -> None:
    """Write one measurement."""
    keep_all(device_type, part, {key: value})


def keep_all(device_type: str, part: str, rows: dict[str, dict | list]) -> None:
    """Write measurements; a stale entry makes room. Another process may have written since."""
    global _kept
    _kept = None
    tables = _load()
    name, now = kind(device_type), versions(device_type)
    if tables.get(name, {}).get("versions") != now:
        tables[name] = {"versions": now}
    tables[name].setdefault(part, {}).update(rows)
    _save(tables)
    changed()


def _save(tables: dict) -> None:
    """raises   OSError, that names the file"""
    target = path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            file.write(json.dumps(tables, indent=1).encode())
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror}") from error


_watchers: list = []


def watch(forget) -> None:
    """Have a cache of answers forgotten when the table changes."""
    _watchers.append(forget)


def changed() -> None:
    for forget in _watchers:
        forget()


def forget() -> None:
    """Read the file again at the next call."""
    global _kept
    _kept = None
    _warn_stale.cache_clear()
    changed()


def up(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def call_key(
    dtype: torch.dtype,
    rows: int,
    in_features: int,
    layers: Iterable[tuple[int, bool, int]],
    gradients: bool,
) -> str:
    """The size class of a network, layers as in choice.select_net; sizes rounded up to powers of
    two."""
    parts = [f"{dtypes.SHORT[dtype]} {'step' if gradients else 'infer'}"]
    parts.append(f"{up(rows)} x {in_features and up(in_features)}")
    for act, drops, n in layers:
        parts.append(f"{up(n)} {activations.NAMES[act]}{' dropout' if drops else ''}")
    return ", ".join(parts)


# Activations that PyTorch applies in a pass that costs next to nothing.
_CHEAP = {
    activations.NONE,
    activations.RELU,
    activations.LEAKY_RELU,
    activations.PRELU,
    activations.RELU_SQUARED,
}
# Where the extension's products change their way: csrc/cpu/gemm.cpp and network.cpp.
_ROWS = (8, 32, 128)
_WEIGHTS = (1 << 10, 1 << 13, 1 << 16, 1 << 18)
_ELEMENTS = (1 << 12, 1 << 16, 1 << 20)


def class_key(
    dtype: torch.dtype,
    rows: int,
    in_features: int,
    layers: list[tuple[int, bool, int]],
    gradients: bool,
) -> str:
    """The class of networks that a network belongs to, coarse enough to be measured in advance;
    in_features 0 is an activation alone."""
    widths = [in_features, *[n for _, _, n in layers]]
    weights = max(k * n for k, n in zip(widths, widths[1:], strict=False))
    acts = {act for act, _, _ in layers} - _CHEAP
    like = "gelu" if acts == {activations.GELU} else "tanh" if acts else "relu"
    drops = any(drops for _, drops, _ in layers)
    return ", ".join(
        (
            f"{dtypes.SHORT[dtype]} {'step' if gradients else 'infer'}",
            f"{'dropout' if drops else 'no dropout'}",
            f"{like} and the like",
            *(
                (_range("elements", rows * widths[1], _ELEMENTS),)
                if in_features == 0
                else (
                    "1 layer" if len(layers) == 1 else "2 layers and more",
                    _range("rows", rows, _ROWS),
                    _range("weights", weights, _WEIGHTS),
                )
            ),
        )
    )


def _range(name: str, value: int, bounds: tuple[int, ...]) -> str:
    for bound in bounds:
        if value < bound:
            return f"{name} below {bound}"
    return f"{name} from {bounds[-1]}"
