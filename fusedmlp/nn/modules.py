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
from ..spec.layers import Epilogue
from .mask_state import MaskState, must_trace

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


def _key(x: Tensor, masks: MaskState, threshold: int, *tensors: Tensor | None) -> tuple | None:
    """What decides the backend and what the checks look at; None where functional.py has to look.

    Parameters count by identity: a changed dtype or shape is found by the op itself.
    """
    if masks.traced or masks.row_offset or type(x) not in functional.TENSORS or x.is_nested:
        return None
    what = x.shape, x.dtype, x.layout, x.device, torch.is_grad_enabled()
    return (*what, threshold, masks.named, *map(id, tensors))


def _select(op: str, x: Tensor, e: Epilogue, sizes: tuple[int, int, int], masks: MaskState) -> str:
    drops = e.threshold != 0
    return choice.select(op, x.device.type, x.dtype, e.act, drops, *sizes, masks.named)


class _OneOp:
    """A layer that runs as one op, by itself or with the masks of the container that it is in."""

    stream_offset = 0
    _chosen = (None, None)  # what the last call was like, and its backend

    def forward(self, input: Tensor) -> Tensor:
        return self._run_fused(input, MaskState(self.stream_offset, must_trace()))

    _fused_forward = forward
    _slow_forward = __prepare_scriptable__ = refuse_torchscript

    @staticmethod
    def _layer_count() -> int:
        return 1

    def __getstate__(self):
        return {k: v for k, v in super().__getstate__().items() if k != "_chosen"}


class FusedLinear(_OneOp, nn.Module):
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

    stream_offset (0) is added to the stream of the dropout state; `fusedmlp.assign_streams` gives
    the layers of a model different ones.
    """

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

    def _run_fused(self, x: Tensor, masks: MaskState) -> Tensor:
        """forward, with the masks of the container that this layer is in."""
        offset = masks.take()
        if not isinstance(x, Tensor):
            return self._on_other(x, offset)
        # Not self.weight, which is a search in Python; functional_call may have put it elsewhere.
        own = self._parameters
        w = own["weight"] if "weight" in own else self.weight
        b = own["bias"] if "bias" in own else self.bias
        slope = own["slope"] if "slope" in own else self.slope
        threshold, scale, state = 0, 1.0, None
        if self.training and self.p != 0:
            threshold, scale = philox.threshold_and_scale(checks.probability(_LINEAR, self.p))
            state = masks.draw(x)
        drop = threshold, scale, offset, masks.row_offset
        e = Epilogue(b, slope, state, self.act, self.negative_slope, *drop)
        key = _key(x, masks, threshold, w, b, slope)
        if key is not None and key == self._chosen[0]:
            return functional.linear_act_on(self._chosen[1], x, w, e)
        if slope is not None:
            checks.slope(_LINEAR, self.act, slope, w.shape[0])
        y = functional.run_linear_act(x, w, e, masks.named)
        if key is not None and not functional.is_foreign(w, b, slope):
            sizes = checks.rows(x), w.shape[1], w.shape[0]
            self.__dict__["_chosen"] = key, _select(_LINEAR, x, e, sizes, masks)
        return y

    def _on_other(self, x: object, offset: int):
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
            stream=offset,
        )

    def extra_repr(self) -> str:
        text = f"{nn.Linear.extra_repr(self)}, activation={self.activation!r}, dropout={self.p}"
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


class FusedDropout(_OneOp, nn.Dropout):
    """nn.Dropout with this package's mask: nothing but the seed is kept for backward.

    A subclass of nn.Dropout, since it computes what that does: what switches all dropout of a model
    on or off by isinstance(m, nn.Dropout) is right about this one too.

    p        probability of dropping in training mode
    inplace  the result is also written into the input, as by nn.Dropout; that is one pass more here
    raises   ValueError, TypeError for a p outside of [0, 1]
    """

    def __init__(self, p: float = 0.5, inplace: bool = False):
        super().__init__(checks.probability("FusedDropout", p), inplace)

    def _run_fused(self, x: Tensor, masks: MaskState) -> Tensor:
        """forward, with the masks of the container that this layer is in."""
        op, offset = "dropout", masks.take()
        if not isinstance(x, Tensor):
            return self._on_other(x, offset)
        checks.tensor(op, "input", x)
        if not self.training or self.p == 0:
            return x
        threshold, scale = philox.threshold_and_scale(checks.probability(op, self.p))
        if threshold == 0:
            return x
        state = masks.draw(x)
        drop = threshold, scale, offset, masks.row_offset
        e = Epilogue(None, None, state, activations.NONE, 0.0, *drop)
        key = _key(x, masks, threshold)
        if key is not None and key == self._chosen[0]:
            y = functional.bias_act_dropout_on(self._chosen[1], x, e)
        else:
            y = functional.run_bias_act_dropout(x, e, masks.named)
            if key is not None:
                sizes = checks.rows(x), 0, x.shape[-1] if x.dim() else 1
                self.__dict__["_chosen"] = key, _select("bias_act_dropout", x, e, sizes, masks)
        return x.copy_(y) if self.inplace else y

    def _on_other(self, x: object, offset: int):
        """As FusedLinear._on_other."""
        node = _leaf(self, x)
        if node is not None:
            return node
        y = functional.dropout(x, self.p, self.training, stream=offset)
        return x.copy_(y) if self.inplace else y
