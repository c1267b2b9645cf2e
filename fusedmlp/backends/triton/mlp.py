"""mlp: all layers of a network in one call, forward and backward.

Backward runs 2 L GEMMs and one elementwise kernel, that of the last layer: the input-gradient GEMM
of every other layer applies the derivative, mask and sums of the layer before it (dgrad_act). The
weight gradients are the library's GEMMs. The bits are those of layer-by-layer calls, except that an
input gradient is not rounded before the derivative is applied.
"""

import torch

from ...spec import layers
from ...spec.activations import NONE, SAVE_PREACT, SAVE_Y
from .bias_act_dropout import bias_act_dropout_bwd
from .dgrad_act import dgrad_act
from .launch import rows_view
from .linear_act import run


def mlp_fwd(x, params, state, ints, numbers, row_offset, keep):
    """y (..., N) of each layer, then preact of those that keep it; only the last y if not `keep`.

    The arguments are those of the op (ops.py).
    """
    ys, preacts = [], []
    for w, e in layers.unpack(params, ints, numbers, state, row_offset):
        x, preact = run(x, w, e, keep and e.saves(x.dtype) == SAVE_PREACT)
        ys.append(x)
        if preact is not None:
            preacts.append(preact)
    return ys + preacts if keep else ys[-1:]


def mlp_bwd(dy, x, params, state, ys, preacts, ints, numbers, row_offset, needs, need_dx):
    """dx (..., K), then the gradient of each of the params; of no elements where not needed."""
    net = list(layers.unpack(params, ints, numbers, state, row_offset))
    needs = [need & bits for need, bits in zip(needs, layers.bits_of(ints), strict=True)]
    kinds, rest = [e.saves(dy.dtype) for _, e in net], iter(preacts)
    saved = [
        y if kind == SAVE_Y else next(rest) if kind == SAVE_PREACT else None
        for kind, y in zip(kinds, ys, strict=True)
    ]
    last = len(net) - 1
    first = 0 if need_dx else next((i for i, need in enumerate(needs) if need), len(net))
    grads, dz = [], dy  # of the params, from the last
    for i in reversed(range(len(net))):
        (w, e), need = net[i], needs[i]
        dw = db = dslope = None
        if i >= first:
            asked = saved[i], e, kinds[i], bool(need & layers.B), bool(need & layers.SLOPE)
            bare = e.act == NONE and e.threshold == 0 and not need & layers.B
            if i < last:
                dz, db, dslope = dgrad_act(dz, net[i + 1].weight, *asked)
            elif not bare:
                dz, db, dslope = bias_act_dropout_bwd(dy, *asked)
            if need & layers.W:
                dw = torch.mm(rows_view(dz).t(), rows_view(ys[i - 1] if i else x))
        present = zip((dw, db, dslope), (w, e.bias, e.slope), strict=True)
        # A tensor of its own for each: outputs of an op may not share memory.
        found = [grad for grad, t in present if t is not None]
        grads += [dy.new_empty(0) if grad is None else grad for grad in reversed(found)]
    dx = torch.matmul(dz, net[0].weight) if need_dx else dy.new_empty(0)
    return [dx, *reversed(grads)]
