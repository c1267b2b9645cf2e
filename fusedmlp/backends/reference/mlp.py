"""mlp: the layers of a network one after the other, as every backend's must come out."""

from __future__ import annotations

import torch
from torch import Tensor

from ...spec import activations, checks
from ...spec import layers as nets
from ...spec.activations import SAVE_Y, SAVE_Z
from .epilogue import bias_act_dropout_bwd, linear_act_fwd, linear_act_infer


def mlp_fwd(x, params, state, ints, numbers, row_offset, keep):
    """y of each layer (..., N), then h = x w^T of those whose z backward reads.

    Only the last y if not `keep`. The arguments are those of the op (ops.py).
    """
    ys, hs = [], []
    for layer in nets.layers(params, ints, numbers):
        args = x, layer.w, *layer.epilogue(state, row_offset)
        if _saves(layer, x.dtype) == SAVE_Z:
            x, h = linear_act_fwd(*args)
            hs.append(h)
        else:
            x = linear_act_infer(*args)
        ys.append(x)
    return ys + hs if keep else ys[-1:]


def _saves(layer: nets.Layer, dtype: torch.dtype) -> int:
    return activations.saves(layer.act, layer.alpha, dtype, layer.threshold != 0)


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


def mlp_bwd(dy, x, params, state, ys, hs, ints, numbers, row_offset, needs, need_dx):
    """dx (..., K), then the gradient of each of the params; of no elements where not needed."""
    layers = list(nets.layers(params, ints, numbers))
    needs = [need & bits for need, bits in zip(needs, nets.bits_of(ints), strict=True)]
    first = 0 if need_dx else next((i for i, need in enumerate(needs) if need), len(layers))
    hs = list(hs)
    grads = []  # of the params, from the last
    for i in reversed(range(len(layers))):
        layer, need = layers[i], needs[i]
        dw = db = dslope = None
        kind = _saves(layer, dy.dtype)
        saved = ys[i] if kind == SAVE_Y else hs.pop() if kind == SAVE_Z else None
        if i >= first:
            need_db, need_dslope = bool(need & nets.B), bool(need & nets.SLOPE)
            dz, db, dslope = bias_act_dropout_bwd(
                dy, saved, *layer.epilogue(state, row_offset), kind, need_db, need_dslope
            )
            if need & nets.W:
                below, rows = ys[i - 1] if i else x, checks.rows(dz)
                dw = dz.reshape(rows, dz.shape[-1]).t().mm(below.reshape(rows, below.shape[-1]))
            if i > first or need_dx:
                dy = torch.matmul(dz, layer.w)
        there = zip((dw, db, dslope), (layer.w, layer.b, layer.slope), strict=True)
        grads += reversed([_or_empty(grad, dy) for grad, t in there if t is not None])
    return [_or_empty(dy if need_dx else None, dy), *reversed(grads)]
