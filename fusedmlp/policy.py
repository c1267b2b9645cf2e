"""The table behind automatic choice: which route to take for a call.

On a CPU it was fitted to measurements of one machine (an AMD EPYC with AVX-512, 2 threads, torch
2.15: bench/results/), per op, activation and size class, with plain PyTorch as a candidate. On
other processors and for sizes beside the published grid it is a guess from these: the route that
is taken can be the slower one there. On a GPU nothing was measured, so plain PyTorch runs. A new
figure in bench/results/ is the reason to change a line here. Does not know which backends are
there: dispatch.py takes the first of the returned order that runs.
"""

from __future__ import annotations

import torch

from . import activations

_NATIVE = ("native", "eager")
_EAGER = ("eager", "native")
# With dropout plain PyTorch is `reference`: eager PyTorch has not this package's masks.
_UNMEASURED = ("eager", "reference")
_MACHINE = "an AMD EPYC CPU with 2 threads, torch 2.15"

# Elements of the output below which plain PyTorch is the faster route on a CPU when nothing is
# dropped: (with gradients, without). An op saves passes over the output and costs an autograd node
# in Python. For ReLU alone it saves next to nothing, as PyTorch's linear adds the bias for free,
# until the passes go to memory; for gelu and tanh its own vector code is faster than PyTorch's.
_MILLION = 1 << 20
_CPU_EAGER_BELOW = {
    activations.RELU: (_MILLION, _MILLION // 2),
    activations.LEAKY_RELU: (_MILLION, _MILLION // 2),
    activations.PRELU: (_MILLION, _MILLION // 2),
    activations.RELU_SQUARED: (_MILLION, _MILLION // 2),
    activations.SIGMOID: (_MILLION, 1 << 16),
    activations.SILU: (_MILLION, 1 << 16),
    activations.TANH: (1 << 16, 1 << 12),
    activations.ELU: (1 << 16, 1 << 12),
    activations.SOFTPLUS: (1 << 16, 1 << 12),
    activations.GELU_TANH: (1 << 16, 1 << 12),
    activations.GELU: (1 << 12, 1 << 4),
}

# Of a whole network as one op on a CPU. Of few features packing takes longer than the product; of
# few rows the gradient of a large weight is all stores.
_LIBRARY_ABOVE = 1 << 21
_MANY_ROWS, _NARROW = 512, 4
_FEW_ROWS, _OUTER_ABOVE = 8, 1 << 16
# Multiplications above which a layer alone is better off with the library's product and an op for
# the rest: there is little host cost to save, beside that of a large product.
_ONE_PLAIN, _ONE_DROPS, _SMALL_WEIGHT = 1 << 23, 1 << 26, 1 << 14


def order(device_type: str) -> tuple[str, ...]:
    """The order for a size that is not known yet (a call that is being compiled)."""
    return _NATIVE if device_type == "cpu" else _UNMEASURED


def choose(
    device_type: str,
    op: str,
    dtype: torch.dtype,
    act: int,
    dropout: bool,
    rows: int,
    in_features: int,
    out_features: int,
    gradients: bool,
) -> tuple[str, ...]:
    """The order in which backends are tried for one call. Arguments as in dispatch.select.

    gradients  whether autograd records the call
    """
    if device_type != "cpu":
        return _UNMEASURED
    if dropout:
        return _NATIVE
    below = _CPU_EAGER_BELOW.get(act)
    if below is None or rows * out_features < below[0 if gradients else 1]:
        return _EAGER
    return _NATIVE


def choose_mlp(
    device_type: str,
    rows: int,
    in_features: int,
    layers: list[tuple[int, bool, int]],
    gradients: bool,
) -> str | None:
    """The backend for a whole network as one op, or None. Arguments as in dispatch.select_mlp.

    One node in autograd and one call stand for those of all layers, and its matrix products are the
    extension's own: as fast as the library's up to a few hundred thousand weights.
    """
    if device_type != "cpu":
        return None
    widths = [in_features, *[n for _, _, n in layers]]
    weights = max(k * n for k, n in zip(widths, widths[1:], strict=False))
    if weights > _LIBRARY_ABOVE or (rows >= _MANY_ROWS and min(widths) < _NARROW):
        return None
    drops = any(drops for _, drops, _ in layers)
    alone = len(layers) == 1 and weights > _SMALL_WEIGHT
    if alone and rows * weights > (_ONE_DROPS if drops else _ONE_PLAIN):
        return None
    if drops:
        return "native"
    if gradients and rows < _FEW_ROWS and weights > _OUTER_ABOVE:
        return None
    if len(layers) > 2 or (len(layers) == 2 and not gradients):
        return "native"
    for act, _, n in layers:
        below = _CPU_EAGER_BELOW.get(act)
        if below is None:
            continue
        least = below[0 if gradients else 1]
        if len(layers) == 2:
            least = 0 if act == activations.GELU else least // 4
        if rows * n >= least:
            return "native"
    return None


def unmeasured(device_type: str) -> str:
    """What is said of a device on which nothing was measured."""
    if device_type != "cuda":
        return f"no device of type {device_type!r} has been measured: plain PyTorch is used"
    # What tuning finds are tiles of Triton's kernels; the choice of a backend does not follow yet.
    return (
        "this GPU has not been measured: plain PyTorch is used; run `fusedmlp tune` to time "
        "Triton's tiles on it, and name backend 'triton' to use them"
    )


def why(choice: str, first: str, act: int, device_type: str) -> str:
    """One sentence on the reason for a choice, for dispatch.explain.

    first  the head of the order that `choose` gave
    """
    if device_type != "cpu":
        return unmeasured(device_type)
    if choice != first:
        return f"{first!r} would be taken at this size but cannot run the call"
    if choice == "eager":
        if act == activations.NONE:
            return "without activation and dropout there is nothing to fuse"
        return f"at sizes like this plain PyTorch was the faster one on {_MACHINE}"
    return f"at sizes like this it was the faster one on {_MACHINE}"
