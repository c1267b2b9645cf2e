"""Neighbouring Linear stretches as one op for all of them, where that pays (choice.py).

Saves the host cost of each op and of its node in autograd: on small networks most of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..autograd.mlp import Mlp, Net
from ..backends import choice
from ..spec import activations, checks, philox
from ..spec import layers as nets
from . import runner
from .groups import Single, Stretch
from .masks import Masks

_PLAIN = frozenset({Tensor, nn.Parameter})


def find(items: list[Stretch | Single], at: int, x, masks: Masks) -> NetStep | None:
    """The stretches from items[at] on that one op should run on x, or None."""
    if type(x) not in _PLAIN or x.layout != torch.strided or x.is_nested:
        return None
    if x.dim() == 0 or x.numel() == 0:
        return None
    width, layers = x.shape[-1], []
    for item in items[at:]:
        layer = _Layer.of(item, x, width) if type(item) is Stretch else None
        if layer is None:
            break
        layers.append(layer)
        width = layer.columns
    if not layers or (len(layers) == 1 and layers[0].is_bare):
        return None
    rows = checks.rows(x)
    backend = choice.select_mlp(
        x.device.type,
        x.dtype,
        rows,
        x.shape[-1],
        [(layer.stretch.act, layer.threshold != 0, layer.columns) for layer in layers],
        masks.named,
    )
    if backend is None:
        return None
    for layer in layers:
        if layer.threshold:
            checks.row_range("mlp", rows, layer.columns, 0)
    return NetStep(backend, layers, x, masks.layer)


class _Layer:
    """One stretch, its tensors and numbers, as they are now."""

    __slots__ = ("columns", "params", "scale", "stretch", "threshold")

    @staticmethod
    def of(stretch: Stretch, x: Tensor, width: int) -> _Layer | None:
        """None where the op would not do what the modules do."""
        linear, dropout = stretch.linear, stretch.dropout
        if linear is None:
            return None
        self = _Layer()
        self.stretch, self.threshold, self.scale = stretch, 0, 1.0
        if dropout is not None and dropout.training and dropout.p != 0:
            if not 0 < dropout.p <= 1:
                return None
            self.threshold, self.scale = philox.threshold_and_scale(float(dropout.p))
        self.params = _parameters(stretch)
        if self.params is None:
            return None
        for t in self.params:
            # First of all: another class may have other answers to the questions below.
            if t is not None and type(t) not in _PLAIN:
                return None
        w, b, slope = self.params
        if w.dim() != 2 or w.shape[1] != width or w.numel() == 0:
            return None
        self.columns = w.shape[0]
        if b is not None and (b.dim() != 1 or b.shape[0] != self.columns):
            return None
        # nn.PReLU's slopes belong to dimension 1, ours to the last.
        if slope is not None and slope.numel() != 1:
            if x.dim() != 2 or slope.numel() != self.columns:
                return None
        for t in self.params:
            if t is None:
                continue
            if t.layout != torch.strided or t.numel() == 0:
                return None
            if t.dtype != x.dtype or t.device != x.device:
                return None
        return self

    @property
    def is_bare(self) -> bool:
        """True if it is what PyTorch's Linear is."""
        return self.stretch.act == activations.NONE and not self.threshold


def _parameters(stretch: Stretch) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """w, b, slope; None where one is not where a module keeps its parameters."""
    own = stretch.linear._parameters
    slope = None
    try:
        if stretch.act == activations.PRELU:
            slope = stretch.activation._parameters["weight"]
        return own["weight"], own["bias"], slope
    except KeyError:
        return None


class NetStep:
    """Some stretches as a step of a program: one op on inputs like the first one's."""

    __slots__ = (
        "backend",
        "device",
        "drops",
        "dtype",
        "ids",
        "layer",
        "net",
        "records",
        "shape",
        "sources",
        "stretches",
    )

    def __init__(self, backend: str, layers: list[_Layer], x: Tensor, layer: int):
        self.stretches = [each.stretch for each in layers]
        self.layer, self.backend = layer, backend
        self.drops = any(each.threshold for each in layers)
        self.records = torch.is_grad_enabled()
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.sources = [
            (s.linear._parameters, s.activation._parameters if s.act == activations.PRELU else None)
            for s in self.stretches
        ]
        ints, numbers = [], []
        for i, each in enumerate(layers):
            has = sum(b for b, t in zip(nets.BITS, each.params, strict=True) if t is not None)
            ints += [each.stretch.act, each.threshold, layer + i, has]
            numbers += [each.stretch.alpha, each.scale]
        self.net = Net(backend, ints, numbers, x)
        self.ids = [id(t) for each in layers for t in each.params if t is not None]

    def __call__(self, x, masks: Masks):
        params = []
        try:
            for own, slope in self.sources:
                params.append(own["weight"])
                b = own["bias"]
                if b is not None:
                    params.append(b)
                if slope is not None:
                    params.append(slope["weight"])
        except KeyError:
            # Something has put a plain attribute in the place of a parameter.
            return self._one_by_one(x, masks)
        state = masks.draw(x) if self.drops else None
        if (
            [*map(id, params)] != self.ids
            or masks.row_offset
            or type(x) is not Tensor
            or x.shape != self.shape
            or x.dtype is not self.dtype
            or x.device != self.device
        ):
            return self._one_by_one(x, masks)
        if self.records and _any_requires_grad(x, params):
            return Mlp.apply(x, state, 0, self.net, *params)
        return self.net.infer(x, state, 0, params)

    def _one_by_one(self, x, masks: Masks):
        """What no longer is what it was, or has what the op does not take."""
        masks.layer = self.layer
        for stretch in self.stretches:
            x, _ = runner.run_stretch(stretch, x, masks)
        return x


def _any_requires_grad(x: Tensor, params: list[Tensor]) -> bool:
    if x.requires_grad:
        return True
    for t in params:
        if t.requires_grad:
            return True
    return False
