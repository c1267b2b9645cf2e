"""A candidate against plain PyTorch: outputs, gradients and masks, by the error budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .. import functional as FF
from ..backends import composite, registry
from ..spec import activations, philox
from ..spec.budget import share
from ..tuning.work import Work
from .candidates import Problem

SEED, STREAM = 0x1234_5678_9ABC_DEF0, -7


def masks_agree(backend: str, device: str) -> bool:
    """Whether the masks of a backend are those of the specification, bit for bit."""
    for m, n, p in ((1, 1, 0.5), (37, 29, 0.1), (128, 1024, 0.5), (3, 10, 1 - 2.0**-32)):
        y = FF.dropout(
            torch.ones(m, n, device=device),
            p,
            seed=SEED,
            stream=STREAM,
            row_offset=5,
            backend=backend,
        )
        if not torch.equal(
            (y != 0).cpu(), philox.dropout_mask(SEED, STREAM, m, n, p, row_offset=5)
        ):
            return False
    return True


def _at_a_kink(oracle: Problem) -> Tensor:
    """(M, N) or (M, 1) bool: where rounding can decide on which side of 0 a derivative jumps; of a
    deeper network the whole rows, as it does for all that follows."""
    eps = torch.finfo(oracle.work.torch_dtype).eps
    y, found = oracle.x, torch.zeros(oracle.work.rows, 1, dtype=torch.bool, device=oracle.x.device)
    for i, (w, e) in enumerate(oracle.layers):
        tiny = torch.tensor([-1e-30, 1e-30], dtype=torch.float64)
        below, above = activations.TABLE[e.act].from_z(tiny, 0.5).tolist()
        if abs(below - above) > 0.1:
            z, size = (y, y.abs()) if w is None else (y @ w.T, y.abs() @ w.abs().T)
            near = (z + e.bias).abs() < 2 * (i + 1) * eps * (size + e.bias.abs())
            found = near if len(oracle.layers) == 1 else found | near.any(1, keepdim=True)
        if w is not None:
            y = composite.linear_act(y, w, e)
    return found


def _results(problem: Problem) -> Iterator[tuple[str, int, float]]:
    """The name of each result, how many of its numbers are independent, and of how many terms of a
    size about 1 each is the sum: dropout makes one of the size of its scale out of them."""
    m, widths = problem.work.rows, [n for _, _, n in problem.work.layers]
    size = math.prod(e.scale for _, e in problem.layers)
    # The errors of the narrowest layer are in all of them.
    errors = m * min(widths)
    yield "the output", errors, size**2
    for i, (w, e) in enumerate(problem.layers):
        what = "input" if w is None else f"weight of layer {i}"
        yield f"the gradient of {what}", errors, m * size**2
        yield f"the gradient of bias of layer {i}", errors, m * size**2
        if e.slope is not None:
            yield f"the gradient of slope of layer {i}", errors, m * widths[i] * size**2


def wrong(work: Work, make: Callable[[Problem], Callable[[], Tensor]]) -> str | None:
    """What is wrong with the results of a candidate, or None.

    make  the call of a Candidate
    """
    half = work.torch_dtype != torch.float32
    if half and len(work.layers) > 1:
        # Rounding moves too many values over a kink: each layer by itself.
        k = work.in_features
        for i, layer in enumerate(work.layers):
            found = wrong(replace(work, in_features=k, layers=(layer,)), make)
            if found is not None:
                return f"layer {i}: {found}"
            k = layer[2]
        return None
    problem, oracle = Problem(work), Problem(work, torch.float64)
    with torch.no_grad():
        at_a_kink = _at_a_kink(oracle)
    for p in (problem, oracle):
        p.dy = p.dy.masked_fill(at_a_kink, 0)
    with torch.set_grad_enabled(work.gradients):
        # Eager's masks are its own, and it is the yardstick itself.
        results = []
        for p, call in (
            (problem, make(problem)),
            (problem, problem.reference),
            (oracle, oracle.reference),
        ):
            y = call()
            results.append([y.detach(), *(p.gradients(y) if work.gradients else [])])
    # Forward over the inputs of a layer, backward over its outputs.
    products = work.in_features + 2 * sum(n for _, _, n in work.layers) if work.in_features else 0
    for (name, *about), got, plain, truth in zip(_results(problem), *results, strict=False):
        if got.shape != truth.shape or got.dtype != plain.dtype:
            return f"{name} is {got.dtype} {tuple(got.shape)}, not {plain.dtype} of {truth.shape}"
        used = share(got, plain, truth, work.torch_dtype, *about, products)
        if not used <= 1:
            return f"{name} takes {used:.3g} times the error budget"
    return None


def wrong_masks(name: str, work: Work) -> str | None:
    """The same for the masks of a candidate's backend."""
    backend = name.partition(" ")[0]
    if not work.drops or not work.gradients or backend not in registry.list_backends():
        return None
    return None if masks_agree(backend, work.device) else "its dropout masks differ"
