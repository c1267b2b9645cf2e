"""Finds chains of linear, activation and dropout in Dynamo's graph, and makes each one call.

A node calls a function or a method of PyTorch's, and stands for the module that does the same. What
of a chain forms a group is then decided as in a container (nn/groups.py).
"""

from __future__ import annotations

import inspect
import itertools
import operator
import types
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn.groups import LayerGroup, Opaque, find_groups
from ..nn.mask_state import MaskState
from .chain import Chain


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Dropout:
    return nn.Dropout(p, inplace).train(training)


# Function -> what makes its module of the arguments after the first; names in their order.
FUNCTIONS = {
    F.relu: (nn.ReLU, ("inplace",)),
    F.relu_: (lambda: nn.ReLU(True), ()),
    torch.relu: (nn.ReLU, ()),
    torch.relu_: (lambda: nn.ReLU(True), ()),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope", "inplace")),
    F.elu: (nn.ELU, ("alpha", "inplace")),
    F.sigmoid: (nn.Sigmoid, ()),
    torch.sigmoid: (nn.Sigmoid, ()),
    F.tanh: (nn.Tanh, ()),
    torch.tanh: (nn.Tanh, ()),
    F.softplus: (nn.Softplus, ("beta", "threshold")),
    F.gelu: (nn.GELU, ("approximate",)),
    F.silu: (nn.SiLU, ("inplace",)),
    F.dropout: (_dropout, ("p", "training", "inplace")),
}
METHODS = {
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(True),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
_PRELU = (F.prelu, torch.prelu)
_IN_PLACE = "add and concat floordiv lshift matmul mod mul or pow rshift sub truediv xor".split()
_WRITING = {operator.setitem, *(getattr(operator, f"i{name}") for name in _IN_PLACE)}


class _Step(NamedTuple):
    """A node, a new module that does the same, and the nodes of that module's parameters."""

    node: fx.Node
    module: nn.Module
    params: list[fx.Node]


def put_chains(graph: fx.Graph) -> list[Chain]:
    """Puts a call in the place of each chain of which a part can run as one op; returns them.

    The graph gets one input more: the masks of the forward, a MaskState, or where another compiler
    traces the graph the tensor (seed, stream).
    """
    found, stream_offset = [], 0
    for steps in _sequences(graph):
        for groups in _runs(find_groups([step.module for step in steps])):
            if any(group.pays for group in groups):
                first, last = groups[0].index, groups[-1].index + len(groups[-1].modules)
                found.append((steps[first:last], stream_offset))
            stream_offset += len(groups)
    if not found:
        return []
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        first.prepend(node)  # Dynamo puts some where they are first used.
    with graph.inserting_before(first):
        masks = graph.placeholder("masks")
    chains = [_put(graph, steps, masks, offset) for steps, offset in found]
    graph.lint()
    return chains


def _runs(items: list[LayerGroup | Opaque]) -> list[list[LayerGroup]]:
    """The groups, those that follow each other together."""
    runs = itertools.groupby(items, key=lambda item: type(item) is LayerGroup)
    return [list(run) for are_groups, run in runs if are_groups]


def _put(graph: fx.Graph, steps: list[_Step], masks: fx.Node, stream_offset: int) -> Chain:
    chain = Chain([step.module for step in steps], stream_offset)

    def fused_chain(x, masks, *params):
        if type(masks) is MaskState:
            return chain(x, masks, *params)
        return chain.in_trace(x, masks, *params)

    first, last = steps[0].node, steps[-1].node
    params = [p for step in steps for p in step.params]
    # Where the chain begins: its input may be written to later.
    with graph.inserting_before(first):
        call = graph.call_function(fused_chain, (first.args[0], masks, *params))
    call.meta = dict(last.meta)
    last.replace_all_uses_with(call)
    for step in reversed(steps):
        graph.erase_node(step.node)
    return chain


def _sequences(graph: fx.Graph) -> Iterator[list[_Step]]:
    """Steps of which each is the only user of the one before it, with nothing done in between.

    The tensors that they take are there before the first one.
    """
    places, section, taken = {}, 0, set()
    for index, node in enumerate(graph.nodes):
        places[node] = index, section
        section += _does_more(node)
    for first in graph.nodes:
        steps, node = [], first
        while node not in taken and (step := _step_of(node)) is not None:
            if any(places[p] > places[first] for p in step.params):
                break
            steps.append(step)
            taken.add(node)
            if len(node.users) != 1:
                break
            (user,) = node.users
            if user.args[:1] != (node,) or places[user][1] != places[node][1]:
                break
            node = user
        # What an op keeps for backward would be overwritten.
        if steps and not any(_writes(user) for user in steps[-1].node.users):
            yield steps


def _does_more(node: fx.Node) -> bool:
    """True if a node may do more than give a tensor or a number: switch grad mode, write, ..."""
    if node.op in ("placeholder", "get_attr"):
        return False
    if _step_of(node) is not None:
        return _writes(node) and len(node.args[0].users) > 1
    return not node.users or _writes(node) or node.meta.get("example_value") is None


def _writes(node: fx.Node) -> bool:
    """True if the node may write into its first argument."""
    if node.op == "call_method":
        return node.target.endswith("_")
    if node.op != "call_function":
        return False
    if isinstance(node.target, types.FunctionType):
        names = [*inspect.signature(node.target).parameters]
        options = dict(zip(names, node.args, strict=False)) | node.kwargs
        if options.get("inplace"):
            return True
    return node.target in _WRITING or getattr(node.target, "__name__", "").endswith("_")


def _step_of(node: fx.Node) -> _Step | None:
    """None where a node is no candidate."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    x, *rest = node.args
    if node.op == "call_method":
        make = METHODS.get(node.target)
        return _Step(node, make(), []) if make is not None and not rest + [*node.kwargs] else None
    if node.op != "call_function":
        return None
    if node.target is F.linear or node.target in _PRELU:
        params = [p for p in (*rest, *node.kwargs.values()) if p is not None]
        if node.kwargs.keys() <= {"bias"} and x not in params:
            if node.target is F.linear:
                return _Step(node, nn.Linear(1, 1, len(params) > 1, device="meta"), params)
            return _Step(node, nn.PReLU(device="meta"), params)
        return None
    make, names = FUNCTIONS.get(node.target, (None, ()))
    options = dict(zip(names, rest, strict=False)) | node.kwargs
    if make is None or len(rest) > len(names) or not options.keys() <= set(names):
        return None
    options = {name: _constant(value) for name, value in options.items()}
    if not all(isinstance(value, bool | int | float | str) for value in options.values()):
        return None
    try:
        return _Step(node, make(**options), [])
    except (TypeError, ValueError):
        return None  # PyTorch says what is wrong with it when it runs.


def _constant(value: object) -> object:
    """A number that Dynamo has made an input, as the constant that it is; a guard then holds it."""
    number = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return float(number) if isinstance(number, torch.SymFloat) else value
