"""The measured table behind automatic choice: which route is the fastest for a call.

Per device kind, op, activation and size class; eager PyTorch is itself a candidate, so that fused
is never slower than unfused. A new figure in bench/results/ is the reason to change a line here.
Does not know which backends are there: dispatch.py takes the first of the returned order that runs.
"""

from __future__ import annotations

import torch

from . import activations

_NATIVE = ("native", "eager")
_EAGER = ("eager", "native")
_GPU = ("triton", "eager")

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
    activations.GELU: (1 << 12, 0),
}


def order(device_type: str, op: str) -> tuple[str, ...]:
    """The order for a size that is not known yet (a call that is being compiled)."""
    return _NATIVE if device_type == "cpu" else _GPU


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
        return _GPU
    if dropout:
        return _NATIVE
    below = _CPU_EAGER_BELOW.get(act)
    if below is None or rows * out_features < below[0 if gradients else 1]:
        return _EAGER
    return _NATIVE


def why(choice: str, first: str, act: int) -> str:
    """One sentence on the reason for a choice, for dispatch.explain.

    first  the head of the order that `choose` gave
    """
    if choice != first:
        return f"{first!r} is the fastest route measured but cannot run the call"
    if choice == "eager":
        if act == activations.NONE:
            return "without activation and dropout there is nothing to fuse"
        return "measured: at this size plain PyTorch is faster than a fused op"
    return "the fastest route measured for this device, op and size"
