"""Fusing what is written as code: fuse(model, trace=True) and compile_backend."""

from ..compile import compile_backend
from .modules import TracedForward, class_of, why_not

__all__ = ["TracedForward", "class_of", "compile_backend", "why_not"]
