"""Plain modules as functions: what their forward comes to, without its searches for attributes.

A function is right as long as plan.py finds its module unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FUNCTIONS = {nn.Tanh: torch.tanh, nn.Sigmoid: torch.sigmoid}


def function(m: nn.Module) -> Callable[[Tensor], Tensor]:
    """m, which is of an exact class that groups.py knows and has no hooks, as a function."""
    cls = type(m)
    if cls is nn.Linear:
        return _linear(m)
    if cls is nn.ReLU:
        return torch.relu_ if m.inplace else torch.relu
    return _FUNCTIONS.get(cls, m.forward)


def _linear(m: nn.Linear) -> Callable[[Tensor], Tensor]:
    own, linear = m._parameters, F.linear

    def call(x: Tensor) -> Tensor:
        try:
            w, b = own["weight"], own["bias"]
        except KeyError:
            # Something has put a plain attribute in the place of a parameter.
            return m(x)
        return linear(x, w, b)

    return call
