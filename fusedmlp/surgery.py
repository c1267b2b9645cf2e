"""fuse and unfuse: every nn.Sequential of a model becomes a FusedSequential, and back.

Children are never copied or changed: parameters, hooks, optimisers and initialisers written for the
plain model work on. Does not look at what is inside a container; nn/stretches.py does, in each call.
"""

from __future__ import annotations

import types
import weakref

import torch
from torch import nn

from .nn import FusedMLP, FusedSequential
from .nn.report import Report, of, why_left_alone
from .nn.stretches import is_fused_module

# Wrappers that are bound to the very module that they were given.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


def fuse(module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with every nn.Sequential in it, at any depth, as a FusedSequential.

    Same values, gradients and state_dict; dropout masks are this package's. The children of a
    container are the same objects as before, and so are all parameters, buffers and hooks: an
    optimiser or an initialiser written for the plain model goes on working. What cannot be fused
    runs as it is; `.report()` of the result says what is fused, what is not and why.

    module   any nn.Module; fuse it before wrapping (DDP) or compiling it
    inplace  False: new containers around the same children, the argument stays as it is. A module
             that has an nn.Sequential somewhere below is copied too, but for its attributes: the
             copy shares parameters, buffers and hooks with the original.
             True: the containers themselves change their class, and `module` is returned
    returns  a module of the same class, or a FusedSequential for an nn.Sequential
    raises   TypeError if it is no module; ValueError for a wrapped or compiled one, if not inplace

    Left alone: subclasses of nn.Sequential (what is inside them is looked at), and Linear layers
    outside of any nn.Sequential. If what follows writes into the result of a fused container
    (`out += x`), write `out = out + x`.
    """
    fused = _convert("fuse", module, inplace, _to_fused)
    number_layers(fused)
    if "report" not in fused.__dict__ and not hasattr(type(fused), "report"):
        fused.report = _Reporter(fused)
    return fused


def unfuse(module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The inverse of `fuse`: every FusedSequential and FusedMLP becomes an nn.Sequential.

    Children, keys, parameters and hooks stay, as in `fuse`; same arguments and errors. FusedLinear
    and FusedDropout are layers of their own, not containers, and stay what they are.
    """
    plain = _convert("unfuse", module, inplace, _to_plain)
    for m in plain.modules():
        if isinstance(m.__dict__.get("report"), _Reporter):
            del m.__dict__["report"]
    return plain


def report(module: nn.Module) -> Report:
    """What of a model runs as one op, what does not, and why. Print it."""
    _check("report", module)
    return of(module)


def number_layers(module: nn.Module, first_layer: int = 0) -> int:
    """Gives every fused container of a model layer numbers of its own; `fuse` does it.

    Inside `dropout_state` two containers with the same numbers have equal masks. Those made by hand
    and put into one model start at 0 each, until this is called.

    returns  the number after the last one: how far the stream may be advanced for the next step
    """
    _check("number_layers", module)
    inside = set()
    for m in module.modules():
        if not is_fused_module(m) or id(m) in inside:
            continue
        m.first_layer = first_layer
        first_layer += m.layer_count()
        inside.update(_number_inside(m))
    return first_layer
