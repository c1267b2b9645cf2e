"""What of a model runs as one op, what does not, and why. Runs nothing and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from .. import compat
from ..backends import choice
from ..nn.groups import (
    LayerGroup,
    Opaque,
    find_groups,
    is_fused_module,
    reasons_against,
    reasons_against_container,
)
from ..nn.mask_state import MaskState
from ..nn.steps import MlpStep, network_steps
from ..spec import activations, checks, dtypes
from .measure import Measured, measure
from .surgery import hint_on_code, is_compiled, unfuse

_ROWS = 256
_ALONE = "by itself it is what PyTorch has"
_SAVES = {
    activations.SAVE_NOTHING: "nothing of its own for backward",
    activations.SAVE_Y: "its output for backward",
    activations.SAVE_PREACT: "its value before bias and activation for backward",
}


@dataclass(frozen=True)
class Part:
    """One group, or one module that runs by itself.

    modules  qualified names, in order
    op       'mlp', 'linear_act', 'bias_act_dropout', or None for a module with nothing to fuse
    stream_offset  what is added to the stream of the dropout state, or None
    backend  what would run a batch of 256 rows now
    why      the reason for the backend, or for not being fused
    keeps    what is kept for backward in training mode
    """

    modules: tuple[str, ...]
    text: str
    op: str | None
    stream_offset: int | None = None
    backend: str = ""
    why: str = ""
    keeps: str = ""

    def __str__(self) -> str:
        if self.op is None:
            return f"{self.text}: {self.why}"
        return f"{self.text}: {self.op} on {self.backend!r} ({self.why}); keeps {self.keeps}"


@dataclass(frozen=True)
class Report:
    """str() of it is meant to be read.

    containers  qualified name -> the parts of a container, in order of their running
    notes       what concerns a container, or the model, as a whole
    measured    time and memory on an input, if one was given
    """

    containers: dict[str, list[Part]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    measured: Measured | None = None

    @property
    def fused(self) -> list[Part]:
        return [part for parts in self.containers.values() for part in parts if part.op]

    @property
    def unfused(self) -> list[Part]:
        return [part for parts in self.containers.values() for part in parts if not part.op]

    def __str__(self) -> str:
        lines = []
        for name, parts in self.containers.items():
            lines.append(f"{name or 'the module itself'}:")
            lines += [f"    {part}" for part in parts] or ["    no children"]
        lines += self.notes
        if self.measured is not None:
            lines.append(str(self.measured))
        return "\n".join(lines) or "nothing that could be fused"


def report(module: nn.Module, input=None) -> Report:
    """What of a model runs as one op, what does not, and why. Print it.

    input   a tensor, or a tuple of arguments: adds time and memory on it, before and after fusing
    raises  TypeError if it is no module
    """
    checks.module("report", module)
    containers, notes, covered = {}, [], set()
    if compat.has_any_global_hook():
        notes.append("a global module hook is registered: everything runs unfused")
    for name, m in module.named_modules():
        if isinstance(m, nn.Sequential):
            reasons = reasons_against_container(m)
            if not reasons and is_fused_module(m):
                containers[name] = _parts(name, m)
                covered.update(id(child) for child in m.children())
            else:
                notes.append(
                    f"{name or 'the module itself'}: {'; '.join(reasons) or 'call fusedmlp.fuse'}"
                )
    outside = [
        name for name, m in module.named_modules() if type(m) is nn.Linear and id(m) not in covered
    ]
    if outside:
        shown = ", ".join(name or "the module itself" for name in outside[:4])
        more = f" and {len(outside) - 4} more" if len(outside) > 4 else ""
        notes.append(f"not in a fused container, so not fused: {shown}{more}")
    if is_compiled(module):
        notes.append("the model is compiled: what its compiler fuses is not in this report")
    notes += filter(None, [hint_on_code(module)])
    measured = None if input is None else measure(unfuse(module), module, input)
    return Report(containers, notes, measured)


def _parts(name: str, container: nn.Sequential) -> list[Part]:
    names = [f"{name}.{key}" if name else key for key in container._modules]
    children = list(container._modules.values())
    parts, offset = [], container.stream_offset
    groups = find_groups(children)
    together = _together(groups)
    for group in groups:
        if type(group) is LayerGroup:
            parts.append(_group(group, names, offset, together.get(group.index)))
            offset += 1
        else:
            parts.append(_opaque(group, names[group.index], offset))
            offset += group.layers
    return parts


def _opaque(group: Opaque, name: str, offset: int) -> Part:
    text = f"{name} {type(group.module).__name__}"
    if group.fused:
        own = "parts" if isinstance(group.module, nn.Sequential) else "op"
        return Part((name,), text, None, offset, why=f"its own {own}, masks of this container")
    why = "; ".join(reasons_against(group.module)) or _ALONE
    return Part((name,), text, None, why=f"not fused, {why}")


def _together(groups: list[LayerGroup | Opaque]) -> dict[int, tuple[choice.Way, int]]:
    """Index of each group of a network whose way is chosen as a whole -> the way, how many are in
    one op."""
    found, at = {}, 0
    while at < len(groups):
        first = groups[at].linear if type(groups[at]) is LayerGroup else None
        steps = []
        if first is not None and not isinstance(first.weight, nn.UninitializedParameter):
            like = torch.empty(1, device=first.weight.device, dtype=first.weight.dtype)
            if like.dtype in dtypes.SUPPORTED:
                like = like.expand(_ROWS, first.in_features)
                steps = network_steps(groups, at, like, MaskState(0, False))
        for step in steps:
            run = step.groups if type(step) is MlpStep else [step.group]
            found |= {group.index: (step.way, len(run)) for group in run}
            at += len(run)
        at += not steps
    return found


def _group(
    group: LayerGroup, names: list[str], offset: int, together: tuple[choice.Way, int] | None
) -> Part:
    names = tuple(names[group.index : group.index + len(group.modules)])
    labels = [type(m).__name__ for m in group.modules]
    text = ", ".join(f"{name} {label}" for name, label in zip(names, labels, strict=True))
    if len(names) == 1 and group.dropout is None:
        is_in_mlp = together is not None and together[0].route == "mlp"
        why = "in one op with its neighbours" if is_in_mlp else f"not fused, {_ALONE}"
        return Part(names, text, None, offset, why=why)
    linear, dropout = group.linear, group.dropout
    p = dropout.p if dropout is not None else 0.0
    training = dropout is not None and dropout.training
    op, dtype, device, k, n = "bias_act_dropout", torch.float32, "cpu", 0, _ROWS
    if linear is not None:
        op, (n, k) = "linear_act", linear.weight.shape
        dtype, device = linear.weight.dtype, linear.weight.device
    if dtype not in dtypes.SUPPORTED:
        return Part(names, text, None, offset, why=f"not fused, {dtype} is left to PyTorch")
    found = choice.explain(
        op,
        rows=_ROWS,
        in_features=k,
        out_features=n,
        activation=activations.NAMES[group.act],
        p=p if training else 0.0,
        dtype=dtype,
        device=device,
    )
    kind = activations.saves(group.act, group.alpha, dtype, p > 0)
    if together is not None:
        way, count = together
        if way.route != "mlp":
            return Part(names, text, op, offset, way.backend, way.why, _SAVES[kind])
        what = "an op of its own" if count == 1 else f"one op and one node of autograd for {count}"
        return Part(names, text, "mlp", offset, way.backend, f"{what}; {way.why}", _SAVES[kind])
    return Part(names, text, op, offset, found.choice, found.why, _SAVES[kind])
