"""The one definition of the dropout mask: Philox 4x32-10 keyed on (seed, stream, row, column).

The mask is a pure function of those four numbers. It does not depend on the backend, the device,
a tile, the number of threads, strides, or how a batch is split over processes. Kernels that draw
the same bits say "implements philox.py". docs/dropout.md states it for other projects.

    key      = (seed mod 2^32, seed div 2^32)              the seed as an unsigned 64-bit number
    counter  = (column div 8, row, stream mod 2^32, stream div 2^32)
    w[0..3]  = philox4x32_10(counter, key)
    window   = w[k]                                        for column mod 8 = 2k
             = (w[k] >> 16) | (w[(k + 1) mod 4] << 16)     for column mod 8 = 2k + 1, low 32 bits
    dropped  = window < T,  T = round(p * 2^32);  kept values are multiplied by fp32(1 / (1 - p))

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
This file does not decide when to draw a seed; functional.py does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TWO32 = 1 << 32
_LOW32 = TWO32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def threshold_and_scale(p: float) -> tuple[int, float]:
    """T = round(p * 2^32) and the scale 1 / (1 - p) rounded once to fp32 (1.0 at p = 0 and p = 1).

    T = 0 means that nothing is dropped, T = 2^32 that everything is.
    """
    threshold = round(p * TWO32)
    if threshold == 0 or threshold == TWO32:
        return threshold, 1.0
    # Rounded to 24 bits with Python's numbers: a tensor here would break a graph being compiled.
    mantissa, exponent = math.frexp(1.0 / (1.0 - p))
    return threshold, math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)


def state_of(seed: int, stream: int, device: torch.device | str | None) -> Tensor:
    """(2,) int64: two numbers as the state that the ops take."""
    if device is None or torch.device(device).type == "cpu":
        return torch.tensor([seed, stream], dtype=torch.int64, device=device)
    # Filled on the device: a copy from the host would wait for a GPU, and cannot be captured.
    state = torch.full((2,), seed, dtype=torch.int64, device=device)
    state[1:].fill_(stream)
    return state


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 on int64 tensors that hold unsigned 32-bit words.

    counter  4 words, broadcast against each other
    key      2 words
    returns  4 words, each int64 in [0, 2^32)
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two 32-bit words wraps in int64, but its 64 bits are the right ones.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW32) ^ c1 ^ k0,
            product1 & _LOW32,
            ((product0 >> 32) & _LOW32) ^ c3 ^ k1,
            product0 & _LOW32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def windows(state: Tensor, layer: int, rows: int, columns: int, row_offset: int = 0) -> Tensor:
    """The 32-bit window of every element.

    state       (2,) int64: seed and stream
    layer       added to the stream, wrapping at 64 bits
    row_offset  added to the row index
    returns     (rows, columns) int64 in [0, 2^32), on state's device
    """
    device = state.device
    seed, stream = state[0], state[1] + layer
    row = (torch.arange(rows, device=device) + row_offset).unsqueeze(1)  # (rows, 1)
    group = torch.arange((columns + 7) // 8, device=device).unsqueeze(0)  # (1, groups)
    w = philox(
        (group, row, stream & _LOW32, (stream >> 32) & _LOW32),
        (seed & _LOW32, (seed >> 32) & _LOW32),
    )
    even = torch.stack(w, dim=-1)  # (rows, groups, 4)
    odd = (even >> 16) | ((even.roll(-1, dims=-1) << 16) & _LOW32)
    return torch.stack((even, odd), dim=-1).reshape(rows, 8 * group.shape[1])[:, :columns]


def keep_mask(
    state: Tensor, layer: int, rows: int, columns: int, threshold: int, row_offset: int = 0
) -> Tensor:
    """(rows, columns) bool on state's device: True where the element is kept."""
    return windows(state, layer, rows, columns, row_offset) >= threshold


def dropout_mask(
    seed: int,
    stream: int,
    rows: int,
    columns: int,
    p: float,
    *,
    row_offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask that every backend applies for these numbers, as (rows, columns) bool, True = kept.

    For tests and for other projects; no kernel calls it.
    """
    state = state_of(seed, stream, device)
    return keep_mask(state, 0, rows, columns, threshold_and_scale(p)[0], row_offset)
