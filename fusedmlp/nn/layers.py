"""Modules that are one op each: FusedLinear and FusedDropout; and ReLUSquared, which torch lacks.

Subclasses of PyTorch's own, with the same keys and the same initial values from the same seed.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations, checks, dispatch, functional, rng
from .masks import Masks, must_trace

_LINEAR = "linear_act"
_DEFAULT_SLOPES = {activations.LEAKY_RELU: 0.01, activations.PRELU: 0.25}


class ReLUSquared(nn.Module):
    """relu(x) ** 2, element by element."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input).square()


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
    # (what a call was like, the route that suits it), so that the next one need not be checked.
    _memo = (None, None)

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
        return self.run_fused(input, Masks(self.first_layer, must_trace()))

    fused_forward = forward

    @staticmethod
    def layer_count() -> int:
        return 1

    def run_fused(self, x: Tensor, masks: Masks) -> Tensor:
        """forward, with the masks of the container that this layer is in."""
        checks.tensor(_LINEAR, "input", x)
        layer = masks.layer
        masks.layer = layer + 1
        # Not self.weight, which is a search in Python; functional_call may have put it elsewhere.
        own = self._parameters
        w = own["weight"] if "weight" in own else self.weight
        b = own["bias"] if "bias" in own else self.bias
        slope = own["slope"] if "slope" in own else self.slope
        p, route, named = (self.p if self.training else 0.0), None, masks.named
        if type(p) is not float:
            p = checks.probability(_LINEAR, p)  # a tensor can be changed in place
        if masks.traced:
            threshold, scale = self._check(w, slope, p)
        else:
            what = (type(x), x.shape, x.dtype, x.layout, x.device, torch.is_grad_enabled())
            key = (*what, p, named, id(w), id(b), id(slope))
            memo = self._memo
            if memo[0] != key:
                memo = self.__dict__["_memo"] = key, *self._find(x, w, b, slope, p, named)
            _, route, threshold, scale = memo
        state = masks.draw(x) if threshold else None
        numbers = (self.act, self.negative_slope, threshold, scale, layer, masks.row_offset)
        if route is None or masks.row_offset:
            return functional.run_linear_act(x, w, b, slope, state, *numbers, named)
        return functional.linear_act_on(route, (x, w, b, slope, state, *numbers))

    def _check(self, w: Tensor, slope: Tensor | None, p: float) -> tuple[int, float]:
        if slope is not None:
            checks.slope(_LINEAR, self.act, slope, w.shape[0])
        return rng.threshold_and_scale(checks.probability(_LINEAR, p))

    def _find(self, x, w, b, slope, p: float, named: str | None) -> tuple[str, int, float]:
        """The route that suits a call, threshold and scale, after all checks."""
        threshold, scale = self._check(w, slope, p)
        if functional.is_foreign(x, w, b, slope):
            return functional.foreign_route(_LINEAR, named), threshold, scale
        checks.linear(_LINEAR, x, w, b)
        rows, (n, k) = checks.rows(x), w.shape
        if threshold:
            checks.row_range(_LINEAR, rows, n, 0)
        drops = threshold != 0
        route = dispatch.select(_LINEAR, x.device.type, x.dtype, self.act, drops, rows, k, n, named)
        return route, threshold, scale

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, activation={self.activation!r}, dropout={self.p}"
        if self.act == activations.LEAKY_RELU:
            text += f", slope={self.negative_slope}"
        return text

    def __getstate__(self):
        return _without_memo(super().__getstate__())


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
    _memo = (None, None)

    def __init__(self, p: float = 0.5, inplace: bool = False):
        super().__init__(checks.probability("FusedDropout", p), inplace)

    def forward(self, input: Tensor) -> Tensor:
        return self.run_fused(input, Masks(self.first_layer, must_trace()))

    fused_forward = forward

    @staticmethod
    def layer_count() -> int:
        return 1

    def run_fused(self, x: Tensor, masks: Masks) -> Tensor:
        """forward, with the masks of the container that this layer is in."""
        op, act = "dropout", activations.NONE
        checks.tensor(op, "input", x)
        layer = masks.layer
        masks.layer = layer + 1
        if not self.training or self.p == 0:
            return x
        threshold, scale = rng.threshold_and_scale(checks.probability(op, self.p))
        if threshold == 0:
            return x
        state, offset = masks.draw(x), masks.row_offset
        args = (x, None, None, state, act, 0.0, threshold, scale, layer, offset)
        if masks.traced or offset:
            y = functional.run_bias_act_dropout(*args, masks.named)
        else:
            named = masks.named
            key = (type(x), x.shape, x.dtype, x.layout, x.device, named)
            memo = self._memo
            if memo[0] != key:
                rows, columns = checks.rows(x), x.shape[-1] if x.dim() else 1
                checks.row_range(op, rows, columns, 0)
                fused = "bias_act_dropout"
                if functional.is_foreign(x):
                    route = functional.foreign_route(fused, named)
                else:
                    device_type = x.device.type
                    route = dispatch.select(
                        fused, device_type, x.dtype, act, True, rows, 0, columns, named
                    )
                memo = self.__dict__["_memo"] = key, route
            y = functional.bias_act_dropout_on(memo[1], args)
        return x.copy_(y) if self.inplace else y

    def __getstate__(self):
        return _without_memo(super().__getstate__())


def _without_memo(state: dict) -> dict:
    state.pop("_memo", None)
    return state
