"""Chains of Linear, activation and dropout in a torch.fx graph, as containers that run fused.

A function of torch (F.relu, torch.tanh, F.dropout) stands for the module that does the same. What
of a chain becomes one op is decided by the container, call by call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from ...nn.groups import LayerGroup, find_groups, is_candidate
from ...nn.sequential import FusedSequential


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
_WRITING = {getattr(operator, name) for name in dir(operator) if name.startswith("__i")} - {
    operator.__index__,
    operator.__inv__,
    operator.__invert__,
}


@dataclass
class Chain:
    """Nodes that run one after the other, each the only user of the one before it."""

    nodes: list[fx.Node]
    container: FusedSequential

    @property
    def input(self) -> fx.Node:
        return self.nodes[0].args[0]


def module_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that a node calls or that does the same, or None where it is no candidate."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    rest = node.args[1:]
    if any(node.args[0] in (a, *b) for a, b in ((rest, ()), (node.kwargs.values(), ()))):
        return None
    if node.op == "call_module":
        m = root.get_submodule(node.target)
        return m if is_candidate(m) and not rest and not node.kwargs else None
    if node.op == "call_method" and not rest and not node.kwargs:
        make = METHODS.get(node.target)
        return make() if make is not None else None
    if node.op != "call_function" or node.target not in FUNCTIONS:
        return None
    make, names = FUNCTIONS[node.target]
    options = dict(zip(names, rest, strict=False)) | node.kwargs
    if len(rest) > len(names) or not options.keys() <= set(names):
        return None
    if not all(isinstance(v, bool | int | float | str) for v in options.values()):
        return None
    try:
        return make(**options)
    except (TypeError, ValueError):
        return None  # PyTorch says what is wrong with it when it runs.


def sequences(graph: fx.Graph, root: nn.Module, module_of) -> Iterator[tuple[list, list]]:
    """(nodes, modules that do the same) of which each is the only user of the one before it."""
    taken = set()
    for node in graph.nodes:
        nodes, modules = [], []
        while node not in taken and (m := module_of(node, root)) is not None:
            nodes.append(node)
            modules.append(m)
            if len(node.users) != 1 or next(iter(node.users)).args[:1] != (node,):
                break
            node = next(iter(node.users))
        taken.update(nodes)
        # What an op keeps for backward would be overwritten.
        if nodes and not any(writes(user, root) for user in nodes[-1].users):
            yield nodes, modules


def chains(graph: fx.Graph, root: nn.Module) -> list[Chain]:
    """All chains of which at least one part would run fused."""
    return [
        Chain(nodes, _container(nodes, modules))
        for nodes, modules in sequences(graph, root, module_of)
        if any(map(is_worth, find_groups(modules)))
    ]


def is_worth(item) -> bool:
    return item.pays if type(item) is LayerGroup else item.fused


def _container(nodes: list[fx.Node], modules: list[nn.Module]) -> FusedSequential:
    container = FusedSequential()
    for node, m in zip(nodes, modules, strict=True):
        name = node.target if node.op == "call_module" else node.name
        while name in container._modules:
            name += "'"
        # Not add_module, which refuses the dots of a qualified name.
        container._modules[name] = m
    return container


def writes(node: fx.Node, root: nn.Module) -> bool:
    """True if the node may write into its first argument."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(node.target), "inplace", False))
    if node.kwargs.get("inplace") or (node.op == "call_function" and node.target in _WRITING):
        return True
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def replace(graph: fx.Graph, found: list[Chain]) -> None:
    """Each chain becomes one call of its container, with the masks of the whole forward."""
    for node in graph.nodes:
        node.type = None  # annotations may name what the new function does not know
    *_, last = (node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(last):
        masks = graph.placeholder("_masks")
    for chain in found:
        # Where the chain begins: its input may be written to later.
        with graph.inserting_before(chain.nodes[0]):
            fused = graph.call_function(_caller(chain.container), (chain.input, masks))
        chain.nodes[-1].replace_all_uses_with(fused)
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    graph.lint()


def _caller(container: FusedSequential):
    def fused_groups(x, masks):
        return container._run_fused(x, masks)

    return fused_groups
