"""Chooses the backend of each call: what the user names, else what was measured to be faster.

The table of measurements is measured.py's: first the row of this machine for networks of this size,
then the class of networks on this kind of device, measured here or shipped. Where neither is, plain
PyTorch runs on a GPU; on a CPU what every kind that was shipped has found to be clearly faster.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .. import compat, context
from ..spec import activations, checks, dtypes
from . import measured, registry
from .registry import EAGER

OPS = ("linear_act", "bias_act_dropout")

# Ways to run a network with an op a layer: `layers`, the op linear_act; `epilogue`, the library's
# product and the op bias_act_dropout. On a CPU linear_act itself is that.
ROUTES = {"cpu": ("layers",), "cuda": ("layers", "epilogue")}

_NATIVE = ("native", "eager")
# With dropout plain PyTorch is `reference`: eager PyTorch has not this package's masks.
_UNMEASURED = ("eager", "reference")

# Eager's time over a candidate's: what the slowest of a class must have, and the median. On kinds
# of CPU that nobody measured the slowest of every kind that was.
_LEAST, _MEDIAN = 0.97, 1.03
_LEAST_ELSEWHERE = 1.1
# A row of this very size: what makes another way than plain PyTorch worth it.
GAIN = 1.03
# Weights from which a layer is better off with the library's product where nothing is known.
_LARGE = 1 << 18


class Way(NamedTuple):
    """How a network runs: a backend, and one op for all layers (`mlp`) or a route of ROUTES. why is
    for people."""

    backend: str
    route: str
    why: str

    @property
    def name(self) -> str:
        return self.backend if self.backend in (EAGER, "reference") else f"{self[0]} {self[1]}"


_forced: Way | None = None


@contextlib.contextmanager
def forced(way: Way) -> Iterator[None]:
    """Inside, networks and layers of their own run that way: how candidates are timed."""
    global _forced
    before, _forced = _forced, way
    try:
        yield
    finally:
        _forced = before


def _way(name: str, why: str) -> Way:
    backend, _, route = name.partition(" ")
    return Way(backend, route, why)


def _with_times(times: dict[str, float]) -> str:
    ranked = sorted(times, key=times.get)
    return ", ".join(f"{name} {times[name]:.3g} us" for name in ranked)


def _by_row(row: dict, names: list[str]) -> Way | None:
    """From the times of this very size, among candidates of these names."""
    times = {name: t for name, t in row["times"].items() if name in names}
    others = [name for name in times if name != EAGER]
    if not times:
        return None
    best = min(others, key=times.get) if others else EAGER
    if EAGER in times and times[EAGER] < GAIN * times[best]:
        best = EAGER
    return _way(best, f"measured on this machine: {_with_times(row['times'])}")


def _by_class(kinds: dict[str, dict], names: list[str], least: float, key: str) -> Way | None:
    """From eager's time over that of each candidate in a class of networks, on each of some kinds
    of device; None where they say nothing.

    kinds  name of the kind -> its classes
    """
    rows = {kind: classes[key]["ratios"] for kind, classes in kinds.items() if key in classes}
    found = {}
    for name in names:
        pairs = [row[name] for row in rows.values() if name in row]
        if pairs and len(pairs) == len(rows):
            found[name] = [min(column) for column in zip(*pairs, strict=True)]
    if not found:
        return None
    best = max(found, key=lambda name: found[name][1])
    if EAGER in names:
        fast = [n for n in found if found[n][0] >= least and found[n][1] >= max(_MEDIAN, least)]
        best = max(fast, key=lambda name: found[name][1], default=EAGER)
    where = " and ".join(rows)
    if best == EAGER:
        return _way(EAGER, f"of networks like this no op was faster throughout on {where}")
    low, median = found[best]
    return _way(
        best,
        f"networks like this took plain PyTorch {median:.2g} times as long, at least {low:.2g}, on "
        f"{where}",
    )


def _measured(
    device_type: str,
    dtype: torch.dtype,
    rows: int,
    in_features: int,
    layers: list[tuple[int, bool, int]],
    gradients: bool,
    names: list[str],
) -> Way | None:
    """The way that the table knows to be the fastest, of candidates of these names."""
    what = dtype, rows, in_features, layers, gradients
    own = measured.own(device_type)
    row = own.get("calls", {}).get(measured.call_key(*what))
    found = None if row is None else _by_row(row, names)
    if found is not None or device_type != "cpu":
        return found
    kind, key = measured.kind(device_type), measured.class_key(*what)
    shipped = {k: entry.get("classes", {}) for k, entry in measured.shipped().items()}
    for classes in (own.get("classes"), shipped.get(kind)):
        if classes:
            found = _by_class({kind: classes}, names, _LEAST, key)
            if found is not None:
                return found
    if kind not in shipped and "classes" not in own:
        registry.log_once(
            f"a CPU like this one ({kind}) was not measured: ops run where they were clearly "
            "faster on all that were; `fusedmlp tune` measures it, in minutes"
        )
    return _by_class(shipped, names, _LEAST_ELSEWHERE, key)


def unmeasured(device_type: str) -> str:
    """What is said of a device on which nothing was measured."""
    if device_type == "cpu":
        return "networks like this were not measured on a CPU like this one: plain PyTorch is used"
    if device_type != "cuda":
        return f"no device of type {device_type!r} has been measured: plain PyTorch is used"
    return (
        "this GPU has not been measured: plain PyTorch is used; run `fusedmlp tune` with the sizes "
        "of your network to have it measured"
    )


@functools.lru_cache(maxsize=4096)
def _measured_order(
    device_type: str,
    op: str,
    dtype: torch.dtype,
    act: int,
    dropout: bool,
    rows: int,
    in_features: int,
    out_features: int,
    gradients: bool,
    deterministic: bool,
) -> tuple[tuple[str, ...], str]:
    """The order in which backends are tried for one call, and why. Arguments as in select.

    gradients, deterministic  what autograd and torch's deterministic mode are set to
    """
    context.watch_forks()
    if act == activations.NONE and not dropout:
        return _UNMEASURED, "without activation and dropout there is nothing to fuse"
    names = [f"{backend} layers" for backend in ("native", "triton")] + [EAGER] * (not dropout)
    layers = [(act, dropout, out_features)]
    way = _measured(device_type, dtype, rows, in_features, layers, gradients, names)
    if way is not None:
        return (way.backend, EAGER), way.why
    if device_type == "cpu" and dropout:
        return _NATIVE, "plain PyTorch takes longer to make this package's masks"
    return _UNMEASURED, unmeasured(device_type)


measured.watch(_measured_order.cache_clear)


def _why(choice: str, first: str, why: str) -> str:
    """One sentence on the reason for a choice, for explain.

    first, why  the head of the order that `_measured_order` gave, and its reason
    """
    if choice != first and (choice, first) != ("reference", EAGER):
        return f"{first!r} would be taken at this size but cannot run the call"
    return why


def _resolve(
    order: tuple[str, ...], named: str | None, op: str, device_type: str, dtype, dropout: bool
) -> str:
    """The named backend, or the first of `order` that can run the call."""
    if named is not None:
        return registry.require(named, device_type, dtype, op)
    if order is _UNMEASURED and device_type not in ("cpu", "meta"):
        registry.log_once(unmeasured(device_type))
    for name in order:
        if name == EAGER:
            if not dropout:
                return EAGER
        elif registry.is_usable(name, device_type, dtype, op):
            return name
    return "reference" if dropout else EAGER


# The answer is the same for all calls that Dynamo would reuse the graph for.
compat.mark_constant(_resolve)


def select(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    act: int,
    dropout: bool,
    rows: int,
    in_features: int,
    out_features: int,
    backend: str | None = None,
) -> str:
    """The backend for one call: a name of BACKENDS, or EAGER.

    op            'linear_act' or 'bias_act_dropout'
    rows          M, the flattened batch
    in_features   K, 0 for bias_act_dropout
    out_features  N
    returns       depends on torch.is_grad_enabled() too: an op's autograd node has its cost
    raises        BackendError if a backend was named that cannot run the call
    """
    named = registry.explicit(backend)
    if _forced is not None and named is None:
        return _forced.backend
    if named is not None or torch.compiler.is_compiling() or isinstance(rows, torch.SymInt):
        # Compiled, sizes may be symbolic: choosing by them would compile once per size class.
        order = _NATIVE if device_type == "cpu" else _UNMEASURED
    else:
        order = _measured_order(
            device_type,
            op,
            dtype,
            act,
            dropout,
            rows,
            in_features,
            out_features,
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
        )[0]
    return _resolve(order, named, op, device_type, dtype, dropout)


def named_for_engine(device_type: str, dtype: torch.dtype, op: str) -> str | None:
    """The backend of an engine that was itself asked for by name: what the user has named, or else
    on a GPU fused kernels, where they run, as that is what such an engine is for."""
    named = registry.explicit(None)
    if named is None and device_type != "cpu":
        return "triton" if registry.is_usable("triton", device_type, dtype, op) else None
    return named


def select_net(
    device_type: str,
    dtype: torch.dtype,
    rows: int,
    in_features: int,
    layers: list[tuple[int, bool, int]],
    named: str | None,
) -> Way | None:
    """How a whole network runs, or None where each of its layers is asked for by itself.

    rows     M, the flattened batch
    layers   (act, whether it drops, out_features) of each
    named    what `explicit` says
    returns  depends on torch.is_grad_enabled() too
    """
    if named is not None:
        if not has_mlp(named, device_type, dtype):
            return None
        return Way(named, "mlp", "it was asked for by name")
    if _forced is not None:
        return _forced
    drops = any(drops for _, drops, _ in layers)
    names = ["reference" if drops else EAGER]
    for backend in ("native", "triton"):
        if registry.is_usable(backend, device_type, dtype, "linear_act"):
            names += [f"{backend} mlp"] * has_mlp(backend, device_type, dtype)
            names += [f"{backend} {route}" for route in ROUTES.get(device_type, ())]
    context.watch_forks()
    if len(names) == 1:
        return None
    way = _measured(device_type, dtype, rows, in_features, layers, torch.is_grad_enabled(), names)
    widths = [in_features, *[n for _, _, n in layers]]
    is_small = all(k * n < _LARGE for k, n in zip(widths, widths[1:], strict=False))
    if way is None and drops and is_small and "native mlp" in names and device_type == "cpu":
        return _way("native mlp", "plain PyTorch takes longer to make this package's masks")
    if way is not None or device_type == "cpu":
        return way
    registry.log_once(unmeasured(device_type))
    return None


@functools.cache
def has_mlp(name: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether modules use the op mlp of a backend; that of `reference` gains them nothing."""
    if name == "reference" or not registry.is_usable(name, device_type, dtype, "mlp"):
        return False
    if name == "triton":
        return device_type != "cpu"
    key = "CPU" if device_type == "cpu" else "CUDA"
    return (dtype == torch.float32 or key == "CUDA") and (
        compat.has_kernel("fusedmlp::mlp_fwd.native", key)
    )


@dataclass(frozen=True)
class Explanation:
    """What would run a call, and why not the others. `str()` of it is meant to be read."""

    op: str
    call: str
    choice: str
    why: str
    refusals: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}({self.call}) runs on {self.choice!r}: {self.why}"]
        for name, reasons in self.refusals.items():
            lines += [f"    not {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


def explain(
    op: str = "linear_act",
    *,
    rows: int = 256,
    in_features: int = 784,
    out_features: int = 256,
    activation: str = "relu",
    p: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Explanation:
    """Which backend a call would run on, and why.

    op            'linear_act' or 'bias_act_dropout' (in_features is then ignored)
    rows          M;  in_features K;  out_features N
    returns       an Explanation; print it
    raises        ValueError or TypeError for names, sizes and p that no call could have
    """
    if op not in OPS:
        raise ValueError(f"explain: unknown op {op!r}; known: {', '.join(OPS)}")
    act = checks.activation("explain", activation)
    dropout = checks.probability("explain", p) > 0
    sizes = {"rows": rows, "in_features": in_features, "out_features": out_features}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"explain: {name} must be an int, got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"explain: {name} must be >= 0, got {size}")
    if dtype not in dtypes.SUPPORTED:
        raise TypeError(f"explain: dtype must be fp32, fp16, bf16 or fp64, got {dtype}")
    device_type = torch.device(device).type
    named = registry.explicit(backend)
    refusals = {b.name: b.reasons_against(device_type, dtype) for b in registry.BACKENDS}
    refusals = {name: reasons for name, reasons in refusals.items() if reasons}
    inner = f" x {in_features}" if op == "linear_act" else ""
    call = f"{rows}{inner} x {out_features}, {activation}, p = {p:g}, {dtypes.SHORT[dtype]}"
    call += f", {device_type}"
    if named is not None:
        if named in refusals:
            return Explanation(op, call, "nothing", f"{named!r} was asked for and raises", refusals)
        return Explanation(op, call, named, "it was asked for by name", {})
    choice = select(op, device_type, dtype, act, dropout, rows, in_features, out_features)
    k = in_features if op == "linear_act" else 0
    modes = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    order, why = _measured_order(
        device_type, op, dtype, act, dropout, rows, k, out_features, *modes
    )
    why = _why(choice, order[0], why)
    refusals.pop(choice, None)
    return Explanation(op, call, choice, why, refusals)
