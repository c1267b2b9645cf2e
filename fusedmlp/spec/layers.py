"""The values that calls are made of: the epilogue of one op, a layer, and a network in flat form.

The ops mlp_fwd and mlp_bwd take a whole network in flat form:

params   of each layer in turn: w (N, K), then b (N,) and slope (1 or N) if it has them
ints     of each layer: act, threshold, stream offset, and which params it has, as bits
numbers  of each layer: alpha, scale
needs    of each layer: the gradients that are wanted, as bits
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import activations

INTS, NUMBERS = 4, 2  # of each layer
W, B, SLOPE = 1, 2, 4  # bits
BITS = W, B, SLOPE


class Epilogue(NamedTuple):
    """What follows the product of a layer: y = drop(act(x w^T + bias)). In the order of the ops.

    bias           (N,), or None
    slope          1 or N elements for prelu, else None
    state          (2,) int64, seed and stream of the mask, or None where nothing is dropped
    act, alpha     id in spec/activations.py; slope of leaky_relu
    threshold      of spec/philox.py; 0: nothing is dropped
    scale          what kept elements are multiplied with, 1 / (1 - p)
    stream_offset  int64, added to the stream
    row_offset     index of the first row in the mask
    """

    bias: Tensor | None
    slope: Tensor | None
    state: Tensor | None
    act: int
    alpha: float
    threshold: int
    scale: float
    stream_offset: int
    row_offset: int

    @property
    def numbers(self) -> tuple:
        """All but the tensors."""
        return self[3:]

    def saves(self, dtype: torch.dtype) -> int:
        """Which tensor backward needs: a SAVE_... of spec/activations.py."""
        return activations.saves(self.act, self.alpha, dtype, self.threshold != 0)


class Layer(NamedTuple):
    """A weight (N, K) and the epilogue of its product."""

    weight: Tensor
    epilogue: Epilogue


def bits_of(ints: list[int]) -> list[int]:
    """Which params each layer has."""
    return ints[INTS - 1 :: INTS]


def count_params(ints: list[int]) -> int:
    """How many params there are."""
    return sum(bits.bit_count() for bits in bits_of(ints))


def pack(layers: Iterable[Layer]) -> tuple[list[Tensor], list[int], list[float]]:
    """params, ints and numbers of a network."""
    params, ints, numbers = [], [], []
    for weight, e in layers:
        tensors = weight, e.bias, e.slope
        bits = sum(bit for bit, t in zip(BITS, tensors, strict=True) if t is not None)
        params += [t for t in tensors if t is not None]
        ints += [e.act, e.threshold, e.stream_offset, bits]
        numbers += [e.alpha, e.scale]
    return params, ints, numbers


def unpack(
    params: list[Tensor],
    ints: list[int],
    numbers: list[float],
    state: Tensor | None,
    row_offset: int,
) -> Iterator[Layer]:
    """The inverse of `pack`; state and row_offset are those of all layers."""
    rest = iter(params)
    for i, bits in enumerate(bits_of(ints)):
        w, b, slope = (next(rest) if bits & bit else None for bit in BITS)
        act, threshold, stream_offset = ints[INTS * i : INTS * i + 3]
        alpha, scale = numbers[NUMBERS * i : NUMBERS * (i + 1)]
        drop = threshold, scale, stream_offset, row_offset
        yield Layer(w, Epilogue(b, slope, state, act, alpha, *drop))


def needed(ints: list[int], needs: list[int]) -> list[bool]:
    """For each of the params, whether its gradient is wanted."""
    pairs = zip(bits_of(ints), needs, strict=True)
    return [bool(need & bit) for bits, need in pairs for bit in BITS if bits & bit]


def needs_of(ints: list[int], wanted: tuple[bool, ...]) -> list[int]:
    """The inverse of `needed`."""
    rest = iter(wanted)
    return [sum(bit for bit in BITS if bits & bit and next(rest)) for bits in bits_of(ints)]
