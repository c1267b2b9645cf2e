"""What makes a trace of a forward wrong: found while it is made (Watch), or later (Seen).

torch.fx runs a forward once, on stand-ins for its inputs, and keeps the tensor operations. All else
that the code does or reads is frozen or lost; here it is refused, or remembered and compared.
"""

from __future__ import annotations

import dis
import functools
import inspect
import os
import random
import sys
import weakref

import torch
from torch import Tensor, fx, nn

from ... import compat

_MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_STDLIB, _TORCH, _TRACING = (
    os.path.dirname(f) for f in (os.__file__, torch.__file__, os.path.abspath(__file__))
)
_PACKAGE = os.path.dirname(_TRACING)
# What a stand-in answers otherwise than a tensor would, and what happens only while tracing.
_REFUSED_CALLS = {
    "isinstance": "asks for the type of something",
    "type": "asks for the type of something",
    "is_tensor": "asks for the type of something",
    "is_grad_enabled": "asks for the grad mode",
    "is_inference_mode_enabled": "asks for the grad mode",
    "set_grad_enabled": "sets the grad mode",
    "is_autocast_enabled": "asks for autocast",
    "print": "prints",
    "vars": "looks at all its attributes",
    "__dict__": "looks at all its attributes",
}


class Untraceable(Exception):
    """The reason, in words for a report."""


@functools.cache
def required_arguments(forward) -> list[str]:
    """Names of the arguments of a forward that have no default, without self."""
    if hasattr(forward, "__wrapped__"):
        raise Untraceable("its forward is decorated")
    _, *parameters = inspect.signature(forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty]
    for p in needed:
        if p.kind is p.KEYWORD_ONLY:
            raise Untraceable(f"its argument {p.name} has no default and no position")
    return [p.name for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


class Watch:
    """Around one trace: what the user's code does that no graph holds.

    user_code  code object -> its globals, for all Python functions outside of torch that ran
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.user_code: dict = {}
        self._proxies: list = []
        self._modes: tuple = ()

    def trace(self, tracer: fx.Tracer) -> fx.Graph:
        """The graph of the module; Untraceable where it would not be the module's forward."""
        contents, random_states = _contents(self.module), _random_states()
        profile = sys.getprofile()
        try:
            with torch.enable_grad():
                self._modes = _modes()
                sys.setprofile(self._see)
                graph = tracer.trace(self.module)
        finally:
            sys.setprofile(profile)
            changed = _contents(self.module) != contents
            if changed:
                _restore(contents)
            drew = _set_back(random_states)
        if changed:
            raise Untraceable("its forward changes the module's attributes")
        if drew:
            raise Untraceable("its forward draws random numbers that do not come from its input")
        self._check_code()
        if any(proxy() is not None for proxy in self._proxies):
            raise Untraceable("its forward keeps a tensor in something outside of it")
        return graph

    def _see(self, frame, event, arg) -> None:
        code = frame.f_code
        if event == "call" and code not in self.user_code and _is_users(code.co_filename):
            self.user_code[code] = frame.f_globals

    def kept(self, proxy: fx.Proxy) -> fx.Proxy:
        if proxy.node.op != "get_attr":  # those are in a cache of torch.fx
            self._proxies.append(weakref.ref(proxy))
        return proxy

    def check_modes(self) -> None:
        if _modes() != self._modes:
            raise Untraceable("its forward switches grad mode or autocast")

    def check_constant(self, a, root: nn.Module) -> None:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            owned = [*root.buffers(), *(m for m in vars(root).values() if isinstance(m, Tensor))]
            if not any(a is t for t in owned):
                raise Untraceable("its forward makes a tensor that does not come from its input")

    def _check_code(self) -> None:
        for code in self.user_code:
            for name, what in _REFUSED_CALLS.items():
                if name in code.co_names:
                    raise Untraceable(f"its forward {what} ({name} in {code.co_name})")
            if any(i.opname in ("BEFORE_WITH", "LOAD_SPECIAL") for i in dis.get_instructions(code)):
                raise Untraceable(f"its forward has a with block (in {code.co_name})")


def _is_users(filename: str) -> bool:
    if filename.startswith((_TORCH, _PACKAGE, "<frozen")):
        return False
    return not filename.startswith(_STDLIB) or "site-packages" in filename


def _modes() -> tuple:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        compat.is_any_autocast_enabled(),
    )


def _random_states() -> tuple:
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state(legacy=False) if numpy is not None else None
    return torch.get_rng_state(), random.getstate(), drawn


def _set_back(before: tuple) -> bool:
    """Puts the generators back; True if one of them was used."""
    now = _random_states()
    used = (
        not torch.equal(now[0], before[0]) or now[1] != before[1] or repr(now[2]) != repr(before[2])
    )
    if used:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        if before[2] is not None:
            sys.modules["numpy"].random.set_state(before[2])
    return used


class _Is:
    """Equal only to the very same object; keeps it, so that no other gets its place."""

    __slots__ = ("obj",)

    def __init__(self, obj):
        self.obj = obj

    def __eq__(self, other) -> bool:
        return isinstance(other, _Is) and other.obj is self.obj

    __hash__ = None


def _contents(module: nn.Module) -> list:
    """The attributes of a module, and what is in the lists and dicts among them."""
    owners = [vars(module), *(v for v in vars(module).values() if type(v) in (list, dict))]
    return [
        (_Is(o), [*map(_Is, o)], [*map(_Is, o.values())] if type(o) is dict else []) for o in owners
    ]


def _restore(contents: list) -> None:
    for owner, items, values in contents:
        owner.obj.clear()
        if values:
            owner.obj.update((k.obj, v.obj) for k, v in zip(items, values, strict=True))
        elif type(owner.obj) is list:
            owner.obj.extend(i.obj for i in items)


def _frozen(value, names: set[str], depth: int = 2):
    """Something that is equal later only if the code with these names would read the same."""
    if type(value) in _PLAIN:
        return type(value), value
    if depth and type(value) in (list, tuple):
        return type(value), [_frozen(v, names, depth - 1) for v in value]
    if depth and type(value) is dict:
        return [
            (_Is(k) if type(k) not in _PLAIN else k, _frozen(v, names, depth - 1))
            for k, v in value.items()
        ]
    if depth and hasattr(value, "__dict__") and not isinstance(value, Tensor | nn.Module | type):
        inside = vars(value)
        read = [(k, _frozen(inside[k], names, depth - 1)) for k in sorted(names & inside.keys())]
        return _Is(value), read
    return _Is(value)


class Seen:
    """What the forward of a module read when it was traced, besides its inputs.

    holds(module) is True as long as all of that is the same: mode; children, by identity; by the
    names in the code that ran, attributes of the module and of objects among them
    (self.config.p), and numbers among globals and class attributes.
    """

    def __init__(self, module: nn.Module, user_code: dict):
        d, cls = vars(module), type(module)
        names = {n for code in user_code for n in code.co_names} - {"training"}
        if names & {"getattr", "hasattr"}:
            # Which attributes it reads may be decided by strings.
            names |= {k for k in d if not k.startswith("_")} - {"training"}
        self.training = module.training
        self.children = _children(module)
        self.names = names
        self.attributes = [(n, _frozen(d[n], names)) for n in sorted(names & d.keys())]
        self.own_numbers = [(n, d[n]) for n in sorted(names & d.keys()) if type(d[n]) in _PLAIN]
        self.own_children = [*module._modules.items()]
        self.absent = frozenset(names - d.keys())
        self.numbers = [
            (g, n, g[n])
            for code, g in [*user_code.items()]
            for n in code.co_names
            if type(g.get(n, _MISSING)) in _PLAIN
        ]
        self.class_numbers = [
            (n, getattr(cls, n)) for n in self.absent if type(getattr(cls, n, _MISSING)) in _PLAIN
        ]

    def holds(self, module: nn.Module) -> bool:
        d = module.__dict__
        if self.training != d["training"] or not self.absent.isdisjoint(d):
            return False
        for g, name, number in self.numbers:
            if _differs(g.get(name, _MISSING), number):
                return False
        for name, number in self.class_numbers:
            if _differs(getattr(type(module), name, _MISSING), number):
                return False
        for name, value in self.attributes:
            if name not in d or _frozen(d[name], self.names) != value:
                return False
        return _children(module) == self.children

    def holds_compiled(self, module: nn.Module) -> bool:
        """What of holds() Dynamo can follow, and guards: mode, children, numbers of the module."""
        if module.training != self.training:
            return False
        for name, number in self.own_numbers:
            if getattr(module, name, None) != number:
                return False
        return all(module._modules.get(name) is child for name, child in self.own_children)


def _differs(value, number) -> bool:
    return value is not number and (type(value) is not type(number) or value != number)


def _children(module: nn.Module) -> list:
    """The children, and theirs where a child is a container that code may look into."""
    found = [*module._modules.items()]
    for _, child in module._modules.items():
        if isinstance(child, _CONTAINERS):
            found += _children(child)
    return found
