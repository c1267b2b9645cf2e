"""The measured table behind automatic choice: which route is the fastest for a call.

Per device kind, op, dtype and size class; eager PyTorch is itself a candidate, so that fused is
never slower than unfused. A new figure in bench/results/ is the reason to change a line here.
Does not know which backends are there: dispatch.py takes the first of the returned order that runs.
"""

from __future__ import annotations

import torch

_NATIVE = ("native", "eager")
_EAGER = ("eager", "native")
_GPU = ("triton", "eager")

# Elements of the output below which plain PyTorch is faster on a CPU when nothing is dropped: the
# fused op saves two passes over the output, which is less than the host cost of its autograd node.
CPU_EAGER_BELOW = 32_768


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
) -> tuple[str, ...]:
    """The order in which backends are tried for one call. Arguments as in dispatch.select."""
    if device_type == "cpu":
        if not dropout and (act == 0 or rows * out_features < CPU_EAGER_BELOW):
            return _EAGER
        return _NATIVE
    return _GPU


def why(
    choice: str,
    device_type: str,
    op: str,
    dtype: torch.dtype,
    act: int,
    dropout: bool,
    rows: int,
    in_features: int,
    out_features: int,
) -> str:
    """One sentence on the reason for a choice, for dispatch.explain."""
    first = choose(device_type, op, dtype, act, dropout, rows, in_features, out_features)[0]
    if choice != first:
        return f"{first!r} is the fastest route measured here but cannot run the call"
    if choice == "eager":
        if act == 0:
            return "without activation and dropout there is nothing to fuse"
        return f"measured: below {CPU_EAGER_BELOW} outputs plain PyTorch is faster than a fused op"
    return "the fastest route measured for this device, op and size"
