"""How a container's present children are run, found out in one call and kept for the next.

A call records a program for inputs like its own; later ones follow it as long as the children are
what they were. Does not know how a step is run (runner.py).
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor, nn

from .. import context
from ..backends import registry
from . import runner
from .groups import find, is_candidate, is_tampered
from .masks import Masks, must_trace

_HOOKS = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
# Plain attributes that decide what a module of a known class computes.
_SETTINGS = ("inplace", "approximate", "negative_slope", "alpha", "beta", "threshold")
_PROGRAMS = 8  # kept at once: training and evaluation, whole and last batches


class Program:
    """The steps for inputs of one kind.

    key        what the inputs and the settings were like
    functions  all steps, where each is a function of its input alone; else None
    steps      callables of (input, masks)
    layers     layer numbers that it takes
    """

    __slots__ = ("functions", "key", "layers", "steps")

    def __init__(self, key: tuple, steps: list[tuple[bool, Callable]], layers: int):
        self.key, self.layers = key, layers
        plain = not any(with_masks for with_masks, _ in steps)
        self.functions = [call for _, call in steps] if plain else None
        self.steps = steps

    def follow(self, x, masks: Masks):
        layer = masks.layer
        for with_masks, step in self.steps:
            x = step(x, masks) if with_masks else step(x)
        masks.layer = layer + self.layers
        return x


def _number(p) -> float:
    """A tensor can be changed in place."""
    return p if type(p) is float else float(p)


class Plan:
    """The children as they were found, and the programs recorded for them."""

    __slots__ = (
        "children",
        "dropouts",
        "items",
        "last",
        "others",
        "programs",
        "settings",
        "watched",
    )

    def __init__(self, children: list[nn.Module]):
        self.children = children
        self.items = find(children)
        self.dropouts = [m for m in children if type(m) is nn.Dropout]
        present = [m for m in dict.fromkeys(children) if m is not None]
        self.watched = [
            (m, type(m), m.__dict__, is_tampered(m)) for m in present if is_candidate(m)
        ]
        self.others = [(m, type(m)) for m in present if not is_candidate(m)]
        self.settings = [
            (m.__dict__, name, m.__dict__[name])
            for m in present
            for name in _SETTINGS
            if name in m.__dict__
        ]
        self.programs: dict[tuple, Program] = {}
        self.last: Program | None = None

    def is_stale(self) -> bool:
        """True if a child is no longer what it was when its stretch was found."""
        for m, cls, d, tampered in self.watched:
            if type(m) is not cls:
                return True
            if (
                tampered or any(_HOOKS(d)) or "forward" in d or "_compiled_call_impl" in d
            ) and tampered is not is_tampered(m):
                return True
        for m, cls in self.others:
            if type(m) is not cls:
                return True
        for d, name, value in self.settings:
            if d.get(name) is not value and d.get(name) != value:
                return True
        return False

    def key(self, x: Tensor, layer: int, named: str | None) -> tuple:
        """What decides how x is run, besides what is_stale looks at."""
        return (
            x.shape,
            x.dtype,
            x.device,
            torch.is_grad_enabled(),
            named,
            tuple([_number(m.p) if m.training else 0 for m in self.dropouts]),
            layer,
        )

    @staticmethod
    def _is_plain(x) -> bool:
        """Whether a program may be recorded or followed for x: its key says all about it."""
        return type(x) is Tensor and x.layout is torch.strided and not x.is_nested

    def run(self, x, first_layer: int, settings: context.Settings | None):
        """The forward of the container, as the outermost fused module."""
        settings = context.now() if settings is None else settings
        if self._is_plain(x):
            program, named = self.last, registry.named_in(settings)
            if program is not None and program.key == self.key(x, first_layer, named):
                if program.functions is not None:
                    for function in program.functions:
                        x = function(x)
                    return x
                if not must_trace():
                    return program.follow(x, Masks(first_layer, False, settings))
        return self.run_with(x, Masks(first_layer, must_trace(), settings))

    def run_with(self, x, masks: Masks):
        """The same with the masks of the container around."""
        if masks.traced or not self._is_plain(x):
            return runner.run(self.items, x, masks)
        key = self.key(x, masks.layer, masks.named)
        program = self.programs.get(key)
        if program is not None:
            self.last = program
            return program.follow(x, masks)
        steps, first = [], masks.layer
        x = runner.run(self.items, x, masks, steps)
        if len(self.programs) == _PROGRAMS:
            self.programs.clear()
        self.last = self.programs[key] = Program(key, steps, masks.layer - first)
        return x
