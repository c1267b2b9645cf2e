"""Argument checks and the wording of their errors: "<op>: <name> must be <wanted>, got <given>".

User mistakes are ValueError or TypeError and are found here, before any backend is asked. Does not
convert arguments; returns ids and numbers where a name or a None stands for one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from . import activations, dtypes, philox
from .layers import Epilogue

_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1
DEFAULT_LEAKY_SLOPE = 0.01


def rows(t: Tensor) -> int:
    """M, the flattened leading sizes of (..., N); 1 for 0-D and 1-D. May be symbolic."""
    m = 1
    for size in t.shape[:-1]:
        m = m * size
    return m


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def tensor(op: str, name: str, value: object) -> Tensor:
    """A dense, strided, floating tensor of a supported dtype, or an error."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got {got}")
    if value.dtype not in dtypes.SUPPORTED:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes.SUPPORTED)
        raise TypeError(f"{op}: {name} must be one of {wanted}, got {value.dtype}")
    return value


def activation(op: str, name: object) -> int:
    """The id of an activation's name."""
    act = activations.IDS.get(name) if isinstance(name, str) else None
    if act is None:
        known = ", ".join(activations.NAMES)
        if isinstance(name, str):
            raise ValueError(f"{op}: unknown activation {name!r}; known: {known}")
        raise TypeError(
            f"{op}: activation must be a name, got {type(name).__name__}; known: {known}"
        )
    return act


def is_number(value: object) -> bool:
    """True for a real number, also one that is a tensor or an array without dimensions."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and value.dtype != torch.bool and not value.is_complex()
    if getattr(value, "shape", None) == () and hasattr(value, "dtype"):  # NumPy, not imported here
        return value.dtype.kind in "iuf"
    return isinstance(value, Real) and not isinstance(value, bool)


def probability(op: str, p: object, name: str = "p") -> float:
    """A dropout probability in [0, 1]."""
    if type(p) is float and 0.0 <= p <= 1.0:
        return p
    if not is_number(p):
        raise TypeError(f"{op}: {name} must be a number in [0, 1], got {type(p).__name__}")
    p = float(p)
    if not 0.0 <= p <= 1.0:  # also false for NaN
        raise ValueError(f"{op}: {name} must be in [0, 1], got {p}")
    return p


def int64(op: str, name: str, value: object) -> int:
    """A Python int that fits into 64 bits, signed."""
    if type(value) is int and _INT64_MIN <= value <= _INT64_MAX:
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not _INT64_MIN <= value <= _INT64_MAX:
        raise ValueError(f"{op}: {name} must be in [-2^63, 2^63), got {value}")
    return value


def row_range(op: str, m: int, columns: int, row_offset: object) -> int:
    """Rows and columns that the 32-bit words of the Philox counter can hold."""
    row_offset = int64(op, "row_offset", row_offset)
    if row_offset < 0:
        raise ValueError(f"{op}: row_offset must be >= 0, got {row_offset}")
    if torch.compiler.is_compiling() or isinstance(m, torch.SymInt):
        return row_offset  # A bound on a symbolic size would end up in the graph; kernels check.
    if m + row_offset > philox.TWO32:
        raise ValueError(
            f"{op}: rows + row_offset must be at most 2^32 for dropout, got {m} + {row_offset}"
        )
    if columns > 8 * philox.TWO32:
        raise ValueError(f"{op}: columns must be at most 2^35 for dropout, got {columns}")
    return row_offset


def state(op: str, value: object, device: torch.device | None = None) -> Tensor:
    """A dense int64 tensor (seed, stream)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: state must be an int64 tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{op}: state must be a dense (strided) tensor, got {value.layout}")
    if value.dtype != torch.int64 or value.shape != (2,):
        raise ValueError(
            f"{op}: state must be an int64 tensor (seed, stream) of shape (2,), "
            f"got {value.dtype} {_shape(value)}"
        )
    if device is not None and value.device != device:
        raise ValueError(f"{op}: state must be on {device} like input, got {value.device}")
    return value


def slope(op: str, act: int, value: object, columns: int) -> tuple[float, object]:
    """What `slope` means for an activation: (alpha for leaky_relu, tensor for prelu or None)."""
    if value is None and act != activations.PRELU:
        return DEFAULT_LEAKY_SLOPE, None
    if act == activations.PRELU:
        if value is None:
            raise ValueError(f"{op}: prelu needs slope, a tensor of 1 or N = {columns} elements")
        value = tensor(op, "slope", value)
        if value.dim() > 1 or value.numel() not in (1, columns):
            raise ValueError(
                f"{op}: slope must have 1 or N = {columns} elements for prelu, got {_shape(value)}"
            )
        return 0.0, value
    if act != activations.LEAKY_RELU:
        name = activations.NAMES[act]
        raise ValueError(f"{op}: slope is for leaky_relu and prelu, got one for {name!r}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{op}: slope must be a number for leaky_relu, got {type(value).__name__}; "
            "a learnable slope is activation='prelu'"
        )
    alpha = float(value)
    if not math.isfinite(alpha):
        raise ValueError(f"{op}: slope must be finite, got {alpha}")
    return alpha, None


def vector(op: str, name: str, value: object, like: Tensor, columns: int, origin: str) -> None:
    """A bias: (N,), on the device of the input, in its dtype or fp32 (fp64 only with fp64)."""
    value = tensor(op, name, value)
    if value.shape != (columns,):
        raise ValueError(
            f"{op}: {name} must be (N,) with N = {columns} to match {origin}, got {_shape(value)}"
        )
    same_device(op, name, value, like)
    vector_dtype(op, name, value, like)


def same_device(op: str, name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like input, got {value.device}")


def vector_dtype(op: str, name: str, value: Tensor, like: Tensor) -> None:
    """Bias and slope may be fp32 beside 16-bit inputs."""
    wanted = (like.dtype,) if like.dtype == torch.float64 else (like.dtype, torch.float32)
    if value.dtype not in wanted:
        names = " or ".join(dict.fromkeys(str(d) for d in wanted))
        raise TypeError(
            f"{op}: {name} must be {names} beside an input of {like.dtype}, got {value.dtype}"
        )


def _is_plain_linear(x: object, w: object, b: object) -> bool:
    """True for the usual right arguments. The full checks cost as much as a small layer's GEMM."""
    try:
        return (
            x.shape[-1] == w.shape[1]
            and w.dim() == 2
            and x.dtype is w.dtype
            and x.dtype in dtypes.SUPPORTED
            and x.device == w.device
            and x.layout is w.layout is torch.strided
            and (
                b is None
                or (
                    b.dtype is x.dtype
                    and b.dim() == 1
                    and b.shape[0] == w.shape[0]
                    and b.device == x.device
                    and b.layout is torch.strided
                )
            )
        )
    except (AttributeError, IndexError, RuntimeError):  # the last from a nested tensor
        return False


def linear(op: str, x: object, w: object, b: object) -> None:
    """Shapes, dtypes and devices of a linear map."""
    if _is_plain_linear(x, w, b):
        return
    x, w = tensor(op, "input", x), tensor(op, "weight", w)
    if x.dim() == 0:
        raise ValueError(f"{op}: input must be (..., K), got a 0-D tensor")
    if w.dim() != 2 or w.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must be (N, K) with K = {x.shape[-1]} to match input {_shape(x)}, "
            f"got {_shape(w)}"
        )
    if w.dtype != x.dtype:
        raise TypeError(f"{op}: weight must be {x.dtype} like input, got {w.dtype}")
    same_device(op, "weight", w, x)
    if b is not None:
        vector(op, "bias", b, x, w.shape[0], f"weight {_shape(w)}")


def _is_plain_bias(x: object, b: object) -> bool:
    """True for the usual right arguments, as in _is_plain_linear."""
    try:
        return (
            x.shape[-1:] == b.shape
            and b.dim() == 1
            and x.dtype is b.dtype
            and x.dtype in dtypes.SUPPORTED
            and x.device == b.device
            and x.layout is b.layout is torch.strided
        )
    except (AttributeError, IndexError, RuntimeError):  # the last from a nested tensor
        return False


def elementwise(op: str, x: object, b: object) -> None:
    """Shapes, dtypes and devices of an epilogue on (..., N)."""
    if b is None and type(x) is Tensor and x.dtype in dtypes.KERNEL:
        if x.layout is torch.strided and not x.is_nested:
            return
    if _is_plain_bias(x, b):
        return
    x = tensor(op, "input", x)
    if b is not None:
        if x.dim() == 0:
            raise ValueError(f"{op}: input must be (..., N) to add a bias, got a 0-D tensor")
        vector(op, "bias", b, x, x.shape[-1], f"input {_shape(x)}")


def epilogue(op: str, x: Tensor, columns: int, e: Epilogue) -> None:
    """What the registered ops take as numbers; for calls that go to them directly."""
    if not 0 <= e.act < len(activations.TABLE):
        raise ValueError(f"{op}: act must be an id in [0, {len(activations.TABLE)}), got {e.act}")
    if e.act == activations.PRELU:
        slope(op, e.act, e.slope, columns)
        same_device(op, "slope", e.slope, x)
        vector_dtype(op, "slope", e.slope, x)
    if not math.isfinite(e.scale):
        raise ValueError(f"{op}: scale must be finite, got {e.scale}")
    if not 0 <= e.threshold <= philox.TWO32:
        raise ValueError(f"{op}: threshold must be in [0, 2^32], got {e.threshold}")
    if e.threshold:
        if e.state is None:
            raise ValueError(f"{op}: state must be an int64 tensor (seed, stream), got None")
        state(op, e.state, x.device)
        row_range(op, rows(x), columns, e.row_offset)


def classes(op: str, x: object, target: object) -> None:
    """Logits and int64 numbers of classes, of any shape."""
    tensor(op, "input", x)
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{op}: target must be a torch.Tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64 class numbers, got {target.dtype}")


def class_targets(op: str, x: Tensor, target: Tensor) -> None:
    """Logits (M, C) of one class or more, and the int64 numbers of their classes (M,)."""
    classes(op, x, target)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{op}: input must be (M, C) with at least one class, got {_shape(x)}")
    if target.shape != x.shape[:1]:
        raise ValueError(
            f"{op}: target must be (M,) with M = {x.shape[0]} to match input {_shape(x)}, "
            f"got {_shape(target)}"
        )
    same_device(op, "target", target, x)


def positive_sizes(op: str, name: str, sizes: Sequence[object]) -> tuple[int, ...]:
    """A sequence of ints >= 1."""
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{op}: {name} must be ints, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {size}")
    return tuple(sizes)


def module(op: str, m: object) -> None:
    """TypeError if m is no nn.Module."""
    if not isinstance(m, torch.nn.Module):
        raise TypeError(f"{op}: module must be an nn.Module, got {type(m).__name__}")
