"""mlp: all layers of a network in one call, forward and backward.

Backward runs 2 L GEMMs and one elementwise kernel, that of the last layer: the input-gradient GEMM
of every other layer applies the derivative, mask and sums of the layer before it (dgrad_act). The
weight gradients are the library's GEMMs. The bits are those of layer-by-layer calls, except that an
input gradient is not rounded before the derivative is applied.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import activations
from ...activations import SAVE_Y, SAVE_Z
from .bias_act_dropout import bias_act_dropout_bwd
from .dgrad_act import dgrad_act
from .launch import rows_view
from .linear_act import run

NEED_W, NEED_B, NEED_SLOPE = 1, 2, 4  # bits of `needs`


class _Layer(NamedTuple):
    """drop(act(x w^T + b)); the fields mean what the arguments of linear_act_fwd mean."""

    w: Tensor  # (N, K)
    b: Tensor | None
    slope: Tensor | None
    act: int
    alpha: float
    threshold: int
    scale: float
    layer: int

    def saves(self, dtype: torch.dtype) -> int:
        return activations.saves(self.act, self.alpha, dtype, self.threshold != 0)

    def epilogue(self, state: Tensor | None, row_offset: int) -> tuple:
        """The arguments that all ops share, in their order."""
        numbers = self.act, self.alpha, self.threshold, self.scale, self.layer, row_offset
        return self.b, self.slope, state, *numbers

    @property
    def is_linear(self) -> bool:
        return self.act == activations.NONE and self.threshold == 0


def _layers(params: list[Tensor], ints: list[int], numbers: list[float]) -> list[_Layer]:
    made = []
    for i in range(len(params) // 3):
        w, b, slope = params[3 * i : 3 * i + 3]
        act, threshold, layer = ints[3 * i : 3 * i + 3]
        alpha, scale = numbers[2 * i : 2 * i + 2]
        b, slope = (t if t.numel() else None for t in (b, slope))
        made.append(_Layer(w, b, slope, act, alpha, threshold, scale, layer))
    return made


def mlp_fwd(x, params, state, ints, numbers, row_offset, keep):
    """[y (..., N)] of the last layer; with keep those of all layers, then each layer's h.

    params   w (N, K), b (N,), slope (1 or N) of each layer, without elements where there is none
    ints     act, threshold, layer of each layer
    numbers  alpha, scale of each layer
    h        x w^T (..., N) where backward reads it (activations.saves), else without elements
    """
    ys, hs = [], []
    y = x
    for layer in _layers(params, ints, numbers):
        keep_h = keep and layer.saves(x.dtype) == SAVE_Z
        y, h = run(y, layer.w, *layer.epilogue(state, row_offset), keep_h=keep_h)
        if keep:
            ys.append(y)
            hs.append(h if keep_h else x.new_empty(0))
    return ys + hs if keep else [y]


def mlp_bwd(dy, x, params, state, ys, hs, ints, numbers, row_offset, needs, need_dx):
    """[dx (..., K)], then dw (N, K), db (N,), dslope of each layer; without elements if not needed.

    ys, hs  of mlp_fwd with keep
    needs   of each layer, bits NEED_W, NEED_B, NEED_SLOPE
    """
    layers = _layers(params, ints, numbers)
    grads = [x.new_empty(0) for _ in range(1 + len(params))]
    first = 0 if need_dx else next((i for i, n in enumerate(needs) if n), len(layers))
    if first == len(layers):
        return grads

    def wants(i: int) -> tuple[bool, bool]:
        """Whether the gradients of bias and slope of layer i are needed and there."""
        layer = layers[i]
        return (
            layer.b is not None and bool(needs[i] & NEED_B),
            layer.slope is not None and bool(needs[i] & NEED_SLOPE),
        )

    def arguments(i: int) -> tuple:
        """saved tensor, epilogue and what is asked for, of layer i."""
        saves = layers[i].saves(dy.dtype)
        saved = {SAVE_Y: ys[i], SAVE_Z: hs[i]}.get(saves)
        return saved, *layers[i].epilogue(state, row_offset), saves, *wants(i)

    last = len(layers) - 1
    if layers[last].is_linear and not any(wants(last)):
        dz, db, dslope = dy, None, None
    else:
        dz, db, dslope = bias_act_dropout_bwd(dy, *arguments(last))
    for i in range(last, first - 1, -1):
        need_db, need_dslope = wants(i)
        if needs[i] & NEED_W:
            grads[1 + 3 * i] = torch.mm(rows_view(dz).t(), rows_view(ys[i - 1] if i else x))
        if need_db:
            grads[2 + 3 * i] = db
        if need_dslope:
            grads[3 + 3 * i] = dslope
        if i > first:
            dz, db, dslope = dgrad_act(dz, layers[i].w, *arguments(i - 1))
    if need_dx:
        grads[0] = torch.matmul(dz, layers[0].w)
    return grads
