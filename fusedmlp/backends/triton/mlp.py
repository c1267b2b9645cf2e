"""mlp: all layers of a network in one call, forward and backward.

Backward runs 2 L GEMMs and one elementwise kernel, that of the last layer: the input-gradient GEMM
of every other layer applies the derivative, mask and sums of the layer before it (dgrad_act). The
weight gradients are the library's GEMMs. The bits are those of layer-by-layer calls, except that an
input gradient is not rounded before the derivative is applied.
"""

import torch
from torch import Tensor

from ...spec import activations
from ...spec import layers as nets
from ...spec.activations import SAVE_Y, SAVE_Z
from .bias_act_dropout import bias_act_dropout_bwd
from .dgrad_act import dgrad_act
from .launch import rows_view
from .linear_act import run


def _saves(layer: nets.Layer, dtype: torch.dtype) -> int:
    return activations.saves(layer.act, layer.alpha, dtype, layer.threshold != 0)


def mlp_fwd(x, params, state, ints, numbers, row_offset, keep):
    """y (..., N) of each layer, then preact = x w^T of those whose z backward reads.

    Only the last y if not `keep`. The arguments are those of the op (ops.py).
    """
    ys, preacts = [], []
    for layer in nets.layers(params, ints, numbers):
        keep_preact = keep and _saves(layer, x.dtype) == SAVE_Z
        x, preact = run(x, layer.w, *layer.epilogue(state, row_offset), keep_preact=keep_preact)
        ys.append(x)
        if keep_preact:
            preacts.append(preact)
    return ys + preacts if keep else ys[-1:]


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


def mlp_bwd(dy, x, params, state, ys, preacts, ints, numbers, row_offset, needs, need_dx):
    """dx (..., K), then the gradient of each of the params; of no elements where not needed."""
    layers = list(nets.layers(params, ints, numbers))
    needs = [need & bits for need, bits in zip(needs, nets.bits_of(ints), strict=True)]
    kinds, rest = [_saves(layer, dy.dtype) for layer in layers], iter(preacts)
    saved = [
        y if kind == SAVE_Y else next(rest) if kind == SAVE_Z else None
        for kind, y in zip(kinds, ys, strict=True)
    ]
    last = len(layers) - 1
    first = 0 if need_dx else next((i for i, need in enumerate(needs) if need), len(layers))

    def arguments(i: int) -> tuple:
        """saved tensor, epilogue and what is asked for, of layer i."""
        asked = bool(needs[i] & nets.B), bool(needs[i] & nets.SLOPE)
        return saved[i], *layers[i].epilogue(state, row_offset), kinds[i], *asked

    grads, dz = [], dy  # of the params, from the last
    for i in reversed(range(len(layers))):
        layer, need = layers[i], needs[i]
        dw = db = dslope = None
        if i >= first:
            bare = layer.act == activations.NONE and layer.threshold == 0 and not need & nets.B
            if i < last:
                dz, db, dslope = dgrad_act(dz, layers[i + 1].w, *arguments(i))
            elif not bare:
                dz, db, dslope = bias_act_dropout_bwd(dy, *arguments(i))
            if need & nets.W:
                dw = torch.mm(rows_view(dz).t(), rows_view(ys[i - 1] if i else x))
        there = zip((dw, db, dslope), (layer.w, layer.b, layer.slope), strict=True)
        grads += reversed([_or_empty(grad, dy) for grad, t in there if t is not None])
    dx = torch.matmul(dz, layers[0].w) if need_dx else None
    return [_or_empty(dx, dy), *reversed(grads)]
