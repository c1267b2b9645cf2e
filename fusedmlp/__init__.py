"""fusedmlp: Linear, activation and dropout as one differentiable op, for PyTorch.

Importing this package imports torch and nothing else; a backend is loaded when it is first chosen.
"""

import importlib

from . import functional
from ._version import __version__
from .backends.choice import explain
from .backends.registry import BackendError, list_backends, use_backend
from .functional import dropout_state
from .fusion.compile import compile_backend
from .fusion.report import report
from .fusion.surgery import assign_streams, fuse, unfuse
from .nn import FusedDropout, FusedLinear, FusedMLP, FusedSequential

__all__ = [
    "BackendError",
    "FusedDropout",
    "FusedLinear",
    "FusedMLP",
    "FusedSequential",
    "__version__",
    "assign_streams",
    "compile_backend",
    "dropout_state",
    "explain",
    "functional",
    "fuse",
    "list_backends",
    "report",
    "unfuse",
    "use_backend",
]

_LATER = ("sklearn", "train")  # imported when they are first used: they need packages of the extras


def __getattr__(name: str):
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
