"""The one table of activations: id, name, value, derivative and what backward needs.

Every backend takes its ids from here. Nothing in this file chooses a backend or checks user input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# What backward reads besides the incoming gradient (design: a mask is never saved).
SAVE_NOTHING, SAVE_Y, SAVE_PREACT = 0, 1, 2


@dataclass(frozen=True)
class Activation:
    """One activation.

    id        stable number, never changed or reused
    forward   (z, slope) -> act(z); slope is a float or a tensor, only read by leaky_relu and prelu
    from_z    (z, slope) -> act'(z)
    from_y    (y, slope) -> act'(z) read off y = act(z), or None where y does not determine it
    """

    id: int
    name: str
    forward: Callable[[Tensor, Tensor | float], Tensor]
    from_z: Callable[[Tensor, Tensor | float], Tensor]
    from_y: Callable[[Tensor, Tensor | float], Tensor] | None = None


def _where_positive(z: Tensor, one: Tensor | float, other: Tensor | float) -> Tensor:
    return torch.where(z > 0, torch.as_tensor(one, dtype=z.dtype, device=z.device), other)


def _relu_derivative(z: Tensor, slope: Tensor | float) -> Tensor:
    # not (z <= 0), so that a NaN passes its gradient, as in F.relu.
    return (~(z <= 0)).to(z.dtype)


def _leaky_forward(z: Tensor, slope: Tensor | float) -> Tensor:
    return torch.where(z > 0, z, z * slope)


def _leaky_derivative(z: Tensor, slope: Tensor | float) -> Tensor:
    slope = torch.as_tensor(slope, dtype=z.dtype, device=z.device)
    return torch.where(z > 0, torch.ones_like(z), slope)


def _elu_derivative_z(z: Tensor, slope: Tensor | float) -> Tensor:
    return _where_positive(z, 1.0, torch.exp(z.clamp(max=0)))


def _elu_derivative_y(y: Tensor, slope: Tensor | float) -> Tensor:
    return torch.where(y > 0, torch.ones_like(y), (y + 1).clamp(0, 1))


def _sigmoid_derivative_z(z: Tensor, slope: Tensor | float) -> Tensor:
    s = torch.sigmoid(z)
    # sigmoid(-z), not 1 - s: the difference loses every digit once s rounds to 1.
    return s * torch.sigmoid(-z)


def _tanh_derivative_z(z: Tensor, slope: Tensor | float) -> Tensor:
    t = torch.tanh(z)
    return (1 - t) * (1 + t)


def _softplus_derivative_z(z: Tensor, slope: Tensor | float) -> Tensor:
    return _where_positive(z - 20, 1.0, torch.sigmoid(z))


def _gelu_derivative(z: Tensor, slope: Tensor | float) -> Tensor:
    cdf = 0.5 * torch.erfc(-z * math.sqrt(0.5))
    pdf = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    return cdf + z * pdf


def _gelu_tanh_derivative(z: Tensor, slope: Tensor | float) -> Tensor:
    beta, kappa = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(beta * (z + kappa * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t) * (1 + t) * beta * (1 + 3 * kappa * z * z)


def _silu_derivative(z: Tensor, slope: Tensor | float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * torch.sigmoid(-z))


def _relu_squared_derivative_y(y: Tensor, slope: Tensor | float) -> Tensor:
    # The inner where keeps the derivative of sqrt at 0 out of a second differentiation.
    positive = ~(y <= 0)
    return torch.where(positive, 2 * torch.where(positive, y, 1.0).sqrt(), 0.0)


def times_from_z(act: int, g: Tensor, z: Tensor, slope: Tensor | float) -> Tensor:
    """g * act'(z)."""
    dz = g * TABLE[act].from_z(z, slope)
    # Not even an infinite g passes a ReLU where z is not above 0.
    return torch.where(z <= 0, 0.0, dz) if act in (RELU, RELU_SQUARED) else dz


def times_from_y(act: int, g: Tensor, y: Tensor, slope: Tensor | float) -> Tensor:
    """g * act'(z), read off y = act(z)."""
    dz = g * TABLE[act].from_y(y, slope)
    if act == RELU_SQUARED:
        # An infinite y may be a large z squared, whose derivative is finite.
        dz = torch.where((g == 0) & (y == math.inf), g, dz)
        dz = torch.where(y <= 0, 0.0, dz)  # as above
    return dz


TABLE: tuple[Activation, ...] = (
    Activation(0, "none", lambda z, s: z, lambda z, s: torch.ones_like(z)),
    Activation(1, "relu", lambda z, s: F.relu(z), _relu_derivative, _relu_derivative),
    Activation(2, "leaky_relu", _leaky_forward, _leaky_derivative, _leaky_derivative),
    Activation(3, "prelu", _leaky_forward, _leaky_derivative),
    Activation(4, "elu", lambda z, s: F.elu(z), _elu_derivative_z, _elu_derivative_y),
    Activation(
        5,
        "sigmoid",
        lambda z, s: torch.sigmoid(z),
        _sigmoid_derivative_z,
        lambda y, s: (y * (1 - y)).clamp(0, 0.25),
    ),
    Activation(
        6,
        "tanh",
        lambda z, s: torch.tanh(z),
        _tanh_derivative_z,
        lambda y, s: ((1 - y) * (1 + y)).clamp(0, 1),
    ),
    Activation(
        7,
        "softplus",
        lambda z, s: F.softplus(z),
        _softplus_derivative_z,
        lambda y, s: (-torch.expm1(-y)).clamp(0, 1),
    ),
    Activation(8, "gelu", lambda z, s: F.gelu(z), _gelu_derivative),
    Activation(9, "gelu_tanh", lambda z, s: F.gelu(z, approximate="tanh"), _gelu_tanh_derivative),
    Activation(10, "silu", lambda z, s: F.silu(z), _silu_derivative),
    Activation(
        11,
        "relu_squared",
        lambda z, s: F.relu(z).square(),
        lambda z, s: 2 * F.relu(z),
        _relu_squared_derivative_y,
    ),
)

NAMES: tuple[str, ...] = tuple(a.name for a in TABLE)
IDS: dict[str, int] = {a.name: a.id for a in TABLE}

NONE, RELU, LEAKY_RELU, PRELU = IDS["none"], IDS["relu"], IDS["leaky_relu"], IDS["prelu"]
ELU, SIGMOID, TANH, SOFTPLUS = IDS["elu"], IDS["sigmoid"], IDS["tanh"], IDS["softplus"]
GELU, GELU_TANH, SILU = IDS["gelu"], IDS["gelu_tanh"], IDS["silu"]
RELU_SQUARED = IDS["relu_squared"]

_READ_OFF_Y = frozenset({RELU, ELU, SOFTPLUS})


def can_read(act: int, alpha: float, saves: int) -> bool:
    """Whether backward of an activation other than `none` can do with what is saved."""
    if saves == SAVE_Y:
        return TABLE[act].from_y is not None and not (act == LEAKY_RELU and not alpha >= 0)
    return saves == SAVE_PREACT


def saves(act: int, alpha: float, dtype: torch.dtype, dropout: bool) -> int:
    """Which tensor backward needs: SAVE_NOTHING, SAVE_Y (the output) or SAVE_PREACT (x w^T).

    The output is free to save, as the next layer keeps it anyway. It serves where the derivative
    can be read off it within the error budget; with dropout the kept values are y / scale.

    act      id of the activation
    alpha    slope of leaky_relu; a negative one makes y ambiguous
    dtype    of y; fp16 squares under- and overflow, so relu_squared keeps z there
    dropout  True if p > 0
    """
    if act == NONE:
        return SAVE_NOTHING
    if act in _READ_OFF_Y or (act == LEAKY_RELU and alpha >= 0):
        return SAVE_Y
    if act == RELU_SQUARED:
        return SAVE_PREACT if dtype == torch.float16 else SAVE_Y
    if act in (SIGMOID, TANH) and not dropout:
        return SAVE_Y
    return SAVE_PREACT
