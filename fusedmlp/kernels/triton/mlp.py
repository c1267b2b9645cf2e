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


class Layer(NamedTuple):
    """drop(act(x w^T + b)); the fields mean what the arguments of linear_act_fwd mean."""

    w: Tensor  # (N, K)
    b: Tensor | None = None
    slope: Tensor | None = None
    act: int = activations.NONE
    alpha: float = 0.01
    threshold: int = 0
    scale: float = 1.0
    layer: int = 0

    def saves(self, dtype: torch.dtype) -> int:
        return activations.saves(self.act, self.alpha, dtype, self.threshold != 0)

    def epilogue(self, state: Tensor | None, row_offset: int) -> tuple:
        """The arguments that all ops share, in their order."""
        numbers = self.act, self.alpha, self.threshold, self.scale, self.layer, row_offset
        return self.b, self.slope, state, *numbers


def mlp_fwd(
    x: Tensor, layers: list[Layer], state: Tensor | None, row_offset: int = 0
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each layer's y (..., N), and its h (..., N) where backward needs it."""
    ys, hs = [], []
    for layer in layers:
        keep_h = layer.saves(x.dtype) == SAVE_Z
        y, h = run(ys[-1] if ys else x, layer.w, *layer.epilogue(state, row_offset), keep_h=keep_h)
        ys.append(y)
        hs.append(h)
    return ys, hs


def mlp_bwd(
    dy: Tensor,
    x: Tensor,
    layers: list[Layer],
    state: Tensor | None,
    ys: list[Tensor],
    hs: list[Tensor | None],
    row_offset: int = 0,
    need_dx: bool = True,
) -> tuple[Tensor | None, list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """dx (or None), and for each layer dw (N, K), db (N,) or None, dslope or None."""

    def arguments(i: int) -> tuple:
        """saved tensor, epilogue and what is asked for, of layer i."""
        saves = layers[i].saves(dy.dtype)
        saved = {SAVE_Y: ys[i], SAVE_Z: hs[i]}.get(saves)
        asked = saves, layers[i].b is not None, layers[i].slope is not None
        return saved, *layers[i].epilogue(state, row_offset), *asked

    count = len(layers)
    dws: list[Tensor] = [None] * count
    dbs: list[Tensor | None] = [None] * count
    dslopes: list[Tensor | None] = [None] * count
    dz, db, dslope = bias_act_dropout_bwd(dy, *arguments(count - 1))
    for i in reversed(range(count)):
        dbs[i] = db if layers[i].b is not None else None
        dslopes[i] = dslope if layers[i].slope is not None else None
        dws[i] = torch.mm(rows_view(dz).t(), rows_view(ys[i - 1] if i else x))
        if i:
            dz, db, dslope = dgrad_act(dz, layers[i].w, *arguments(i - 1))
    dx = torch.matmul(dz, layers[0].w) if need_dx else None
    return dx, dws, dbs, dslopes
