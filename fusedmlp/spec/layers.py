"""The flat form in which the ops mlp_fwd and mlp_bwd take a whole network.

params   of each layer in turn: w (N, K), then b (N,) and slope (1 or N) if it has them
ints     of each layer: act, threshold, layer, and which params it has, as bits
numbers  of each layer: alpha, scale
needs    of each layer: the gradients that are wanted, as bits
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

INTS, NUMBERS = 4, 2  # of each layer
W, B, SLOPE = 1, 2, 4  # bits
BITS = W, B, SLOPE


class Layer(NamedTuple):
    """drop(act(x w^T + b)); the fields mean what the arguments of linear_act mean."""

    w: Tensor
    b: Tensor | None
    slope: Tensor | None
    act: int
    alpha: float
    threshold: int
    scale: float
    layer: int

    def epilogue(self, state: Tensor | None, row_offset: int) -> tuple:
        """The arguments that all ops share, in their order."""
        numbers = self.act, self.alpha, self.threshold, self.scale, self.layer, row_offset
        return self.b, self.slope, state, *numbers


def bits_of(ints: list[int]) -> list[int]:
    """Which params each layer has."""
    return ints[INTS - 1 :: INTS]


def count_params(ints: list[int]) -> int:
    """How many params there are."""
    return sum(bits.bit_count() for bits in bits_of(ints))


def layers(params: list[Tensor], ints: list[int], numbers: list[float]) -> Iterator[Layer]:
    """The layers of a network in flat form, in order."""
    rest = iter(params)
    for i, bits in enumerate(bits_of(ints)):
        w, b, slope = (next(rest) if bits & bit else None for bit in BITS)
        act, threshold, layer = ints[INTS * i : INTS * i + 3]
        alpha, scale = numbers[NUMBERS * i : NUMBERS * (i + 1)]
        yield Layer(w, b, slope, act, alpha, threshold, scale, layer)


def needed(ints: list[int], needs: list[int]) -> list[bool]:
    """For each of the params, whether its gradient is wanted."""
    pairs = zip(bits_of(ints), needs, strict=True)
    return [bool(need & bit) for bits, need in pairs for bit in BITS if bits & bit]


def needs_of(ints: list[int], wanted: tuple[bool, ...]) -> list[int]:
    """The inverse of `needed`."""
    rest = iter(wanted)
    return [sum(bit for bit in BITS if bits & bit and next(rest)) for bits in bits_of(ints)]
