"""torch.compile(model, backend=fusedmlp.compile_backend): for models that are written as code.

Every chain of linear, activation and dropout in Dynamo's graph becomes one call. The rest runs as
it is, or is compiled by another backend of torch.compile. The seed of the masks is drawn outside of
compiled code, as a fused module draws it: torch.manual_seed and dropout_state hold.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable

import torch
from torch import Tensor, fx

from .. import compat
from ..nn.mask_state import MaskState
from .graph import put_chains

log = logging.getLogger("fusedmlp")


def compile_backend(
    gm: fx.GraphModule,
    example_inputs: list[Tensor],
    *,
    mode: str | None = None,
    options: dict | None = None,
) -> Callable:
    """A backend of torch.compile: torch.compile(model, backend=fusedmlp.compile_backend).

    Does to a model that is written as code what fusedmlp.fuse does to an nn.Sequential: linear
    layers, activations and dropout that follow each other run as one op, with the masks of this
    package. Give it the plain model: what `fuse` has made is left as it is. The same in place, with
    the model's own keys and a cheaper call: model.compile(backend=fusedmlp.compile_backend).

    Layer i of a graph draws its mask from stream + i of the dropout state; where Dynamo breaks the
    graph, the next one counts from 0 again. The logger "fusedmlp" says at level INFO what was
    fused.

    mode     as in torch.compile, for Inductor
    options  {"then": name} for the backend that the rest of the graph goes to: "eager", which runs
             it as PyTorch does, "inductor", "aot_eager", ...; all else is Inductor's. Left out:
             "eager" on a CPU, where Inductor gains such networks nothing, unless Inductor's mode or
             options are given; "inductor" on other devices
    raises   ValueError for options that the other backend does not take
    """
    options = dict(options or {})
    on_cpu = all(t.device.type == "cpu" for t in example_inputs if isinstance(t, Tensor))
    name = options.pop("then", "eager" if on_cpu and not (mode or options) else "inductor")
    then = _backend(name, mode, options)
    # A copy: Dynamo counts the inputs of its own graph afterwards.
    gm, dynamo = fx.GraphModule(gm, copy.deepcopy(gm.graph)), gm
    gm.meta.update(dynamo.meta)
    chains = put_chains(gm.graph)
    if not chains:
        return then(gm, example_inputs)
    gm.recompile()
    for chain in chains:
        names = ", ".join(type(m).__name__ for m in chain.modules)
        log.info("compile_backend: one call for %s", names)
    fused = gm.forward
    if name != "eager":
        return _compiled(then, gm, any(chain.drops for chain in chains), example_inputs)

    def run(*inputs):
        return fused(*inputs, MaskState(0, False))

    return run


def _backend(name: str, mode: str | None, options: dict) -> Callable:
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


def _compiled(
    then: Callable, gm: fx.GraphModule, drops: bool, example_inputs: list[Tensor]
) -> Callable:
    """The graph compiled by another backend, with the state of the masks as its last input."""
    tensors = [t for t in example_inputs if isinstance(t, Tensor)]
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    fused = gm.forward
    with compat.detect_fake_mode(example_inputs) or contextlib.nullcontext():
        state = torch.zeros(2, dtype=torch.int64, device=device)
    compiled = then(gm, [*example_inputs, state])

    def run(*inputs):
        masks = MaskState(0, False)
        like = torch.empty(0, device=device)
        state = masks.draw(like) if drops else like.new_zeros(2, dtype=torch.int64)
        if masks.row_offset:
            # A constant of compiled ops. Seldom, and not worth a compilation for each value.
            return fused(*inputs, masks)
        return compiled(*inputs, state)

    return run
