"""Modules that are one op each, FusedLinear and FusedDropout, and activations that torch lacks.

The same keys as PyTorch's own modules, and the same initial values from the same seed.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import functional
from ..backends import choice
from ..spec import activations, checks, philox
from .masks import Masks, must_trace

_LINEAR = "linear_act"
_DEFAULT_SLOPES = {activations.LEAKY_RELU: 0.01, activations.PRELU: 0.25}


class ReLUSquared(nn.Module):
    """relu(x) ** 2, element by element."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input).square()


class ColumnPReLU(nn.Module):
    """PReLU with a slope for each column (..., N); nn.PReLU has one for each of dimension 1."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        return torch.where(input > 0, input, self.weight * input)


def refuse_torchscript(module: nn.Module, *args, **kwargs):
    """What torch.jit.trace and torch.jit.script call of a module of this package."""
    raise TypeError(
        "torch.jit: the model must be made of plain modules, as TorchScript does not keep fused "
        f"ops, got a {type(module).__name__}; trace or script fusedmlp.unfuse(model) instead"
    )


def _leaf(module: nn.Module, x: object) -> fx.Proxy | None:
    """The call of the module in the graph of torch.fx; None if x is no Proxy, or for the root."""
    if not isinstance(x, fx.Proxy):
        return None
    path = x.tracer.path_of_module(module)
    return x.tracer.create_proxy("call_module", path, (x,), {}) if path else None


class FusedLinear(nn.Module):
    """Linear, activation and dropout as one op: nn.Sequential(nn.Linear, activation, nn.Dropout).

    in_features, out_features, bias, device, dtype  as in nn.Linear: same keys, same initial values
    activation  a name of fusedmlp.spec.activations.NAMES; 'none' for a plain linear map
    dropout     probability of dropping in training mode; later read from the attribute `p`
    slope       for leaky_relu its slope (0.01), later `negative_slope`; for prelu the initial value
                (0.25) of the parameter `slope`, which has 1 element and may be replaced by one of N
    raises      ValueError, TypeError for arguments that no layer could have

    No subclass of nn.Linear, since it computes more: what selects layers by isinstance(m,
    nn.Linear) (LoRA, quantisation, wrap policies, an initialiser) leaves it alone. Name FusedLinear
    there too, or fuse a network of plain modules, which stay what they are.

    first_layer (0) is added to the stream of the dropout state;
    `fusedmlp.assign_streams` gives the layers of a model different ones.
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
        activation: str = "none",
        dropout: float = 0.0,
        slope: float | None = None,
    ):
        op = "FusedLinear"
        act = checks.activation(op, activation)
        p = checks.probability(op, dropout, "dropout")
        slope = _slope_value(op, act, slope)
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.act, self.p = act, p
        self.negative_slope = slope if act == activations.LEAKY_RELU else 0.0
        self.initial_slope = slope if act == activations.PRELU else None

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(out_features, in_features)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        self.register_parameter("slope", parameter(1) if act == activations.PRELU else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New values as nn.Linear draws them; the slope of prelu becomes its initial value."""
        nn.Linear.reset_parameters(self)
        if self.slope is not None:
            nn.init.constant_(self.slope, self.initial_slope)

    @property
    def activation(self) -> str:
        return activations.NAMES[self.act]

    def forward(self, input: Tensor) -> Tensor:
        return self.run_fused(input, Masks(self.first_layer, must_trace()))

    fused_forward = forward
    _slow_forward = __prepare_scriptable__ = refuse_torchscript

    @staticmethod
    def layer_count() -> int:
        return 1

    def run_fused(self, x: Tensor, masks: Masks) -> Tensor:
        """forward, with the masks of the container that this layer is in."""
        layer = masks.layer
        masks.layer = layer + 1
        if not isinstance(x, Tensor):
            return self._on_other(x, layer)
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
            try:
                what = (type(x), x.shape, x.dtype, x.layout, x.device, torch.is_grad_enabled())
            except RuntimeError:  # a nested tensor has no shape
                checks.tensor(_LINEAR, "input", x)
                raise
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

    def _on_other(self, x: object, layer: int):
        """forward of what is no tensor: torch.fx takes this layer as a leaf, as it does nn.Linear;
        others with a __torch_function__ are asked for the function."""
        node = _leaf(self, x)
        if node is not None:
            return node
        slope = self.negative_slope if self.act == activations.LEAKY_RELU else self.slope
        return functional.linear_act(
            x,
            self.weight,
            self.bias,
            self.activation,
            slope=slope,
            p=self.p,
            training=self.training,
            stream=layer,
        )

    def _check(self, w: Tensor, slope: Tensor | None, p: float) -> tuple[int, float]:
        if slope is not None:
            checks.slope(_LINEAR, self.act, slope, w.shape[0])
        return philox.threshold_and_scale(checks.probability(_LINEAR, p))

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
        route = choice.select(_LINEAR, x.device.type, x.dtype, self.act, drops, rows, k, n, named)
        return route, threshold, scale

    def extra_repr(self) -> str:
        text = f"{nn.Linear.extra_repr(self)}, activation={self.activation!r}, dropout={self.p}"
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

    A subclass of nn.Dropout, since it computes what that does: what switches all dropout of a model
    on or off by isinstance(m, nn.Dropout) is right about this one too.

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
    _slow_forward = __prepare_scriptable__ = refuse_torchscript

    @staticmethod
    def layer_count() -> int:
        return 1

    def run_fused(self, x: Tensor, masks: Masks) -> Tensor:
        """forward, with the masks of the container that this layer is in."""
        op, act = "dropout", activations.NONE
        layer = masks.layer
        masks.layer = layer + 1
        if not isinstance(x, Tensor):
            return self._on_other(x, layer)
        checks.tensor(op, "input", x)
        if not self.training or self.p == 0:
            return x
        threshold, scale = philox.threshold_and_scale(checks.probability(op, self.p))
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
                    route = choice.select(
                        fused, device_type, x.dtype, act, True, rows, 0, columns, named
                    )
                memo = self.__dict__["_memo"] = key, route
            y = functional.bias_act_dropout_on(memo[1], args)
        return x.copy_(y) if self.inplace else y

    def _on_other(self, x: object, layer: int):
        """As FusedLinear._on_other."""
        node = _leaf(self, x)
        if node is not None:
            return node
        y = functional.dropout(x, self.p, self.training, stream=layer)
        return x.copy_(y) if self.inplace else y

    def __getstate__(self):
        return _without_memo(super().__getstate__())


def _without_memo(state: dict) -> dict:
    state.pop("_memo", None)
    return state
