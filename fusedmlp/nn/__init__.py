"""Modules: FusedLinear, FusedDropout, FusedMLP, FusedSequential, ReLUSquared.

Drop-in for PyTorch's modules, with the same keys. Nothing here computes; functional.py does.
"""

from .modules import FusedDropout, FusedLinear, ReLUSquared
from .sequential import FusedMLP, FusedSequential

__all__ = ["FusedDropout", "FusedLinear", "FusedMLP", "FusedSequential", "ReLUSquared"]
