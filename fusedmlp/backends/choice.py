"""Chooses the backend of each call: what the user names, else what was measured to be faster.

On a CPU the table was fitted to measurements of one machine (an AMD EPYC with AVX-512, 2 threads,
torch 2.15: bench/results/), per op, activation and size class, with plain PyTorch as a candidate.
On other processors and for sizes beside the published grid it is a guess from these: the backend
that is chosen can be the slower one there. On a GPU nothing was measured, so plain PyTorch runs.
A new figure in bench/results/ is the reason to change a line here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from .. import compat
from ..spec import activations, checks, dtypes
from . import registry
from .registry import EAGER

OPS = ("linear_act", "bias_act_dropout")

_NATIVE = ("native", "eager")
_EAGER = ("eager", "native")
# With dropout plain PyTorch is `reference`: eager PyTorch has not this package's masks.
_UNMEASURED = ("eager", "reference")
_MACHINE = "an AMD EPYC CPU with 2 threads, torch 2.15"

# Elements of the output below which plain PyTorch is faster on a CPU when nothing is
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


@functools.lru_cache(maxsize=4096)
def _measured_order(
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
    """The order in which backends are tried for one call. Arguments as in select.

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


def _measured_mlp(
    device_type: str,
    rows: int,
    in_features: int,
    layers: list[tuple[int, bool, int]],
    gradients: bool,
) -> str | None:
    """The backend for a whole network as one op, or None. Arguments as in select_mlp.

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


def _why(choice: str, first: str, act: int, device_type: str) -> str:
    """One sentence on the reason for a choice, for explain.

    first  the head of the order that `_measured_order` gave
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


def _resolve(
    order: tuple[str, ...], named: str | None, op: str, device_type: str, dtype, dropout: bool
) -> str:
    """The named backend, or the first of `order` that can run the call."""
    if named is not None:
        return registry.require(named, device_type, dtype, op)
    if device_type not in ("cpu", "meta"):
        registry.log_once(unmeasured(device_type))
    for name in order:
        if name == EAGER:
            if not dropout:
                return EAGER
        elif registry.is_usable(name, device_type, dtype, op):
            return name
    return "reference" if dropout else EAGER


# The answer is the same for all calls that Dynamo would reuse the graph for.
compat.mark_constant(_resolve)


def select(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    act: int,
    dropout: bool,
    rows: int,
    in_features: int,
    out_features: int,
    backend: str | None = None,
) -> str:
    """The backend for one call: a name of BACKENDS, or EAGER.

    op            'linear_act' or 'bias_act_dropout'
    rows          M, the flattened batch
    in_features   K, 0 for bias_act_dropout
    out_features  N
    returns       depends on torch.is_grad_enabled() too: an op's autograd node has its cost
    raises        BackendError if a backend was named that cannot run the call
    """
    named = registry.explicit(backend)
    if named is not None or torch.compiler.is_compiling() or isinstance(rows, torch.SymInt):
        # Compiled, sizes may be symbolic: choosing by them would compile once per size class.
        order = _NATIVE if device_type == "cpu" else _UNMEASURED
    else:
        order = _measured_order(
            device_type,
            op,
            dtype,
            act,
            dropout,
            rows,
            in_features,
            out_features,
            torch.is_grad_enabled(),
        )
    return _resolve(order, named, op, device_type, dtype, dropout)


def named_for_engine(device_type: str, dtype: torch.dtype, op: str) -> str | None:
    """The backend of an engine that was itself asked for by name: what the user has named, or else
    on a GPU fused kernels, where they run, as that is what such an engine is for."""
    named = registry.explicit(None)
    if (
        named is None
        and device_type != "cpu"
        and registry.is_usable("triton", device_type, dtype, op)
    ):
        return "triton"
    return named


def select_mlp(
    device_type: str,
    dtype: torch.dtype,
    rows: int,
    in_features: int,
    layers: list[tuple[int, bool, int]],
    named: str | None,
) -> str | None:
    """The backend that runs a whole network as one op, or None where its layers do better alone.

    rows     M, the flattened batch
    layers   (act, whether it drops, out_features) of each
    named    what `explicit` says
    returns  depends on torch.is_grad_enabled() too
    """
    if named is None:
        named = _measured_mlp(device_type, rows, in_features, layers, torch.is_grad_enabled())
    if named is None or not has_mlp(named, device_type, dtype):
        return None
    return named


@functools.cache
def has_mlp(name: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether modules use the op mlp of a backend; that of `reference` gains them nothing."""
    if name == "reference" or not registry.is_usable(name, device_type, dtype, "mlp"):
        return False
    if name == "triton":
        return device_type != "cpu"
    key = "CPU" if device_type == "cpu" else "CUDA"
    return (dtype == torch.float32 or key == "CUDA") and (
        compat.has_kernel("fusedmlp::mlp_fwd.native", key)
    )


@dataclass(frozen=True)
class Explanation:
    """What would run a call, and why not the others. `str()` of it is meant to be read."""

    op: str
    call: str
    choice: str
    why: str
    refusals: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}({self.call}) runs on {self.choice!r}: {self.why}"]
        for name, reasons in self.refusals.items():
            lines += [f"    not {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


def explain(
    op: str = "linear_act",
    *,
    rows: int = 256,
    in_features: int = 784,
    out_features: int = 256,
    activation: str = "relu",
    p: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Explanation:
    """Which backend a call would run on, and why.

    op            'linear_act' or 'bias_act_dropout' (in_features is then ignored)
    rows          M;  in_features K;  out_features N
    returns       an Explanation; print it
    raises        ValueError or TypeError for names, sizes and p that no call could have
    """
    if op not in OPS:
        raise ValueError(f"explain: unknown op {op!r}; known: {', '.join(OPS)}")
    act = checks.activation("explain", activation)
    dropout = checks.probability("explain", p) > 0
    for name, size in (
        ("rows", rows),
        ("in_features", in_features),
        ("out_features", out_features),
    ):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"explain: {name} must be an int, got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"explain: {name} must be >= 0, got {size}")
    if dtype not in dtypes.SUPPORTED:
        raise TypeError(f"explain: dtype must be fp32, fp16, bf16 or fp64, got {dtype}")
    device_type = torch.device(device).type
    named = registry.explicit(backend)
    refusals = {b.name: b.reasons_against(device_type, dtype) for b in registry.BACKENDS}
    refusals = {name: reasons for name, reasons in refusals.items() if reasons}
    size = (
        f"{rows} x {in_features} x {out_features}"
        if op == "linear_act"
        else f"{rows} x {out_features}"
    )
    call = f"{size}, {activation}, p = {p:g}, {dtypes.SHORT[dtype]}, {device_type}"
    if named is not None:
        if named in refusals:
            return Explanation(op, call, "nothing", f"{named!r} was asked for and raises", refusals)
        return Explanation(op, call, named, "it was asked for by name", {})
    choice = select(op, device_type, dtype, act, dropout, rows, in_features, out_features)
    k = in_features if op == "linear_act" else 0
    first = _measured_order(
        device_type, op, dtype, act, dropout, rows, k, out_features, torch.is_grad_enabled()
    )[0]
    why = _why(choice, first, act, device_type)
    if choice in refusals:
        refusals.pop(choice)
    return Explanation(op, call, choice, why, refusals)
