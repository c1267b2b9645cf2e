"""Modules that are one op each: FusedLinear and FusedDropout; and ReLUSquared, which torch lacks.

Subclasses of PyTorch's own, with the same keys and the same initial values from the same seed.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations, checks, functional, rng
from .masks import Masks

_DEFAULT_SLOPES = {activations.LEAKY_RELU: 0.01, activations.PRELU: 0.25}


class ReLUSquared(nn.Module):
    """relu(x) ** 2, element by element."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input).square()


def _threshold_and_scale(op: str, p: float, training: bool) -> tuple[int, float]:
    if not training or p == 0:
        return 0, 1.0
    return rng.threshold_and_scale(checks.probability(op, p))


class FusedLinear(nn.Linear):
    """Linear, activation and dropout as one op: nn.Sequential(nn.Linear, activation, nn.Dropout).

    in_features, out_features, bias, device, dtype  as in nn.Linear: same keys, same initial values
    activation  a name of fusedmlp.activations.NAMES; 'none' for a plain linear map
    dropout     probability of dropping in training mode; later read from the attribute `p`
    slope       for leaky_relu its slope (0.01), later `negative_slope`; for prelu the initial value
                (0.25) of the parameter `slope`, which has 1 element and may be replaced by one of N
    raises      ValueError, TypeError for arguments that no layer could have

    first_layer (0) is added to the stream of the dropout state; `fusedmlp.surgery.number_layers`
    gives the layers of a model different ones.
    """

    first_layer = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        slope: float | None = None,
    ):
        op = "FusedLinear"
        self_act = checks.activation(op, activation)
        p = checks.probability(op, dropout, "dropout")
        slope = _slope_value(op, self_act, slope)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.act, self.p, self.negative_slope = self_act, p, 0.0
        if self_act == activations.PRELU:
            self.slope = nn.Parameter(torch.full((1,), slope, device=device, dtype=dtype))
        else:
            self.register_parameter("slope", None)
            self.negative_slope = slope

    @property
    def activation(self) -> str:
        return activations.NAMES[self.act]

    def forward(self, input: Tensor) -> Tensor:
        return self.run_fused(input, Masks(self.first_layer, True))

    fused_forward = forward

    @staticmethod
    def layer_count() -> int:
        return 1

    def run_fused(self, x: Tensor, masks: Masks) -> Tensor:
        """forward, with the masks of the container that this layer is in."""
        op = "linear_act"
        checks.tensor(op, "input", x)
        if self.slope is not None:
            checks.slope(op, self.act, self.slope, self.weight.shape[0])
        layer, state = masks.layer, None
        masks.layer = layer + 1
        threshold, scale = _threshold_and_scale(op, self.p, self.training)
        if threshold:
            state = masks.draw(x)
        return functional.run_linear_act(
            x,
            self.weight,
            self.bias,
            self.slope,
            state,
            self.act,
            self.negative_slope,
            threshold,
            scale,
            layer,
            masks.row_offset,
            None,
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, activation={self.activation!r}, dropout={self.p}"
        if self.act == activations.LEAKY_RELU:
            text += f", slope={self.negative_slope}"
        return text


def _slope_value(op: str, act: int, slope: object) -> float:
    if act not in _DEFAULT_SLOPES:
        if slope is not None:
            name = activations.NAMES[act]
            raise ValueError(f"{op}: slope is for leaky_relu and prelu, got one for {name!r}")
        return 0.0
    if slope is None:
        return _DEFAULT_SLOPES[act]
    if isinstance(slope, bool) or not isinstance(slope, Real):
        raise TypeError(f"{op}: slope must be a number, got {type(slope).__name__}")
    if not math.isfinite(slope):
        raise ValueError(f"{op}: slope must be finite, got {slope}")
    return float(slope)


class FusedDropout(nn.Dropout):
    """nn.Dropout with this package's mask: nothing but the seed is kept for backward.

    p        probability of dropping in training mode
    inplace  the result is also written into the input, as by nn.Dropout; that is one pass more here
    raises   ValueError, TypeError for a p outside of [0, 1]
    """

    first_layer = 0

    def __init__(self, p: float = 0.5, inplace: bool = False):
        super().__init__(checks.probability("FusedDropout", p), inplace)

    def forward(self, input: Tensor) -> Tensor:
        return self.run_fused(input, Masks(self.first_layer, True))

    fused_forward = forward

    @staticmethod
    def layer_count() -> int:
        return 1

    def run_fused(self, x: Tensor, masks: Masks) -> Tensor:
        """forward, with the masks of the container that this layer is in."""
        op = "dropout"
        checks.tensor(op, "input", x)
        layer = masks.layer
        masks.layer = layer + 1
        threshold, scale = _threshold_and_scale(op, self.p, self.training)
        if threshold == 0:
            return x
        state = masks.draw(x)
        y = functional.run_bias_act_dropout(
            x,
            None,
            None,
            state,
            activations.NONE,
            0.0,
            threshold,
            scale,
            layer,
            masks.row_offset,
            None,
        )
        return x.copy_(y) if self.inplace else y
