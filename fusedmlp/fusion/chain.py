"""Groups that follow each other in a graph, as one call that takes their tensors as arguments.

A call records which ops run it, for inputs of its kind, and later calls replay that. Dynamo guards
the rest (dtypes, devices, modes), so parameters may be other tensors in every call: networks of one
class share a graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd.mlp import Net
from ..nn.groups import LayerGroup, find_groups
from ..nn.mask_state import MaskState, must_trace
from ..nn.program import run_groups
from ..nn.steps import GroupStep, MlpStep, plain_functions, run_mlp, run_op
from ..spec.layers import Epilogue

_MAX_PROGRAMS = 8  # kept at once, of batch sizes and of what else decides the ops


class Chain:
    """Consecutive groups.

    modules        what they are made of; each has the parameters (None if it lacks one) that a call
                   is to be given, in the order of spec/layers.py
    stream_offset  of the first group
    """

    def __init__(self, modules: list[nn.Module], stream_offset: int):
        self.modules, self.stream_offset = modules, stream_offset
        self.groups = find_groups(modules)
        self.programs: dict[tuple, list[Callable]] = {}

    @property
    def drops(self) -> bool:
        """Whether a mask is drawn."""
        return any(group.dropping() not in (None, (0, 1.0)) for group in self.groups)

    def __call__(self, x: Tensor, masks: MaskState, *params: Tensor) -> Tensor:
        """masks  of the whole forward; params as in spec/layers.py."""
        masks.stream_offset = self.stream_offset
        masks.traced = must_trace()  # here: the graph may switch autocast on
        if masks.traced:
            return run_groups(self._groups_with(params), x, masks)
        key = x.shape, torch.is_grad_enabled(), masks.named
        steps = self.programs.get(key)
        if steps is None:
            return self._record(key, x, masks, params)
        for step in steps:
            x = step(x, masks, params)
        return x

    def in_trace(self, x: Tensor, state: Tensor, *params: Tensor) -> Tensor:
        """The same where another compiler traces the call: state (2,) int64 is an input of it."""
        masks = MaskState(self.stream_offset, True)
        masks.state = state.to(x.device)
        return run_groups(self._groups_with(params), x, masks)

    def _groups_with(self, params: tuple[Tensor, ...]) -> list[LayerGroup]:
        """The groups of modules that have these tensors as their parameters."""
        modules, rest = [], iter(params)
        for m in self.modules:
            if m._parameters:
                m = copy.copy(m)
                own = {name: None if p is None else next(rest) for name, p in m._parameters.items()}
                m.__dict__["_parameters"] = own
            modules.append(m)
        return find_groups(modules)

    def _record(self, key: tuple, x: Tensor, masks: MaskState, params: tuple) -> Tensor:
        recorded, steps, first = [], [], 0
        y = run_groups(self._groups_with(params), x, masks, recorded)
        for _, step in recorded:
            groups = step.groups if type(step) is MlpStep else [step.group]
            count = sum(t is not None for group in groups for t in group.tensors())
            steps.append(_replay(step, slice(first, first + count)))
            first += count
        if len(self.programs) == _MAX_PROGRAMS:
            self.programs.clear()
        self.programs[key] = steps
        return y


def _replay(step: MlpStep | GroupStep, own: slice) -> Callable:
    """What a step does, as a function of x, masks and the params of the chain.

    It keeps no parameter of the call that was recorded.
    """
    if type(step) is MlpStep:
        return _mlp(step.net, step.drops, step.records, own)
    if step.backend is None:
        return _plain(step.group, own)
    return _op(step.backend, step.group, step.stream_offset, own)


def _mlp(net: Net, drops: bool, records: bool, own: slice) -> Callable:
    def mlp(x, masks: MaskState, params: tuple):
        return run_mlp(net, drops, records, x, masks, params[own])

    return mlp


def _op(backend: str, group: LayerGroup, stream_offset: int, own: slice) -> Callable:
    has_w, has_b, _ = (t is not None for t in group.tensors())
    act, alpha, (threshold, scale) = group.act, group.alpha, group.dropping()

    def op(x, masks: MaskState, params: tuple):
        rest = iter(params[own])
        w = next(rest) if has_w else None
        b = next(rest) if has_b else None
        state = masks.draw(x) if threshold else None
        drop = threshold, scale, stream_offset, masks.row_offset
        e = Epilogue(b, next(rest, None), state, act, alpha, *drop)
        return run_op(backend, x, w, e, masks)

    return op


def _plain(group: LayerGroup, own: slice) -> Callable:
    has_w, has_b, has_slope = (t is not None for t in group.tensors())
    functions = plain_functions([m for m in group.modules if not m._parameters])

    def plain(x, masks: MaskState, params: tuple):
        params = params[own]
        if has_w:
            x = F.linear(x, *params[: 1 + has_b])
        if has_slope:
            x = F.prelu(x, params[-1])
        for function in functions:
            x = function(x)
        return x

    return plain
