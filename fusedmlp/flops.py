"""FLOP formulas of the ops for torch.utils.flop_counter: those of the matrix products, as there.

That module costs 0.4 s and Triton to import, so it is not imported here: the formulas are added
when something else imports it.
"""

from __future__ import annotations

import importlib.abc
import sys
from math import prod

import torch

from .spec import layers

_COUNTER = "torch.utils.flop_counter"

# The counter calls a formula with shapes in the place of tensors.


def _elementwise(*shapes, **_) -> int:
    return 0


def _linear_act(x, w, *rest, **_) -> int:
    return 2 * prod(x) * w[0]


def _products(x, params, ints, numbers) -> list[int]:
    """x w^T of each layer."""
    rows = prod(x[:-1])
    return [2 * rows * prod(w) for w, _ in layers.unpack(params, ints, numbers, None, 0)]


def _mlp_fwd(x, params, state, ints, numbers, *rest, **_) -> int:
    return sum(_products(x, params, ints, numbers))


def _mlp_bwd(dy, x, params, state, ys, hs, ints, numbers, row_offset, needs, need_dx, **_) -> int:
    total, need_below = 0, need_dx
    for product, need in zip(_products(x, params, ints, numbers), needs, strict=True):
        total += product * (bool(need & layers.W) + need_below)
        need_below = need_below or need != 0
    return total


FORMULAS = {
    "linear_act_fwd": _linear_act,
    "linear_act_infer": _linear_act,
    "bias_act_dropout_fwd": _elementwise,
    "bias_act_dropout_bwd": _elementwise,
    "mlp_fwd": _mlp_fwd,
    "mlp_bwd": _mlp_bwd,
    "cross_entropy": _elementwise,
}


def _add_to(counter) -> None:
    for op, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.fusedmlp, op))(formula)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the counter as the other finders do, and adds the formulas once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        others = (f.find_spec for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next(filter(None, (find(name, path, target) for find in others)), None)
        if spec is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                _add_to(module)

            spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Adds the formulas to PyTorch's counter, now or when it is imported."""
    if _COUNTER in sys.modules:
        _add_to(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())
