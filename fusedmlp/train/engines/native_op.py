"""The ops behind the `native` engine, implemented by csrc/bind/cpu_train.cpp.

train: whole epochs of M networks that share the data, the loss and nothing else

    x         (n, ...) uint8 or fp32 rows of data
    y         (n,) int64 labels, or (n, N) fp32
    orders    one a network, (epochs * rows,) int64 rows: the order of one epoch after the other
    mean, std of the scaling (rows / divisor - mean) / std, 1 element or one a column; or None
    weights   (n,) fp32 of the rows in the loss of their step, whose sum is that of its weighted
              losses over that of its weights, times its rows; or None: all are 1
    lr_scales one a network, (steps,) fp64 factors of the learning rate, without elements for none
    params    w, b, slope of each layer, one network after the other, an empty tensor for one that
              is not there; updated
    m1, m2    momentum, or first and second moments, of the params; [] where no rule has them, an
              entry without elements where that network has none
    totals    (epochs of all networks, 3) fp64: sum of losses, number right, rows; added to. After
              an epoch whose loss is not finite a network is left as it is then
    work      (threads, floats) fp32 memory: at most that many networks run at a time, one alone has
              all threads; where it is too small nothing is done
    ints      of each layer: act, saves, threshold, stream offset
    numbers   of each layer: alpha, scale, and learning rate and weight decay of w, of b, of slope
    member_ints     of each network: rule, updates that Adam has done before, seed, first_step,
                    mask_layers, layers, rows of a step (the last of an epoch may have fewer),
                    epochs
    member_numbers  of each network: label smoothing, momentum, beta1, beta2, eps, max_norm of all
                    gradients (0 for no clipping)
    loss      0 cross-entropy, 1 mean squared error, 2 logistic: its sum over a row's outputs
    bf16      operands of the matrix products are rounded to bf16, and summed in fp32 as all else
    rule      0 SGD, 1 Nesterov, 2 AdamW, 3 Adam, 4 Adam as in Kingma and Ba, section 2
    returns   floats of a row of `work` that these arguments take

Step s has the masks of seed and stream (first_step + s) * mask_layers + stream offset of the layer.

evaluate: adds losses and hits of rows to totals (M, 3), without dropout and label smoothing; layers
is their number in each network, batch the rows of one forward pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import compat
from ...backends import native, registry
from ..data.types import Scaling
from .plain_layers import Layer

_DATA = "Tensor x, Tensor y, Tensor[] orders, Tensor? mean, Tensor? std, "
_OUT = "Tensor(d!) totals, Tensor(e!) work, int[] ints, float[] numbers, "
_SCHEMAS = {
    "train": (
        f"({_DATA}Tensor? weights, Tensor[] lr_scales, Tensor(a!)[] params, Tensor(b!)[] m1, "
        f"Tensor(c!)[] m2, {_OUT}int[] member_ints, float[] member_numbers, "
        "float divisor, int loss, bool bf16) -> int"
    ),
    "evaluate": (
        f"({_DATA}Tensor[] params, {_OUT}int[] layers, float divisor, int batch, int loss, "
        "bool bf16) -> int"
    ),
}
LOSSES = {"cross_entropy": 0, "mse": 1, "logistic": 2}
SGD, NESTEROV, ADAMW, ADAM, ADAM_EPSILON_HAT = 0, 1, 2, 3, 4
EMPTY = torch.empty(0)  # in place of a tensor that is not there
EVAL_ROWS = 256  # rows of one forward pass: its activations stay in the L2 cache
_NO_RATES = (0.0,) * 6  # learning rates and weight decay, which evaluation does not read

_lib = torch.library.Library("fusedmlp", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _lib.define(f"{_name}.native{_schema}")
train = torch.ops.fusedmlp.train.native
_evaluate = torch.ops.fusedmlp.evaluate.native


def unavailable(backend: str | None = None) -> str | None:
    """Why the ops cannot run here, or None; opens the extension.

    backend  of the task, or None for that of the context
    """
    reason = native.unavailable("cpu")
    if reason is not None:
        return reason
    if not all(compat.has_kernel(f"fusedmlp::{name}.native", "CPU") for name in _SCHEMAS):
        return "the extension was built from a version without it; build it again"
    named = registry.explicit(backend)
    if named not in (None, "native"):
        return f"backend {named!r} was asked for"
    return None


def reason_against(precision: str) -> str | None:
    """Why the ops cannot compute in it, where they can be opened, or None."""
    if precision == "fp32":
        return None
    if precision != "bf16":
        return f"it computes in fp32 or bf16, --precision is {precision}"
    if native.unavailable("cpu") is not None or native.bf16_isa():
        return None
    return (
        "its bf16 needs AVX512-BF16 or AMX, and this processor or FUSEDMLP_CPU_ISA has no more "
        f"than {native.cpu_isa()}"
    )


def work_of(networks: int, floats: int) -> Tensor:
    """A row of `floats` for each thread that takes part."""
    threads = min(networks, torch.get_num_threads())
    # 16 floats are a cache line: no two threads write to one.
    return torch.empty(threads, -(-floats // 16) * 16)


def tensors_of(layers: Sequence[Layer]) -> list[Tensor]:
    return [EMPTY if t is None else t for layer in layers for t in layer.tensors()]


@torch.no_grad()
def evaluate(
    networks: Sequence[Sequence[Layer]],
    x: Tensor,
    y: Tensor,
    orders: Sequence[Tensor],
    scaling: Scaling,
    loss: str,
    precision: str,
    work: Tensor,
) -> tuple[Tensor, Tensor]:
    """The op on the layers of each network and its rows (rows,) int64 of x, y: totals and work."""
    totals = torch.zeros(len(orders), 3, dtype=torch.float64)
    every = [layer for layers in networks for layer in layers]
    while True:
        needed = _evaluate(
            x,
            y,
            orders,
            scaling.mean,
            scaling.std,
            tensors_of(every),
            totals,
            work,
            [n for one in every for n in (one.act, one.saves(False), 0, one.stream_offset)],
            [n for one in every for n in (one.alpha, 1.0, *_NO_RATES)],
            [len(layers) for layers in networks],
            float(scaling.divisor),
            EVAL_ROWS,
            LOSSES[loss],
            precision == "bf16",
        )
        if needed <= work.shape[1]:
            return totals, work
        work = work_of(len(orders), needed)
