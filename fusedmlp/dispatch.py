"""Chooses a backend for each call. Does not import any backend until one is chosen.

argument `backend=` > `use_backend(...)` > FUSEDMLP_BACKEND > automatic. An explicit choice works or
raises BackendError with every reason. Only automatic choice passes a backend over, and logs why,
once per (op, backend, reason). The whole list of backends is the tuple BACKENDS.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch

from . import checks, context, dtypes, environment, policy

log = logging.getLogger("fusedmlp")

# Plain PyTorch, unfused and with PyTorch's own autograd: a candidate of automatic choice only.
EAGER = "eager"
OPS = ("linear_act", "bias_act_dropout")


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run the call; the message holds every reason."""


@dataclass(frozen=True)
class Backend:
    """One entry of the registry.

    unavailable  device type -> why nothing of it runs on that device here, or None; cached
    dtypes       the dtypes its kernels take
    module       where its functions live, imported on first use
    missing      (device type, dtype, op or None) -> what of its kernels this call would need and
                 is not there, or None; asked where the rest is all right
    """

    name: str
    unavailable: Callable[[str], str | None]
    dtypes: tuple[torch.dtype, ...]
    module: str
    missing: Callable[[str, torch.dtype, str | None], str | None] = lambda *call: None

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)

    def refuses(self, device_type: str, dtype: torch.dtype, op: str | None = None) -> list[str]:
        """Every reason why this backend cannot run a call; empty when it can."""
        reasons = []
        reason = self.unavailable(device_type)
        if reason is not None:
            reasons.append(reason)
        if dtype not in self.dtypes:
            names = ", ".join(dtypes.SHORT[d] for d in self.dtypes)
            reasons.append(f"{dtypes.SHORT.get(dtype, dtype)} is not one of its dtypes ({names})")
        if not reasons:
            reason = self.missing(device_type, dtype, op)
            reasons += [] if reason is None else [reason]
        return reasons


def _native_unavailable(device_type: str) -> str | None:
    from .kernels.native import extension

    return extension.unavailable(device_type)


def _native_missing(device_type: str, dtype: torch.dtype, op: str | None) -> str | None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if op == "cross_entropy" and not has(f"fusedmlp::{op}.native", device_type.upper()):
        return f"the extension has no {op} for {device_type} tensors"
    if device_type == "cuda" and dtype == torch.bfloat16:
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return (
                "bf16 needs a GPU of compute capability 8.0 or newer, this one has "
                f"{major}.{minor}; use fp16"
            )
    return None


@functools.cache
def _triton_unavailable(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if importlib.util.find_spec("fusedmlp.kernels.triton.linear_act") is None:
        return "this version has no Triton kernels"
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton kernels run on GPUs; CPU tensors only with TRITON_INTERPRET=1, for tests"
    if device_type != "cuda":
        return f"Triton kernels run on NVIDIA and AMD GPUs, not on {device_type!r}"
    if not torch.cuda.is_available():
        return "no GPU is available to torch"
    return None


BACKENDS: tuple[Backend, ...] = (
    Backend(
        "native", _native_unavailable, dtypes.KERNEL, "fusedmlp.kernels.native", _native_missing
    ),
    Backend("triton", _triton_unavailable, dtypes.KERNEL, "fusedmlp.kernels.triton"),
    Backend("reference", lambda device: None, dtypes.SUPPORTED, "fusedmlp.kernels.reference"),
)
_BY_NAME = {b.name: b for b in BACKENDS}


def _known(name: object, where: str) -> str | None:
    if name is None or name in _BY_NAME:
        return name
    raise ValueError(f"{where}: unknown backend {name!r}; known: {', '.join(_BY_NAME)}")


# Looked at when it is first used: an import that raises would leave no command to say why.
_from_environment = os.environ.get("FUSEDMLP_BACKEND") or None


class use_backend:
    """Fixes the backend of all calls that do not name one, for good or for a `with` block.

        fusedmlp.use_backend("reference")           # from here on
        with fusedmlp.use_backend("native"): ...    # only inside
        fusedmlp.use_backend(None)                  # automatic choice again

    name     'native', 'triton', 'reference' or None
    raises   ValueError for an unknown name; a later call that the backend cannot run raises
             BackendError

    The setting belongs to the context: a new thread starts without one, an asyncio task with that
    of the code that made it, and neither changes that of others. Inside a function that
    torch.compile compiles only a `with` block has an effect.
    """

    def __init__(self, name: str | None):
        now = context.now()
        self._name, self._before = _known(name, "use_backend"), now.backend
        if not torch.compiler.is_dynamo_compiling():
            context.put(context.Settings(self._name, now.scopes))

    def __enter__(self) -> use_backend:
        if torch.compiler.is_dynamo_compiling():
            context.enter(context.Settings(self._name, context.now().scopes))
        return self

    def __exit__(self, *exc: object) -> None:
        context.leave(context.Settings(self._before, context.now().scopes))


def backends() -> tuple[str, ...]:
    """The names of all backends, in the order in which automatic choice looks at them."""
    return tuple(_BY_NAME)


_logged: set[object] = set()


def _log_once(op: str, backend: str, reason: str) -> None:
    if (op, backend, reason) not in _logged:
        _logged.add((op, backend, reason))
        log.info("%s: backend %r was passed over: %s", op, backend, reason)


_usable: dict[tuple[str, str, torch.dtype, str], bool] = {}


def _is_usable(name: str, device_type: str, dtype: torch.dtype, op: str) -> bool:
    key = (name, device_type, dtype, op)
    found = _usable.get(key)
    if found is None:
        reasons = _BY_NAME[name].refuses(device_type, dtype, op)
        for reason in reasons:
            _log_once(op, name, reason)
        found = _usable[key] = not reasons
    return found


def require(name: str, device_type: str, dtype: torch.dtype, op: str) -> str:
    """`name`, or BackendError with every reason why it cannot run `op` there."""
    if not _usable.get((name, device_type, dtype, op)):
        reasons = _BY_NAME[_known(name, op)].refuses(device_type, dtype, op)
        if reasons:
            lines = "\n    ".join(reasons)
            raise BackendError(
                f"{op}: backend {name!r} was asked for but cannot be used:\n    {lines}"
            )
        _usable[name, device_type, dtype, op] = True
    return name


def _resolve(
    order: tuple[str, ...], named: str | None, op: str, device_type: str, dtype, dropout: bool
) -> str:
    """The named backend, or the first of `order` that can run the call."""
    if named is not None:
        return require(named, device_type, dtype, op)
    if device_type not in ("cpu", "meta") and device_type not in _logged:
        _logged.add(device_type)
        log.info("%s", policy.unmeasured(device_type))
    for name in order:
        if name == EAGER:
            if not dropout:
                return EAGER
        elif _is_usable(name, device_type, dtype, op):
            return name
    return "reference" if dropout else EAGER


# What `torch.compiler.assume_constant_result` sets, without its import of the whole compiler: the
# answer is the same for all calls that Dynamo would reuse the graph for.
_resolve._dynamo_marked_constant = True


def explicit(backend: str | None) -> str | None:
    """The backend that the user has named by argument, use_backend or environment, or None."""
    if backend is not None:
        return _known(backend, "backend")
    return named_in(context.now())


def named_in(settings: context.Settings) -> str | None:
    """The backend that the settings of a context, or else the environment, name."""
    if settings.backend is None and _from_environment is not None:
        return environment.check("FUSEDMLP_BACKEND", _from_environment)
    return settings.backend


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
    named = explicit(backend)
    if named is not None or torch.compiler.is_compiling():
        # Compiled, sizes may be symbolic: choosing by them would compile once per size class.
        order = policy.order(device_type)
    else:
        order = policy.choose(
            device_type,
            op,
            dtype,
            act,
            dropout,
            rows,
            in_features,
            out_features,
            torch.is_grad_enabled(),
        )
    return _resolve(order, named, op, device_type, dtype, dropout)


def named_for_engine(device_type: str, dtype: torch.dtype, op: str) -> str | None:
    """The backend of an engine that was itself asked for by name: what the user has named, or else
    on a GPU fused kernels, where they run, as that is what such an engine is for."""
    named = explicit(None)
    if named is None and device_type != "cpu" and _is_usable("triton", device_type, dtype, op):
        return "triton"
    return named


def select_mlp(
    device_type: str,
    dtype: torch.dtype,
    rows: int,
    in_features: int,
    layers: list[tuple[int, bool, int]],
    named: str | None,
) -> str | None:
    """The backend that runs a whole network as one op, or None where its layers do better alone.

    rows     M, the flattened batch
    layers   (act, whether it drops, out_features) of each
    named    what `explicit` says
    returns  depends on torch.is_grad_enabled() too
    """
    if named is None:
        named = policy.choose_mlp(device_type, rows, in_features, layers, torch.is_grad_enabled())
    if named is None or not has_mlp(named, device_type, dtype):
        return None
    return named


@functools.cache
def has_mlp(name: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether modules use the op mlp of a backend; that of `reference` gains them nothing."""
    if name == "reference" or not _is_usable(name, device_type, dtype, "mlp"):
        return False
    if name == "triton":
        return device_type != "cpu"
    key = "CPU" if device_type == "cpu" else "CUDA"
    return (dtype == torch.float32 or key == "CUDA") and (
        torch._C._dispatch_has_kernel_for_dispatch_key("fusedmlp::mlp_fwd.native", key)
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
    for name, size in (
        ("rows", rows),
        ("in_features", in_features),
        ("out_features", out_features),
    ):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"explain: {name} must be an int, got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"explain: {name} must be >= 0, got {size}")
    if dtype not in dtypes.SUPPORTED:
        raise TypeError(f"explain: dtype must be fp32, fp16, bf16 or fp64, got {dtype}")
    device_type = torch.device(device).type
    named = explicit(backend)
    refusals = {b.name: b.refuses(device_type, dtype) for b in BACKENDS}
    refusals = {name: reasons for name, reasons in refusals.items() if reasons}
    size = (
        f"{rows} x {in_features} x {out_features}"
        if op == "linear_act"
        else f"{rows} x {out_features}"
    )
    call = f"{size}, {activation}, p = {p:g}, {dtypes.SHORT[dtype]}, {device_type}"
    if named is not None:
        if named in refusals:
            return Explanation(op, call, "nothing", f"{named!r} was asked for and raises", refusals)
        return Explanation(op, call, named, "it was asked for by name", {})
    choice = select(op, device_type, dtype, act, dropout, rows, in_features, out_features)
    k = in_features if op == "linear_act" else 0
    first = policy.choose(
        device_type, op, dtype, act, dropout, rows, k, out_features, torch.is_grad_enabled()
    )[0]
    why = policy.why(choice, first, act, device_type)
    if choice in refusals:
        refusals.pop(choice)
    return Explanation(op, call, choice, why, refusals)
