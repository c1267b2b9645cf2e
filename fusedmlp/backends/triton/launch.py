"""Host side that all Triton ops share: views, constants and the launch itself. No kernel."""

import functools

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from ...spec import activations, philox
from ...spec.layers import Epilogue
from . import tiles
from .activations import act_fwd

# The interpreter replaces the type of every kernel when it is on while the kernels are defined.
INTERPRET = not isinstance(act_fwd, triton.runtime.jit.JITFunction)

KEEP_ALL, KEEP_SOME, KEEP_NONE = 0, 1, 2


def rows_view(t: Tensor) -> Tensor:
    """t (..., N) as (M, N): a view with t's own strides where one exists, else a copy."""
    if t.dim() == 2:
        return t
    if t.dim() <= 1:
        return t.reshape(1, -1)
    # Not -1: with an empty tensor it would be ambiguous.
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def epilogue_arguments(e: Epilogue, saves: int = activations.SAVE_PREACT):
    """(pointers, numbers, compile-time constants) of a kernel's epilogue, in its order.

    saves  of a backward kernel, which reads the bias only beside a preactivation
    """
    dropout, threshold, slope = KEEP_SOME, e.threshold, e.slope
    if threshold == 0:
        dropout = KEEP_ALL
    elif threshold == philox.TWO32:
        dropout, threshold = KEEP_NONE, 0
    elif threshold >= 1 << 31:
        threshold -= philox.TWO32  # the same bits as an int32
    slopes = 0  # alpha serves; 1: one learnable slope; 2: one a column
    if e.act == activations.PRELU:
        slopes = 1 if slope.numel() == 1 else 2
    pointers = (
        e.bias.contiguous() if e.bias is not None and saves == activations.SAVE_PREACT else None,
        slope.contiguous() if slopes else None,
        e.state.contiguous() if dropout == KEEP_SOME else None,
    )
    numbers = e.alpha, threshold, e.scale, e.stream_offset, e.row_offset
    return pointers, numbers, {"ACT": e.act, "SLOPES": slopes, "DROPOUT": dropout}


# Asked for by name: multiplications and additions may be joined, as in PyTorch's own kernels.
_OPTIONS = {"enable_fp_fusion": True}

# What Triton compiled for calls of one kind. Its own launcher finds that again in 20 to 30 us a
# call, by formatting the specialisation of every argument; this takes a third.
_compiled: dict[tuple, object] = {}


def _specialization(args: tuple) -> list | None:
    """What Triton compiles apart: dtypes, alignment, ones, multiples of 16, 64-bit numbers.

    None where an argument is made new for each call (a descriptor).
    """
    key = []
    for a in args:
        if a is None or isinstance(a, float):
            key.append(None)
        elif isinstance(a, Tensor):
            key.append(a.dtype)
            key.append(a.data_ptr() & 15 == 0)
        elif isinstance(a, int):
            key.append((a == 1) + 2 * (a & 15 == 0) + 4 * (-(1 << 31) <= a < 1 << 31))
        else:
            return None
    return key


def launch(kernel, programs: int, like: Tensor, *args, warps: int, stages: int = 1, **constants):
    """Runs `programs` programs of a kernel on like's device and its current stream."""
    device = like.device.index
    if like.is_cuda:
        current = torch.cuda.current_device()
        if device is None:  # a device without a number is the current one
            device = current
        elif device != current:
            with torch.cuda.device(device):
                launch(kernel, programs, like, *args, warps=warps, stages=stages, **constants)
            return
    # On AMD GPUs Triton also tells tensors apart by their size.
    direct = not INTERPRET and torch.version.hip is None
    key = _specialization(args) if direct else None
    if key is not None:
        key = (kernel, device, warps, stages, *constants.values(), *key)
        found = _compiled.get(key)
        if found is not None:
            compiled, names = found
            compiled[(programs, 1, 1)](*args, *[constants[n] for n in names])
            return
    compiled = kernel[(programs,)](
        *args, **constants, **_OPTIONS, num_warps=warps, num_stages=stages
    )
    # Tools that replace Triton's launcher, as sanitizers do, may return something else.
    if key is not None and isinstance(compiled, CompiledKernel):
        _compiled[key] = compiled, kernel.arg_names[len(args) :]


@functools.cache
def _capability(index: int) -> tiles.Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return tiles.Target("hip", 0, properties.multi_processor_count, tiles.SHARED["hip"])
    major, minor = properties.major, properties.minor
    return tiles.target(10 * major + minor, properties.multi_processor_count)


def capability(t: Tensor) -> tiles.Target:
    """What tiles are chosen for: the device of t; in the interpreter a Hopper GPU, but with one
    multiprocessor, as it runs one program at a time."""
    if not t.is_cuda:
        return tiles.target(90, 1)
    index = t.device.index
    return _capability(torch.cuda.current_device() if index is None else index)
