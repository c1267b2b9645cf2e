"""How a container runs its present children: found out in one call, kept, and replayed.

A call records a program for inputs like its own; later calls replay it as long as the children are
what they were. What a step is stands in steps.py, which children form a group in groups.py.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor, nn

from .. import context
from ..backends import registry
from .groups import Opaque, find_groups, is_candidate, is_tampered
from .mask_state import MaskState, must_trace
from .steps import GroupStep, MlpStep, as_function, network_steps, plain_functions

_HOOKS = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
# Plain attributes that decide what a module of a known class computes.
_SETTINGS = ("inplace", "approximate", "negative_slope", "alpha", "beta", "threshold")
_MAX_PROGRAMS = 8  # kept at once: training and evaluation, whole and last batches


def run_groups(groups: list, x, masks: MaskState, steps: list | None = None):
    """The groups one after the other; each goes to `steps`, as (takes masks, callable)."""
    at = 0
    while at < len(groups):
        group, offset = groups[at], masks.stream_offset
        at += 1
        if type(group) is Opaque:
            x = _run_opaque(group, x, masks, steps)
            continue
        found = [] if masks.traced else network_steps(groups, at - 1, x, masks)
        count = len(found[0].groups) if found and type(found[0]) is MlpStep else len(found)
        at += max(1, count) - 1
        masks.take(max(1, count))
        for step in found or [GroupStep(group, offset)]:
            x = step(x, masks)
            if steps is not None:
                steps.append((step.backend is not None, step))
    return x


def _run_opaque(group: Opaque, x, masks: MaskState, steps: list | None):
    module, offset = group.module, masks.stream_offset
    if not group.fused:
        masks.take(group.layers)
        if steps is not None:
            steps.append((False, as_function(module)))
        return module(x)

    def step(x, masks: MaskState):
        masks.stream_offset = offset
        return module._run_fused(x, masks)

    if steps is not None:
        steps.append((True, step))
    return module._run_fused(x, masks)


class Program:
    """The steps for inputs of one kind.

    key        what the inputs and the settings were like
    steps      (takes masks, callable of the input and perhaps the masks)
    functions  the callables, where none takes masks; else None
    layers     stream offsets that it takes
    """

    __slots__ = ("functions", "key", "layers", "steps")

    def __init__(self, key: tuple, steps: list[tuple[bool, Callable]], layers: int):
        self.key, self.steps, self.layers = key, [], layers
        for takes_masks, step in steps:
            if takes_masks or type(step) is not GroupStep:
                self.steps.append((takes_masks, step))
            else:
                self.steps += [(False, call) for call in plain_functions(step.group.modules)]
        plain = not any(takes_masks for takes_masks, _ in self.steps)
        self.functions = [call for _, call in self.steps] if plain else None

    def replay(self, x, masks: MaskState):
        offset = masks.stream_offset
        for takes_masks, step in self.steps:
            x = step(x, masks) if takes_masks else step(x)
        masks.stream_offset = offset + self.layers
        return x


def _number(p) -> float:
    """A tensor can be changed in place."""
    return p if type(p) is float else float(p)


class Plan:
    """The children as they were found, and the programs recorded for them."""

    __slots__ = (
        "children",
        "dropouts",
        "groups",
        "last",
        "others",
        "programs",
        "settings",
        "watched",
    )

    def __init__(self, children: list[nn.Module]):
        self.children = children
        self.groups = find_groups(children)
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
        """True if a child is no longer what it was when its group was found."""
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

    def key(self, x: Tensor, stream_offset: int, named: str | None) -> tuple:
        """What decides how x is run, besides what is_stale looks at."""
        return (
            x.shape,
            x.dtype,
            x.device,
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            named,
            tuple([_number(m.p) if m.training else 0 for m in self.dropouts]),
            stream_offset,
        )

    @staticmethod
    def _is_plain(x) -> bool:
        """Whether a program may be recorded or replayed for x: its key says all about it."""
        return type(x) is Tensor and x.layout is torch.strided and not x.is_nested

    def run(self, x, stream_offset: int, settings: context.Settings | None):
        """The forward of the container, as the outermost fused module."""
        settings = context.now() if settings is None else settings
        if self._is_plain(x):
            program, named = self.last, registry.named_in(settings)
            if program is not None and program.key == self.key(x, stream_offset, named):
                if program.functions is not None:
                    for function in program.functions:
                        x = function(x)
                    return x
                if not must_trace():
                    return program.replay(x, MaskState(stream_offset, False, settings))
        return self.run_with(x, MaskState(stream_offset, must_trace(), settings))

    def run_with(self, x, masks: MaskState):
        """The same with the masks of the container around."""
        if masks.traced or not self._is_plain(x):
            return run_groups(self.groups, x, masks)
        key = self.key(x, masks.stream_offset, masks.named)
        program = self.programs.get(key)
        if program is not None:
            self.last = program
            return program.replay(x, masks)
        steps, first = [], masks.stream_offset
        x = run_groups(self.groups, x, masks, steps)
        if len(self.programs) == _MAX_PROGRAMS:
            self.programs.clear()
        self.last = self.programs[key] = Program(key, steps, masks.stream_offset - first)
        return x
