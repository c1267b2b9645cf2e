"""torch.compile(model, backend=fusedmlp.compile_backend): a pass over Dynamo's graph.

Every group of linear, activation and dropout in the graph becomes one op; the rest, and the
graph as a whole, goes to another backend of torch.compile. The seed of the masks is drawn outside
of the compiled code, as an eager forward draws it: torch.manual_seed and dropout_state hold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import compat, functional
from ..nn.groups import LayerGroup, find_groups
from ..nn.steps import fits
from ..spec import activations
from ..spec.layers import Epilogue
from .tracing.graph import module_of, sequences

_PRELU = (F.prelu, torch.prelu)


def compile_backend(
    gm: fx.GraphModule,
    example_inputs: list[Tensor],
    *,
    mode: str | None = None,
    options: dict | None = None,
) -> Callable:
    """A backend for torch.compile that fuses first: torch.compile(model, backend=compile_backend).

    What fusedmlp.fuse(model, trace=True) does to a model, done to the graph of whatever Dynamo can
    trace. Dropout masks are this package's.

    mode     as in torch.compile, for Inductor
    options  {"then": name} for another backend than "inductor" after this pass, such as
             "aot_eager" or "eager"; all else is Inductor's
    raises   ValueError for options that the other backend does not take
    """
    then = _backend(mode, dict(options or {}))
    # A copy: Dynamo counts the inputs of its own graph afterwards.
    gm, dynamo = fx.GraphModule(gm, copy.deepcopy(gm.graph)), gm
    gm.meta.update(dynamo.meta)
    source = _fuse(gm)
    if source is None:
        return then(gm, example_inputs)
    index = next(
        (i for i, t in enumerate(example_inputs) if isinstance(t, Tensor) and t.device == source),
        None,
    )
    if index is None:
        raise ValueError(f"compile_backend: the graph must have an input on {source}, got none")
    graph = copy.deepcopy(gm.graph)
    fakes = compat.detect_fake_mode(example_inputs)
    if fakes is None:
        state = torch.zeros(2, dtype=torch.int64, device=source)
    else:
        with fakes:
            state = torch.empty(2, dtype=torch.int64, device=source)
    compiled = then(gm, [*example_inputs, state])

    def run(*inputs):
        state, row_offset = functional.draw_state(inputs[index])
        if row_offset:
            # A constant of the ops. Seldom, and not worth a compilation for each value.
            return _at_rows(gm, graph, row_offset)(*inputs, state)
        return compiled(*inputs, state)

    return run


def _backend(mode: str | None, options: dict) -> Callable:
    name = options.pop("then", "inductor")
    if name == "inductor":
        return compat.inductor(mode, options)
    if mode or options:
        raise ValueError(
            f"compile_backend: mode and options must be left out with {name!r} after it, "
            f"got {mode or options}"
        )
    if name == "eager":
        return lambda gm, inputs: gm.forward
    return compat.compiler_backend(name)


def _fuse(gm: fx.GraphModule) -> torch.device | None:
    """Puts ops into the graph. Returns the device that masks are first drawn on, or None."""
    graph, found = gm.graph, _chains(gm)
    if not found:
        return None
    drops = [group for chain in found for group in chain if _threshold(group)]
    state = device = None
    if drops:
        device = drops[0].source.meta["example_value"].device
        *_, last = (node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(last):
            state = graph.placeholder("dropout_state")
    offset = 0
    for chain in found:
        for group in chain:
            if group.pays:
                _put(graph, group, state, offset)
            offset += 1
    graph.lint()
    gm.recompile()
    return device


class _Nodes(LayerGroup):
    """A group, and its nodes in the graph."""

    __slots__ = ("nodes",)

    @classmethod
    def of(cls, group: LayerGroup, nodes: list[fx.Node]) -> _Nodes:
        new = cls(
            group.index, group.linear, group.activation, group.dropout, group.act, group.alpha
        )
        new.nodes = nodes[group.index : group.index + len(group.modules)]
        return new

    @property
    def source(self) -> fx.Node:
        return self.nodes[0].args[0]


def _threshold(group: LayerGroup) -> int:
    return (group.dropping() or (0, 1.0))[0]


def _module_of(node: fx.Node, gm: fx.GraphModule) -> nn.Module | None:
    """As module_of, for functions that take their parameters; those modules stand for a class."""
    if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        rest = [*node.args[1:], *node.kwargs.values()]
        nodes = [a for a in rest if a is not None]
        if node.target is F.linear and nodes and all(isinstance(a, fx.Node) for a in nodes):
            if node.kwargs.keys() <= {"bias"} and node.args[0] not in nodes:
                return nn.Linear(1, 1, device="meta")
        if node.target in _PRELU and len(nodes) == 1 and not node.kwargs:
            return nn.PReLU(device="meta") if nodes[0].op in ("placeholder", "get_attr") else None
    return module_of(node, gm)


def _chains(gm: fx.GraphModule) -> list[list[_Nodes]]:
    """The groups of each chain of nodes of which one at least becomes an op."""
    found = []
    for nodes, modules in sequences(gm.graph, gm, _module_of):
        groups = [_Nodes.of(g, nodes) for g in find_groups(modules) if type(g) is LayerGroup]
        if any(group.pays for group in groups):
            found.append(groups)
    return found


def _put(graph: fx.Graph, group: _Nodes, state: fx.Node | None, offset: int) -> None:
    """One call in the place of the nodes of a group."""
    w = b = slope = None
    last = group.nodes[-1]
    for node, m in zip(group.nodes, group.modules, strict=True):
        if m is group.linear:
            w, b = [*node.args[1:], node.kwargs.get("bias"), None][:2]
        elif type(m) is nn.PReLU:
            slope = node.args[1]
    drop = *(group.dropping() or (0, 1.0)), offset, 0
    # Flat: the arguments of a node are not to be a tuple of a class that the graph does not know.
    epilogue = b, slope, state, group.act, group.alpha, *drop
    # Where the group begins: its input may be written to later.
    with graph.inserting_before(group.nodes[0]):
        fused = graph.call_function(_caller(group), (group.source, w, *epilogue))
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    for node in reversed(group.nodes):
        graph.erase_node(node)


def _caller(group: LayerGroup) -> Callable:
    linear, activation, dropout = group.linear, group.activation, group.dropout

    def fused_group(x, w, *epilogue):
        e = Epilogue(*epilogue)
        if not fits(x, w, e.bias, e.act, e.slope, traced=True):
            y = x if linear is None else F.linear(x, w, e.bias)
            if activation is not None:
                y = F.prelu(y, e.slope) if e.act == activations.PRELU else activation(y)
            return y if dropout is None else dropout(y)
        if not e.threshold:
            e = e._replace(state=None)
        elif e.state.device != x.device:
            e = e._replace(state=e.state.to(x.device))
        if linear is None:
            return functional.run_bias_act_dropout(x, e, None)
        return functional.run_linear_act(x, w, e, None)

    fused_group.takes_row_offset = True
    return fused_group


def _at_rows(gm: fx.GraphModule, graph: fx.Graph, row_offset: int) -> fx.GraphModule:
    """The graph for another row offset, to be run as it is."""
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        if getattr(node.target, "takes_row_offset", False):
            node.args = (*node.args[:-1], row_offset)
    return fx.GraphModule(gm, graph)
