"""Statistics of dropout masks that catch known faults, for any number of draws."""

import math

import torch
from torch import Tensor

from fusedmlp.spec import philox

LAGS = [(0, c) for c in range(1, 9)] + [(r, 0) for r in (1, 2, 8, 16, 31, 32, 33, 64)] + [(1, 1)]
LOOKS = 1 + len(LAGS)


def _scaled_mean(keep: Tensor, scale: float, p: float) -> float:
    """Deviation of E[y] / x from 1, in standard errors."""
    mean = int(keep.count_nonzero()) / keep.numel() * scale
    return (mean - 1) / (math.sqrt(p * (1 - p) / keep.numel()) * scale)


def _correlation(keep: Tensor, rows: int, columns: int, p: float) -> float:
    """Correlation of the mask with itself, shifted by (rows, columns), in standard errors."""
    a, b = keep[rows:, columns:], keep[: keep.shape[0] - rows, : keep.shape[1] - columns]
    # The sum of (a - q) (b - q).
    n, q = a.numel(), 1 - p
    both, kept = int((a & b).count_nonzero()), int(a.count_nonzero()) + int(b.count_nonzero())
    return (both - q * kept + n * q * q) / (p * q * math.sqrt(n))


def suspicious(keep: Tensor, scale: float, p: float) -> list[str]:
    """What is wrong with a mask (M, N) at five standard errors, the threshold for 18 looks."""
    found = [] if abs(_scaled_mean(keep, scale, p)) < 5 else ["mean"]
    return found + [f"lag {lag}" for lag in LAGS if abs(_correlation(keep, *lag, p)) >= 5]


def byte_wide(rows: int, columns: int, p: float) -> Tensor:
    """Negative control, shipped by a well-known library: dropped below floor(256 p) / 256."""
    state, keep = torch.tensor([20, 22]), torch.empty(rows, columns, dtype=torch.bool)
    for first in range(0, rows, 4096):
        part = keep[first : first + 4096]
        part.copy_(philox.windows(state, 0, len(part), columns, first) >> 24 >= math.floor(256 * p))
    return keep


def repeating(keep: Tensor) -> Tensor:
    """Negative control, shipped by a well-known library: the row block is not in the counter."""
    return keep[:32].repeat(len(keep) // 32, 1)
