"""The backends: which there are, what each can run, and which one the user has named.

argument `backend=` > `use_backend(...)` > FUSEDMLP_BACKEND > automatic choice (choice.py). A named
backend works or raises BackendError with every reason. Only automatic choice passes a backend
over, and logs why, once per (op, backend, reason). No backend is imported until it is chosen.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import compat, context, environment
from ..spec import dtypes

log = logging.getLogger("fusedmlp")

# Plain PyTorch, unfused and with PyTorch's own autograd: a candidate of automatic choice only.
EAGER = "eager"


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run the call; the message holds every reason."""


@dataclass(frozen=True)
class Backend:
    """One entry of the registry.

    unavailable  device type -> why nothing of it runs on that device here, or None; cached
    dtypes       the dtypes its kernels take
    missing      (device type, dtype, op or None) -> what of its kernels this call would need and
                 is not there, or None; asked where the rest is all right
    """

    name: str
    unavailable: Callable[[str], str | None]
    dtypes: tuple[torch.dtype, ...]
    missing: Callable[[str, torch.dtype, str | None], str | None] = lambda *call: None

    def reasons_against(
        self, device_type: str, dtype: torch.dtype, op: str | None = None
    ) -> list[str]:
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
    from . import native

    return native.unavailable(device_type)


def _native_missing(device_type: str, dtype: torch.dtype, op: str | None) -> str | None:
    if op == "cross_entropy" and not compat.has_kernel(
        f"fusedmlp::{op}.native", device_type.upper()
    ):
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
    if importlib.util.find_spec("fusedmlp.backends.triton.linear_act") is None:
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
    Backend("native", _native_unavailable, dtypes.KERNEL, _native_missing),
    Backend("triton", _triton_unavailable, dtypes.KERNEL),
    Backend("reference", lambda device: None, dtypes.SUPPORTED),
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


def list_backends() -> tuple[str, ...]:
    """The names of all backends, in the order in which automatic choice looks at them."""
    return tuple(_BY_NAME)


@functools.cache
def log_once(message: str) -> None:
    """Logs a message at INFO the first time that it is said."""
    log.info("%s", message)


_usable: dict[tuple[str, str, torch.dtype, str], bool] = {}


def is_usable(name: str, device_type: str, dtype: torch.dtype, op: str) -> bool:
    """Whether a backend can run `op` there; each reason why not is logged once."""
    key = (name, device_type, dtype, op)
    found = _usable.get(key)
    if found is None:
        reasons = _BY_NAME[name].reasons_against(device_type, dtype, op)
        for reason in reasons:
            log_once(f"{op}: backend {name!r} was passed over: {reason}")
        found = _usable[key] = not reasons
    return found


def require(name: str, device_type: str, dtype: torch.dtype, op: str) -> str:
    """`name`, or BackendError with every reason why it cannot run `op` there."""
    if not _usable.get((name, device_type, dtype, op)):
        reasons = _BY_NAME[_known(name, op)].reasons_against(device_type, dtype, op)
        if reasons:
            lines = "\n    ".join(reasons)
            raise BackendError(
                f"{op}: backend {name!r} was asked for but cannot be used:\n    {lines}"
            )
        _usable[name, device_type, dtype, op] = True
    return name


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
