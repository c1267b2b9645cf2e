"""The launchers of csrc/cuda on the PTX machine, for CPU tensors.

Every call names the memory that it may touch, and what of it is written already, so that nothing
else is read or written; afterwards every element of every output must have been written.
"""

from ctypes import Structure, byref
from functools import cache

import torch

from fusedmlp.spec import activations, dtypes

from . import library
from .arithmetic import Approximations
from .params import DTYPE_IDS, TILES, Bwd, CrossEntropy, Dropout, Epilogue, Fwd, Linear, declare


class Chosen:
    """The target whose library the functions below call."""

    arch = library.ARCHS[0]


@cache
def _typed(found: library.Library) -> library.Library:
    declare(found.calls)
    return found


def chosen() -> library.Library:
    return _typed(library.library(Chosen.arch))


def set_machine(arch=library.ARCHS[0], seed: int | None = None, approximations: int = 0) -> None:
    """The target; the order of warps, side by side or by a seed; which end of their documented
    error approximations take, -1 or 1, or none, 0."""
    Chosen.arch = arch
    chosen().machine.order(seed)
    Approximations.side = approximations


def _span(t: torch.Tensor) -> int:
    """Bytes from the first to one beyond the last element, for any strides."""
    if t.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def _launch(name: str, params: Structure, reads, writes, *extra) -> None:
    found = chosen()
    memory = found.machine.memory
    outputs, named = [], {}
    for tensors, writable in ((writes, True), (reads, False)):
        for t in tensors:
            if t is None or t.numel() == 0 or t.data_ptr() in named:
                continue
            named[t.data_ptr()] = t
            # An output that is an input too has been written.
            written = not writable or any(t is r for r in reads)
            span = _span(t)
            buffer = memory.name(t.data_ptr(), span, t.element_size(), writable, written)
            if writable:
                outputs.append(buffer)
    try:
        found.raise_fault(getattr(found.calls, f"ptx_{name}")(byref(params), *extra))
        missing = [b.unwritten for b in outputs if b.unwritten]
        if missing:
            raise library.Fault(f"{name}: {missing[0]} elements of an output were never written")
    finally:
        memory.buffers.clear()


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An output before its kernel: NaN, so that an element that is not written is seen."""
    return torch.full(shape, float("nan"), dtype=dtype)


def _pointer(t: torch.Tensor | None):
    return None if t is None or t.numel() == 0 else t.data_ptr()


def epilogue(
    like, cols, rows, b, slope, state, act, alpha, threshold, scale, stream_offset, row_offset
):
    def dtype_of(t):
        return DTYPE_IDS[dtypes.SHORT[like.dtype if t is None else t.dtype]]

    return Epilogue(
        _pointer(b),
        _pointer(slope),
        dtype_of(b),
        dtype_of(slope),
        0 if slope is None else slope.numel(),
        act,
        alpha,
        Dropout(_pointer(state), threshold, scale, stream_offset, row_offset),
        dtype_of(None),
        rows,
        cols,
    )


# The functions of a backend (see fusedmlp/backends/), for contiguous 2-D tensors.


def bias_act_dropout_fwd(x, b, slope, state, *numbers, y=None):
    y = unwritten(*x.shape, dtype=x.dtype) if y is None else y
    e = epilogue(x, x.shape[1], x.shape[0], b, slope, state, *numbers)
    params = Fwd(_pointer(y), _pointer(x), e)
    _launch("bias_act_dropout_fwd", params, (x, b, slope, state), (y,))
    return y


def bias_act_dropout_bwd(dy, saved, b, slope, state, *rest, dz=None):
    *numbers, saves, need_db, need_dslope = rest
    dz = unwritten(*dy.shape, dtype=dy.dtype) if dz is None else dz
    db = unwritten(dy.shape[1] if need_db else 0, dtype=b.dtype if need_db else dy.dtype)
    dslope = torch.full_like(slope, float("nan")) if need_dslope else dy.new_empty(0)
    e = epilogue(dy, dy.shape[1], dy.shape[0], b, slope, state, *numbers)
    pointers = (_pointer(t) for t in (dz, db, dslope, dy, saved))
    params = Bwd(*pointers, saves, e)
    reads, writes = (dy, saved, b, slope, state), (dz, db, dslope)
    floats = chosen().calls.ptx_bias_act_dropout_bwd_scratch(byref(params))
    scratch = unwritten(floats, dtype=torch.float32)
    _launch("bias_act_dropout_bwd", params, reads, (*writes, scratch), scratch.data_ptr())
    return dz, db, dslope


def linear_params(x, w, b, slope, state, *numbers, y, h=None):
    e = epilogue(x, w.shape[0], x.shape[0], b, slope, state, *numbers)
    pointers = (_pointer(t) for t in (y, h, x, w))
    return Linear(*pointers, x.stride(0), w.stride(0), x.shape[1], e)


def linear_act_fwd(x, w, b, slope, state, *numbers, want_h=True, tile="by size"):
    """y and h by the tensor-core kernel; unit stride along K, the rest multiples of 16 bytes."""
    y = unwritten(x.shape[0], w.shape[0], dtype=x.dtype)
    h = torch.full_like(y, float("nan")) if want_h else None
    params = linear_params(x, w, b, slope, state, *numbers, y=y, h=h)
    reads = (x, w, b, slope, state)
    _launch("linear_act", params, reads, (y, h), TILES[tile])
    return y, h


def takes(x, w, y) -> bool:
    numbers = (activations.NONE, 0.0, 0, 1.0, 0, 0)
    params = linear_params(x, w, None, None, None, *numbers, y=y)
    return bool(chosen().calls.ptx_linear_act_takes(byref(params)))


def cross_entropy(x, target, smoothing=0.0, ignore_index=-100, grad_scale=1.0):
    losses, dx = unwritten(x.shape[0], dtype=torch.float32), torch.full_like(x, float("nan"))
    pointers = (_pointer(t) for t in (losses, dx, x, target))
    numbers = ignore_index, smoothing, grad_scale, DTYPE_IDS[dtypes.SHORT[x.dtype]]
    params = CrossEntropy(*pointers, *numbers, *x.shape)
    _launch("cross_entropy", params, (x, target), (losses, dx))
    return losses, dx
