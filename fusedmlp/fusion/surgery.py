"""fuse makes every nn.Sequential of a model a FusedSequential; unfuse leaves plain modules only.

Children of containers are never copied or changed: parameters, hooks, optimisers and initialisers
written for the plain model work on. Does not look at what is inside a container; nn/groups.py
does, in every call.
"""

from __future__ import annotations

import types
import warnings

import torch
from torch import nn

from .. import compat
from ..nn import FusedDropout, FusedLinear, FusedSequential
from ..nn.groups import LayerGroup, find_groups, is_fused_module, reasons_against_container
from ..nn.modules import ColumnPReLU
from ..nn.sequential import activation_module
from ..spec import activations, checks

# Wrappers stay bound to the very module that they were given: a copy would not be fused.
_WRAPPERS = frozenset(
    {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule"}
)


def fuse(module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with every nn.Sequential in it, at any depth, as a FusedSequential.

    Same values, gradients and state_dict; dropout masks are this package's. The children of a
    container are the same objects as before, and so are all parameters, buffers and hooks: an
    optimiser or an initialiser written for the plain model goes on working. What cannot be fused
    runs as it is; `fusedmlp.report` says what is fused, what is not and why.

    module   any nn.Module; fuse it before wrapping (DDP) or compiling it
    inplace  False: new containers around the same children, the argument stays as it is. A module
             that has an nn.Sequential somewhere below is copied too, but for its attributes: the
             copy shares parameters, buffers and hooks with the original.
             True: the containers themselves change their class, and `module` is returned
    returns  a module of the same class, or a FusedSequential for an nn.Sequential
    raises   TypeError if it is no module; ValueError for a wrapped or compiled one, if not inplace

    Left alone: subclasses of nn.Sequential (what is inside them is looked at), and what a class has
    as code, `F.relu(self.fc1(x))`: torch.compile(model, backend=fusedmlp.compile_backend) fuses
    that. A UserWarning says so where nothing was fused. If what follows writes into the result of a
    fused container (`out += x`), write `out = out + x`.
    """
    fused = _convert("fuse", module, inplace, _to_fused)
    if not any(map(is_fused_module, fused.modules())) and (hint := hint_on_code(fused)):
        warnings.warn(f"fuse: nothing in {type(module).__name__} was fused; {hint}", stacklevel=2)
    _number(fused, 0, leaves=False)
    return fused


def hint_on_code(module: nn.Module) -> str:
    """What fuses the Linear layers that code calls, which are no children of an nn.Sequential.

    '' where there are none, or where the module is compiled already.
    """
    owners = [m for m in module.modules() if not isinstance(m, nn.Sequential)]
    found = any(type(child) is nn.Linear for m in owners for child in m.children())
    if not found or is_compiled(module):
        return ""
    # Under Dynamo the ops of a fused module cost more than they gain.
    plain = "fusedmlp.unfuse(model)" if any(map(is_fused_module, module.modules())) else "model"
    return (
        f"torch.compile({plain}, backend=fusedmlp.compile_backend), or "
        f"{plain}.compile(backend=fusedmlp.compile_backend), fuses what is written as code"
    )


def is_compiled(module: nn.Module) -> bool:
    """True for what torch.compile gave, and where module.compile() was called."""
    return type(module).__name__ == "OptimizedModule" or compat.is_compiled(module)


def unfuse(module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model without this package: plain modules of the same values and parameters.

    FusedSequential, FusedMLP  nn.Sequential of the same children
    FusedLinear                nn.Sequential(nn.Linear, activation, nn.Dropout), without those that
                               do nothing; if only the nn.Linear is left, that itself
    FusedDropout               nn.Dropout

    ReLUSquared stays, and a prelu with a slope for each column becomes nn.layers.ColumnPReLU: torch
    has no such modules, and these are made of its functions.

    Parameters and hooks stay the same objects, as in `fuse`; same arguments and errors. Keys stay
    but for those of a FusedLinear with an activation or dropout, 'fc.weight' becomes 'fc.0.weight':
    load a checkpoint before. Masks are PyTorch's.

    raises  ValueError for a FusedLinear whose parameters are computed (pruned, parametrised), and
            for a subclass of these classes that has a forward of its own
    """
    return _convert("unfuse", module, inplace, _to_plain)


def assign_streams(module: nn.Module, first: int = 0) -> int:
    """Gives each fused layer of a model a stream offset of its own, in the order of `modules()`.

    Inside `dropout_state` two fused modules with the same offsets have equal masks. `fuse` assigns
    offsets to the containers that it makes; those made by hand, FusedLinear and FusedDropout start
    at 0 each until this is called.

    first    int64, of the first layer
    returns  the offset after the last one: how far the stream may be advanced for the next step
    """
    checks.module("assign_streams", module)
    return _number(module, checks.int64("assign_streams", "first", first), leaves=True)


def _number(module: nn.Module, first: int, leaves: bool) -> int:
    seen: set[int] = set()

    def number(m: nn.Module, first: int) -> int:
        """As MaskState counts in one forward of m."""
        seen.add(id(m))
        if leaves or isinstance(m, FusedSequential):
            m.stream_offset = first
        if not isinstance(m, FusedSequential):
            return first + m._layer_count()
        for group in find_groups(list(m._modules.values())):
            if type(group) is LayerGroup:
                first += 1
            elif group.layers:
                first = number(group.module, first)
        return first

    for m in module.modules():
        if is_fused_module(m) and id(m) not in seen:
            if leaves or isinstance(m, FusedSequential):
                first = number(m, first)
    return first


def _to_fused(m: nn.Module) -> type | None:
    """The class that m gets, or None where it stays what it is."""
    if isinstance(m, FusedSequential):
        return type(m)
    if type(m) is nn.Sequential and not reasons_against_container(m):
        return FusedSequential
    return None


def _to_plain(m: nn.Module) -> type | None:
    if not isinstance(m, FusedSequential | FusedLinear | FusedDropout):
        return None
    if not is_fused_module(m) or "forward" in m.__dict__:
        raise ValueError(
            f"unfuse: {type(m).__name__} must have the forward of this package to have a plain "
            "form, got one with a forward of its own; let that hold a fused module instead"
        )
    if isinstance(m, FusedLinear):
        return nn.Linear if m.act == activations.NONE and not m.p else nn.Sequential
    return nn.Dropout if isinstance(m, FusedDropout) else nn.Sequential


def _convert(op: str, module: nn.Module, inplace: bool, new_class) -> nn.Module:
    checks.module(op, module)
    if inplace:
        found = [(m, new_class(m)) for m in module.modules()]
        parts = {id(m): _parts_of(m) for m, cls in found if _leaves_a_layer(m, cls)}
        for m, cls in found:
            if cls is not None:
                _forget(m, type(m), cls)
                m.__class__ = cls
                if id(m) in parts:
                    _take(m, parts[id(m)])
        return module
    return _Copier(op, new_class).copy(module)


def _forget(m: nn.Module, old: type, new: type) -> None:
    """What modules of this package remember; other classes may use these names themselves."""
    if hasattr(old, "_fused_forward"):
        for name in ("_plan", "_chosen"):
            m.__dict__.pop(name, None)
        if not hasattr(new, "_fused_forward"):
            m.__dict__.pop("stream_offset", None)


def _leaves_a_layer(m: nn.Module, cls: type | None) -> bool:
    return isinstance(m, FusedLinear) and cls is not None and not issubclass(cls, FusedLinear)


def _parts_of(layer: FusedLinear) -> list[nn.Module]:
    """nn.Linear, activation and nn.Dropout with the parameters of a FusedLinear."""
    own = layer._parameters
    if layer._modules or not {"weight", "bias", "slope"} <= own.keys():
        raise ValueError(
            "unfuse: a FusedLinear must have its weight, bias and slope as parameters, got one in "
            "which they are computed; make that permanent before "
            "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove)"
        )
    linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    linear.weight, linear.bias = own["weight"], own["bias"]
    parts = [linear]
    if layer.act == activations.PRELU and own["slope"].numel() > 1:
        parts.append(ColumnPReLU(own["slope"]))
    elif layer.act != activations.NONE:
        parts.append(activation_module(layer.act, "meta", None))
        if layer.act == activations.PRELU:
            parts[-1].weight = own["slope"]
        elif layer.act == activations.LEAKY_RELU:
            parts[-1].negative_slope = layer.negative_slope
    if layer.p:
        parts.append(nn.Dropout(layer.p))
    for part in parts:
        part.training = layer.training
    return parts


_OF_FUSED_LINEAR = ("act", "p", "negative_slope", "initial_slope")


def _take(m: nn.Module, parts: list[nn.Module]) -> None:
    """m, which was a FusedLinear and is an nn.Linear or nn.Sequential now, gets what that has."""
    if type(m) is nn.Linear:
        (linear,) = parts
        names, m._parameters = _OF_FUSED_LINEAR, linear._parameters
    else:
        names, m._parameters = (*_OF_FUSED_LINEAR, "in_features", "out_features"), {}
        m._modules = {str(i): part for i, part in enumerate(parts)}
    for name in names:
        del m.__dict__[name]


class _Copier:
    """Copies the containers of a model, and what holds them; shares everything else."""

    def __init__(self, op: str, new_class):
        self.op, self.new_class = op, new_class
        self.copies: dict[int, nn.Module] = {}  # id of the original -> what stands for it

    def copy(self, root: nn.Module) -> nn.Module:
        if isinstance(root, torch.jit.ScriptModule):
            return root
        result = self._copy(root, is_root=True)
        for new in {id(m): m for m in self.copies.values()}.values():
            if id(new) not in self.copies:
                self._redirect(new)
        return result

    def _copy(self, m: nn.Module | None, is_root: bool = False) -> nn.Module | None:
        if m is None:
            return None
        if id(m) in self.copies:
            return self.copies[id(m)]
        if not is_root and all(self.new_class(inner) is None for inner in m.modules()):
            self.copies[id(m)] = m
            return m
        self._refuse_bound(m)
        cls = self.new_class(m) or type(m)
        # Not copy.copy: a class may define what that does, DDP for one.
        new = object.__new__(cls)
        self.copies[id(m)] = new
        new.__dict__.update(m.__dict__)
        _forget(new, type(m), cls)
        modules = type(m._modules)()
        for key, child in m._modules.items():
            modules[key] = self._copy(child)
        new.__dict__["_modules"] = modules
        if _leaves_a_layer(m, cls):
            _take(new, _parts_of(m))
        return new

    def _refuse_bound(self, m: nn.Module) -> None:
        name = next((c.__name__ for c in type(m).__mro__ if c.__name__ in _WRAPPERS), None)
        if name is None and compat.is_compiled(m):
            name = f"compiled {type(m).__name__}"
        if name is not None:
            raise ValueError(
                f"{self.op}: module must be a model that is not wrapped or compiled yet, got a "
                f"{name}; {self.op} it before that, or with inplace=True"
            )

    def _redirect(self, new: nn.Module) -> None:
        """Attributes that name a copied module, directly or in a list, name its copy."""
        for key, value in list(new.__dict__.items()):
            if key != "_modules":
                changed = self._changed(value)
                if changed is not value:
                    new.__dict__[key] = changed

    def _changed(self, value: object, deep: bool = True) -> object:
        if isinstance(value, nn.Module):
            return self.copies.get(id(value), value)
        if isinstance(value, types.MethodType) and id(value.__self__) in self.copies:
            return types.MethodType(value.__func__, self.copies[id(value.__self__)])
        if deep and type(value) in (list, tuple):
            changed = [self._changed(v, False) for v in value]
            if any(a is not b for a, b in zip(changed, value, strict=True)):
                return type(value)(changed)
        if deep and type(value) is dict:
            changed = {k: self._changed(v, False) for k, v in value.items()}
            if any(changed[k] is not v for k, v in value.items()):
                return changed
        return value
