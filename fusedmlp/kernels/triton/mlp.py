"""mlp: all layers of a network in one call, forward and backward.

Backward runs 2 L GEMMs and one elementwise kernel, that of the last layer: the input-gradient GEMM
of every other layer applies the derivative, mask and sums of the layer before it (dgrad_act). The
weight gradients are the library's GEMMs. The bits are those of layer-by-layer calls, except that an
input gradient is not rounded before the derivative is applied.
"""

import torch

from ... import activations, nets
from ...activations import SAVE_Y, SAVE_Z
from .bias_act_dropout import bias_act_dropout_bwd
from .dgrad_act import dgrad_act
from .launch import rows_view
from .linear_act import run


def _saves(layer: nets.Layer, dtype: torch.dtype) -> int:
    return activations.saves(layer.act, layer.alpha, dtype, layer.threshold != 0)


def mlp_fwd(x, params, state, ints, numbers, row_offset, keep):
    """y of each layer (..., N), then h = x w^T of those whose z backward reads.

    Only the last y if not `keep`. The arguments are those of the op (ops.py).
    """
    ys, hs = [], []
    y = x
    for layer in nets.layers(params, ints, numbers):
        keep_h = keep and _saves(layer, x.dtype) == SAVE_Z
        y, h = run(y, layer.w, *layer.epilogue(state, row_offset), keep_h=keep_h)
        if keep:
            ys.append(y)
        if keep_h:
            hs.append(h)
    return ys + hs if keep else [y]


def mlp_bwd(dy, x, params, state, ys, hs, ints, numbers, row_offset, needs, need_dx):
    """dx (..., K), then the gradient of each of the params; of no elements where not needed."""
    layers = list(nets.layers(params, ints, numbers))
    kinds = [_saves(layer, x.dtype) for layer in layers]
    of_z = iter(hs)
    saved = [
        next(of_z) if k == SAVE_Z else y if k == SAVE_Y else None
        for k, y in zip(kinds, ys, strict=True)
    ]
    first = 0 if need_dx else next((i for i, need in enumerate(needs) if need), len(layers))
    grads = [[None] * 3 for _ in layers]

    def wants(i: int) -> tuple[bool, bool]:
        """Whether the gradients of bias and slope of layer i are needed."""
        b, slope = layers[i].b, layers[i].slope
        return (
            b is not None and bool(needs[i] & nets.B),
            slope is not None and bool(needs[i] & nets.SLOPE),
        )

    def arguments(i: int) -> tuple:
        """saved tensor, epilogue and what is asked for, of layer i."""
        return saved[i], *layers[i].epilogue(state, row_offset), kinds[i], *wants(i)

    dz, last = dy, len(layers) - 1
    for i in range(last, first - 1, -1):
        layer, db, dslope = layers[i], None, None
        # A last layer without anything to undo passes on what comes in.
        if i < last:
            dz, db, dslope = dgrad_act(dz, layers[i + 1].w, *arguments(i))
        elif layer.act != activations.NONE or layer.threshold or any(wants(i)):
            dz, db, dslope = bias_act_dropout_bwd(dz, *arguments(i))
        need_db, need_dslope = wants(i)
        if needs[i] & nets.W:
            grads[i][0] = torch.mm(rows_view(dz).t(), rows_view(ys[i - 1] if i else x))
        grads[i][1] = db if need_db else None
        grads[i][2] = dslope if need_dslope else None
    dx = torch.matmul(dz, layers[0].w) if need_dx else x.new_empty(0)
    there = [
        grad
        for of_layer, bits in zip(grads, nets.bits_of(ints), strict=True)
        for grad, bit in zip(of_layer, nets.BITS, strict=True)
        if bits & bit
    ]
    return [dx, *(x.new_empty(0) if grad is None else grad for grad in there)]
