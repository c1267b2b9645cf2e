"""torch.compile(model, backend=fusedmlp.compile_backend): a pass over Dynamo's graph.

Every stretch of linear, activation and dropout in the graph becomes one op; the rest, and the
graph as a whole, goes to another backend of torch.compile. The seed of the masks is drawn outside
of the compiled code, as an eager forward draws it: torch.manual_seed and dropout_state hold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import functional
from ..nn import runner
from ..nn.groups import Stretch, find
from ..spec import activations, philox
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
    fakes = torch._guards.detect_fake_mode(example_inputs)
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
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        settings = (list_mode_options(mode) if mode else {}) | options
        return lambda gm, inputs: compile_fx(gm, inputs, config_patches=settings or None)
    if mode or options:
        raise ValueError(
            f"compile_backend: mode and options must be left out with {name!r} after it, "
            f"got {mode or options}"
        )
    if name == "eager":
        return lambda gm, inputs: gm.forward
    from torch._dynamo import lookup_backend

    return lookup_backend(name)


def _fuse(gm: fx.GraphModule) -> torch.device | None:
    """Puts ops into the graph. Returns the device that masks are first drawn on, or None."""
    graph, found = gm.graph, _chains(gm)
    if not found:
        return None
    drops = [s for chain in found for s in chain if _threshold(s)]
    state = device = None
    if drops:
        device = drops[0].source.meta["example_value"].device
        *_, last = (node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(last):
            state = graph.placeholder("dropout_state")
    layer = 0
    for chain in found:
        for stretch in chain:
            if stretch.pays:
                _put(graph, stretch, state, layer)
            layer += 1
    graph.lint()
    gm.recompile()
    return device


class _Nodes(Stretch):
    """A stretch, and its nodes in the graph."""

    __slots__ = ("nodes",)

    @classmethod
    def of(cls, stretch: Stretch, nodes: list[fx.Node]) -> _Nodes:
        new = cls(
            stretch.index,
            stretch.linear,
            stretch.activation,
            stretch.dropout,
            stretch.act,
            stretch.alpha,
        )
        new.nodes = nodes[stretch.index : stretch.index + len(stretch.modules)]
        return new

    @property
    def source(self) -> fx.Node:
        return self.nodes[0].args[0]


def _threshold(stretch: Stretch) -> int:
    dropout = stretch.dropout
    if dropout is None or not dropout.training:
        return 0
    return philox.threshold_and_scale(dropout.p)[0]


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
    """The stretches of each chain of nodes of which one at least becomes an op."""
    found = []
    for nodes, modules in sequences(gm.graph, gm, _module_of):
        stretches = [_Nodes.of(s, nodes) for s in find(modules) if type(s) is Stretch]
        if any(s.pays for s in stretches):
            found.append(stretches)
    return found


def _put(graph: fx.Graph, stretch: _Nodes, state: fx.Node | None, layer: int) -> None:
    """One call in the place of the nodes of a stretch."""
    w = b = slope = None
    last = stretch.nodes[-1]
    for node, m in zip(stretch.nodes, stretch.modules, strict=True):
        if m is stretch.linear:
            w, b = [*node.args[1:], node.kwargs.get("bias"), None][:2]
        elif type(m) is nn.PReLU:
            slope = node.args[1]
    threshold, scale = 0, 1.0
    if _threshold(stretch):
        threshold, scale = philox.threshold_and_scale(stretch.dropout.p)
    numbers = (stretch.act, stretch.alpha, threshold, scale, layer, 0)
    call = _caller(stretch)
    # Where the stretch begins: its input may be written to later.
    with graph.inserting_before(stretch.nodes[0]):
        fused = graph.call_function(call, (stretch.source, w, b, slope, state, *numbers))
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    for node in reversed(stretch.nodes):
        graph.erase_node(node)


def _caller(stretch: Stretch) -> Callable:
    linear, activation, dropout = stretch.linear, stretch.activation, stretch.dropout

    def fused_stretch(x, w, b, slope, state, *numbers):
        act, threshold = numbers[0], numbers[2]
        if not runner._can_run(x, w, b, act, slope, traced=True):
            y = x if linear is None else F.linear(x, w, b)
            if activation is not None:
                y = F.prelu(y, slope) if act == activations.PRELU else activation(y)
            return y if dropout is None else dropout(y)
        if threshold and state.device != x.device:
            state = state.to(x.device)
        state = state if threshold else None
        if linear is None:
            return functional.run_bias_act_dropout(x, None, slope, state, *numbers, None)
        return functional.run_linear_act(x, w, b, slope, state, *numbers, None)

    fused_stretch.takes_row_offset = True
    return fused_stretch


def _at_rows(gm: fx.GraphModule, graph: fx.Graph, row_offset: int) -> fx.GraphModule:
    """The graph for another row offset, to be run as it is."""
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        if getattr(node.target, "takes_row_offset", False):
            node.args = (*node.args[:-1], row_offset)
    return fx.GraphModule(gm, graph)
