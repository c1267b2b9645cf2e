"""What is measured: one network on so many rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from ..backends import measured
from ..spec import activations, dtypes

_DTYPES = {dtypes.SHORT[d]: d for d in dtypes.KERNEL}


@dataclass(frozen=True)
class Work:
    """A call of a network; in_features 0 is an activation alone.

    layers     (activation, whether it drops, out_features) of each
    gradients  forward and backward, else forward alone
    """

    device: str
    dtype: str
    rows: int
    in_features: int
    layers: tuple[tuple[str, bool, int], ...]
    gradients: bool

    @classmethod
    def from_dict(cls, plain: dict) -> Work:
        return cls(**plain | {"layers": tuple(map(tuple, plain["layers"]))})

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def kinds(self) -> list[tuple[int, bool, int]]:
        """The layers as choice.py takes them."""
        return [(activations.IDS[act], drops, n) for act, drops, n in self.layers]

    @property
    def drops(self) -> bool:
        return any(drops for _, drops, _ in self.layers)

    @property
    def key(self) -> str:
        return measured.call_key(
            self.torch_dtype, self.rows, self.in_features, self.kinds, self.gradients
        )

    @property
    def class_key(self) -> str:
        return measured.class_key(
            self.torch_dtype, self.rows, self.in_features, self.kinds, self.gradients
        )

    def __str__(self) -> str:
        net = "-".join(str(n) for n in (self.in_features, *(n for _, _, n in self.layers)))
        acts = "/".join(dict.fromkeys(act for act, _, _ in self.layers if act != "none")) or "none"
        drops = ", dropout" * self.drops
        mode = "forward and backward" if self.gradients else "forward"
        return f"{self.rows} x {net}, {acts}{drops}, {self.dtype}, {self.device}, {mode}"
