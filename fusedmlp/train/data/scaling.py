"""Scaling: how rows of a data set become inputs of a network."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """rows (B, ...) as stored -> inputs (B, ...) of dtype: (rows / divisor - mean) / std, computed
    in the wider type of dtype and mean."""

    divisor: float = 1.0
    mean: Tensor | None = None  # () or the shape of one row
    std: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_rows(cls, rows: Tensor, divisor: float = 1.0, *, each: bool = True) -> "Scaling":
        """The scaling to mean 0 and deviation 1 over rows (n, ...), in fp64 as StandardScaler.

        each  every feature by itself; else all of them have one pair of numbers
        """
        if rows.dtype == torch.uint8 and not each:
            counts = torch.bincount(rows.flatten(), minlength=256).double()
            values = torch.arange(256, dtype=torch.float64, device=rows.device) / divisor
            mean = (counts * values).sum() / counts.sum()
            return cls(divisor, mean, ((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt())
        rows = rows.double() / divisor if each else rows.double().reshape(-1) / divisor
        mean = rows.mean(0)
        mean = mean + (rows - mean).mean(0)
        variance = (rows - mean).square().mean(0)
        # The deviation that rounding gives a constant must not be divided by.
        rounding = len(rows) * torch.finfo(torch.float64).eps
        is_constant = variance <= rounding * variance + (rounding * mean) ** 2
        return cls(divisor, mean, torch.where(is_constant, 1.0, variance.sqrt()))

    def __call__(self, rows: Tensor) -> Tensor:
        if self.divisor == 1.0 and self.mean is None:
            # Integers that need no scaling are indices, for a model that begins with an embedding.
            return rows.to(self.dtype) if rows.is_floating_point() else rows
        if self.mean is None:
            return rows.to(self.dtype, copy=True).div_(self.divisor)
        wide = torch.promote_types(self.dtype, self.mean.dtype)
        inputs = rows.to(wide, copy=True)
        if self.divisor != 1.0:
            inputs.div_(self.divisor)
        return inputs.sub_(self.mean).div_(self.std).to(self.dtype)

    def undo(self, inputs: Tensor) -> Tensor:
        """Scaled values back in their own units, in fp64."""
        values = inputs.double()
        return values if self.mean is None else values * self.std.to(values) + self.mean.to(values)

    def to(self, device=None, dtype=None) -> "Scaling":
        """Mean and deviation on this device and of this type."""
        if self.mean is None:
            return self
        return replace(self, mean=self.mean.to(device, dtype), std=self.std.to(device, dtype))

    def to_dict(self) -> dict:
        listed = {"divisor": self.divisor}
        if self.mean is not None:
            listed |= {"mean": self.mean.tolist(), "std": self.std.tolist()}
            listed["dtype"] = str(self.mean.dtype).removeprefix("torch.")
        return listed

    @classmethod
    def from_dict(cls, listed: dict) -> "Scaling":
        if "mean" not in listed:
            return cls(listed["divisor"])
        dtype = getattr(torch, listed["dtype"])
        mean, std = (torch.tensor(listed[name], dtype=dtype) for name in ("mean", "std"))
        return cls(listed["divisor"], mean, std)
