"""The torch.autograd.Function of a whole network: one op forward, one op backward.

As in linear_act.py, calls registered ops only, and builds gradients that shall be differentiated
again from plain differentiable PyTorch. Never writes to a saved tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import compat
from ..backends import composite
from ..ops import BY_BACKEND
from ..spec import layers
from ..spec.activations import SAVE_PREACT, SAVE_Y, saves
from .linear_act import is_watched

_NO_GRADIENTS = (None, None, None)  # of state, row_offset and net


class Net:
    """What Mlp needs to know of a network besides its tensors, made once for many calls.

    backend  whose ops run it
    ints     as in spec/layers.py, and so are numbers
    like     a tensor of the dtype and on the device of its input
    """

    __slots__ = (
        "count",
        "preacts",
        "ints",
        "keeps_y",
        "kinds",
        "needs",
        "nothing",
        "numbers",
        "ops",
        "trainable",
        "ys",
    )

    def __init__(self, backend: str, ints: list[int], numbers: list[float], like: Tensor):
        self.ops = BY_BACKEND[backend]
        self.ints, self.numbers = ints, numbers
        self.count = len(ints) // layers.INTS
        self.kinds = [
            saves(act, alpha, like.dtype, threshold != 0)
            for act, threshold, alpha in zip(
                ints[:: layers.INTS],
                ints[1 :: layers.INTS],
                numbers[:: layers.NUMBERS],
                strict=True,
            )
        ]
        self.keeps_y = self.kinds[-1] == SAVE_Y
        self.nothing = like.new_empty(0)
        # With nothing frozen: needs_input_grad of the params, and the same as bits.
        self.trainable = (True,) * layers.count_params(ints)
        self.needs = layers.bits_of(ints)
        # Where the y and the preacts of the layers begin among the saved tensors.
        self.ys = 2 + len(self.trainable)
        self.preacts = self.ys + self.count

    def infer(self, x: Tensor, state: Tensor | None, row_offset: int, params: list) -> Tensor:
        """y (..., N) without gradients."""
        return self.ops.mlp_fwd(x, params, state, self.ints, self.numbers, row_offset, False)[0]

    def train(self, x: Tensor, state: Tensor | None, row_offset: int, params: list) -> Tensor:
        """y (..., N), recorded by autograd."""
        return Mlp.apply(x, state, row_offset, self, *params)


class Mlp(torch.autograd.Function):
    """All layers of a network. x (..., K), state (2,) int64 or None, params as in spec/layers.py.

    Kept for backward: x, the y of each layer but the last, and what each layer itself has to keep;
    of frozen layers in front of all others, nothing.
    """

    @staticmethod
    def forward(ctx, x, state, row_offset, net, *params):
        out = net.ops.mlp_fwd(x, params, state, net.ints, net.numbers, row_offset, True)
        count, needs = net.count, ctx.needs_input_grad
        y = out[count - 1]
        if not net.keeps_y:
            out[count - 1] = net.nothing
        ctx.net, ctx.row_offset, ctx.first = net, row_offset, 0
        if needs[0] or needs[4:] == net.trainable or True not in needs:
            ctx.save_for_backward(x, state, *params, *out)
            return y
        wanted = layers.needs_of(net.ints, needs[4:])
        first = ctx.first = next(i for i, need in enumerate(wanted) if need)
        if first:
            x = out[first - 1]
            of_z = count + net.kinds[:first].count(SAVE_PREACT)
            out[:first], out[count:of_z] = [net.nothing] * first, [net.nothing] * (of_z - count)
        ctx.save_for_backward(x, state, *params, *out)
        return y

    @staticmethod
    def backward(ctx, dy):
        net, needs = ctx.net, ctx.needs_input_grad
        if (
            needs[4:] != net.trainable
            or torch.is_grad_enabled()
            or compat.is_any_autocast_enabled()
            or compat.is_batched(dy)
        ):
            return _backward(ctx, dy)
        # The usual case, without the host cost of the general one.
        saved, ys, preacts = ctx.saved_tensors, net.ys, net.preacts
        grads = net.ops.mlp_bwd(
            dy, saved[0], saved[2:ys], saved[1], saved[ys:preacts], saved[preacts:],
            net.ints, net.numbers, ctx.row_offset, net.needs, needs[0],
        )  # fmt: skip
        grads[1:1] = _NO_GRADIENTS
        return tuple(grads)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Mlp.backward with frozen parameters, under autocast, or watched by PyTorch."""
    net, first, needs = ctx.net, ctx.first, ctx.needs_input_grad
    x, state, *rest = ctx.saved_tensors
    skipped = layers.count_params(net.ints[: layers.INTS * first])
    params, ys = rest[skipped : net.ys - 2], rest[net.ys - 2 + first : net.preacts - 2]
    preacts = rest[net.preacts - 2 + net.kinds[:first].count(SAVE_PREACT) :]
    ints, numbers = net.ints[layers.INTS * first :], net.numbers[layers.NUMBERS * first :]
    wanted = needs[4 + skipped :]
    with torch.autocast(dy.device.type, enabled=False):
        if is_watched(dy):
            asked = needs[0], *wanted
            grads = _with_graph(dy, x, params, state, ints, numbers, ctx.row_offset, asked)
        else:
            bits = layers.needs_of(ints, wanted)
            args = dy, x, params, state, ys, preacts, ints, numbers, ctx.row_offset, bits, needs[0]
            grads = net.ops.mlp_bwd(*args)
    found = [grads[0], *_NO_GRADIENTS, *[None] * skipped, *grads[1:]]
    return tuple([g if need else None for g, need in zip(found, needs, strict=True)])


def _with_graph(dy, x, params, state, ints, numbers, row_offset, asked) -> list[Tensor | None]:
    """dx and the gradients of params, differentiable; None where not asked for."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: a weight that serves two layers has a gradient from each.
        tensors = [t.view_as(t) for t in (x, *params)]
        y = tensors[0]
        for w, e in layers.unpack(tensors[1:], ints, numbers, state, row_offset):
            y = composite.linear_act(y, w, e)
    wanted = [t for t, need in zip(tensors, asked, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=again))
    return [next(found) if need else None for need in asked]
