"""Fusing what is written as code: fuse(model, trace=True)."""

from .modules import TracedForward, class_of, why_not

__all__ = ["TracedForward", "class_of", "why_not"]
