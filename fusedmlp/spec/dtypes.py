"""The one dtype policy: what is allowed, what is accumulated in, and what autocast does.

Compute is fp32 for fp32, fp16 and bf16, and fp64 for fp64 (reference backend only). One rounding,
at the store. Does not convert anything by itself outside of `autocast_to`.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUPPORTED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNEL = (torch.float32, torch.float16, torch.bfloat16)

SHORT = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}


def compute(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which activation, dropout and sums are done for values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on this device type, or None when autocast is off."""
    # torch raises for a device type that has no autocast, such as meta.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_to(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Casts as torch.autocast does for F.linear: floating tensors except fp64, differentiably."""
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def fp32_matmul_mode() -> str:
    """How fp32 matrix products may be done on CUDA: 'ieee' or 'tf32'.

    torch.backends.cuda.matmul.fp32_precision; 'none' follows torch.backends.fp32_precision, and
    'none' there means ieee. The older allow_tf32 getter raises once the new setting was used.
    """
    mode = torch.backends.cuda.matmul.fp32_precision
    if mode == "none":
        mode = torch.backends.fp32_precision
    return "tf32" if mode == "tf32" else "ieee"
