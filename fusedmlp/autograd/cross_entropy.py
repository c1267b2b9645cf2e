"""Cross-entropy of class numbers: the loss of every row and its gradient in one kernel.

The public function and its torch.autograd.Function, which is this short because the kernel of
forward has the gradient already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import compat
from ..backends import choice, registry
from ..ops import BY_BACKEND
from ..spec import activations, checks, dtypes
from .linear_act import is_watched

_OP = "cross_entropy"
_REDUCTIONS = ("mean", "sum", "none")


def _shares(target: Tensor, classes: int, smoothing: float, dtype: torch.dtype) -> Tensor:
    """q (M, C), what the probabilities should be; a row of any values where a class is unknown."""
    q = torch.full((target.shape[0], classes), smoothing / classes, dtype=dtype)
    at = target.clamp(0, classes - 1)[:, None]
    return q.to(target.device).scatter_add_(1, at, torch.full_like(at, 1 - smoothing, dtype=dtype))


class CrossEntropy(torch.autograd.Function):
    """losses (M,) of logits (M, C) and target (M,), 0 for rows of ignore_index.

    Keeps the logits beside their gradient: a second derivative is taken through softmax(logits).
    """

    @staticmethod
    def forward(ctx, logits, target, backend, label_smoothing, ignore_index):
        losses, dlogits = BY_BACKEND[backend].cross_entropy(
            logits, target, label_smoothing, ignore_index, 1.0
        )
        ctx.save_for_backward(logits, target, dlogits)
        ctx.numbers = label_smoothing, ignore_index
        return losses

    @staticmethod
    def backward(ctx, dlosses):
        logits, target, dlogits = ctx.saved_tensors
        smoothing, ignore_index = ctx.numbers
        # Selected: the mean over no row at all has an infinite gradient.
        g = torch.where(target == ignore_index, 0.0, dlosses)[:, None]
        if torch.compiler.is_compiling():
            dz = (dlogits * g).to(logits.dtype)
        elif is_watched(dlosses):
            p = F.softmax(logits.to(dlosses.dtype), dim=1)
            q = _shares(target, logits.shape[1], smoothing, p.dtype)
            known = (target >= 0) & (target < logits.shape[1]) | (target == ignore_index)
            dz = torch.where(known[:, None], (p - q) * g, float("nan")).to(logits.dtype)
        else:
            # With one rounding: g may be outside the range of 16 bits where the product is not.
            dz = torch.mul(dlogits, g, out=torch.empty_like(dlogits))
        return dz, None, None, None, None


def _check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """On a CPU, where looking costs no synchronisation; on a GPU such a row is NaN."""
    if type(target) is not Tensor or target.is_cuda or target.numel() == 0:
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        raise ValueError(
            f"{_OP}: target must be in [0, C) with C = {classes}, or ignore_index = "
            f"{ignore_index}, got {target[wrong][0].item()}"
        )


def _backend_for(x: Tensor, backend: str | None, transformed: bool) -> str:
    named = registry.explicit(backend)
    if transformed:
        if named in (None, "reference"):
            return registry.EAGER
        raise registry.BackendError(
            f"{_OP}: backend {named!r} was asked for but cannot be used:\n"
            "    inside torch.func transforms (vmap, grad, ...) and forward mode only "
            "'reference' runs"
        )
    if named is None and x.device.type == "cpu":
        return registry.EAGER  # PyTorch's own two kernels: no other one here is faster
    rows, classes = x.shape
    chosen = choice.select(
        _OP, x.device.type, x.dtype, activations.NONE, False, rows, 0, classes, backend
    )
    # Plain PyTorch too, and it gives NaN for a target that is no class, which ends the process of
    # F.cross_entropy on a GPU.
    return "reference" if chosen == registry.EAGER else chosen


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(input) with class numbers, and its gradient in the same pass.

    Same values as F.cross_entropy(input, target, label_smoothing=label_smoothing,
    ignore_index=ignore_index, reduction=reduction), computed in fp32 whatever input's dtype.

    input            (C,), (M, C) or (M, C, ...)  logits, fp32, fp16 or bf16 (fp64 on reference)
    target           (), (M,) or (M, ...)  int64 numbers of classes, or ignore_index
    label_smoothing  e in [0, 1]: the target has probability 1 - e + e / C, every other class e / C
    ignore_index     rows of this target have loss and gradient 0 and are not counted
    reduction        'mean' over the rows that are counted (NaN if there is none), 'sum' or 'none'
    backend          'native' (CUDA), 'triton', 'reference' or None for automatic choice
    returns          0-D, or the shape of target for 'none'; dtype of input, fp32 under autocast
    raises           ValueError, TypeError for arguments; BackendError for a backend that cannot
                     run it. A target that is no class raises on a CPU; on a GPU, where looking
                     would wait for the device, its loss and gradient are NaN.

    Class weights and class probabilities are left to F.cross_entropy. Differentiable twice.
    """
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            cross_entropy, (input, target), input, target, label_smoothing=label_smoothing,
            ignore_index=ignore_index, reduction=reduction, backend=backend,
        )  # fmt: skip
    checks.classes(_OP, input, target)
    smoothing = checks.probability(_OP, label_smoothing, "label_smoothing")
    ignore_index = checks.int64(_OP, "ignore_index", ignore_index)
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"{_OP}: reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}"
        )
    x, flat = _rows_of(input, target)
    checks.class_targets(_OP, x, flat)
    transformed = compat.is_transformed()
    if not transformed and not torch.compiler.is_compiling():
        _check_range(flat, x.shape[1], ignore_index)
    chosen = _backend_for(x, backend, transformed)
    if chosen == registry.EAGER:
        return F.cross_entropy(
            input,
            target,
            label_smoothing=smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    losses = CrossEntropy.apply(x, flat, chosen, smoothing, ignore_index)
    if reduction == "none":
        result = losses.reshape(target.shape)
    else:
        result = losses.sum()
        if reduction == "mean":
            result = result / (flat != ignore_index).sum()
    autocast = dtypes.autocast_dtype(x.device.type) is not None
    return result if autocast else result.to(input.dtype)


def _rows_of(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(M, C) and (M,): a view where there is one."""
    if input.dim() == 1 and target.dim() == 0:
        x, flat = input[None], target[None]
    elif input.dim() > 2 and target.shape == (input.shape[0], *input.shape[2:]):
        # Not -1: with an empty tensor it would be ambiguous.
        x = input.movedim(1, -1).reshape(target.numel(), input.shape[1])
        flat = target.reshape(target.numel())
    else:
        x, flat = input, target
    return x, flat
