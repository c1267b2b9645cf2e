"""The ops behind the `native` step engine, implemented by csrc/ops_step.cpp.

train_steps: many steps of one network

    x         (n, ...) uint8 or fp32 rows of data
    y         (n,) int64 labels, or (n, N) fp32
    order     (steps * batch,) int64 rows, the last step may have fewer than `batch`
    mean, std of the scaling (rows / divisor - mean) / std, 1 element or one a column; or None
    lr_scale  (steps,) fp64 factors of the learning rate, or None
    params    w, b, slope of each layer, an empty tensor for one that is not there; updated
    m1, m2    momentum, or first and second moments, of the params; [] where the rule has none
    totals    (3,) fp64: sum of losses, number right, rows; added to
    work      (floats,) fp32 memory; where it is too small nothing is done
    ints      of each layer: act, saves, threshold, number of the layer
    numbers   of each layer: alpha, scale, and learning rate and weight decay of w, of b, of slope
    loss      0 cross-entropy, 1 mean squared error, 2 logistic: its sum over a row's outputs
    rule      0 SGD, 1 Nesterov, 2 AdamW, 3 Adam, 4 Adam as in epsilon_hat.py
    updates   that Adam has done before;  max_norm: of all gradients, 0 for no clipping
    returns   floats of `work` that these arguments take

Step s has the masks of seed and stream (first_step + s) * mask_layers + number of the layer.

train_many: the same for M networks, for whole epochs; their results are those of train_steps

    orders               one a network, (epochs * rows,): the order of one epoch after the other
    lr_scales            one a network, one number a step; one without elements is none
    params, m1, m2, ints, numbers  of the layers of all networks, one network after the other; an
                         entry of m1, m2 without elements is none
    totals               (epochs of all networks, 3). After an epoch whose loss is not finite a
                         network is left as it is then, with totals of 0 for epochs it did not do
    work                 (threads, floats): at most that many networks run at a time
    member_ints          of each network: rule, updates, seed, first_step, mask_layers, layers,
                         rows of a step, epochs
    member_numbers       of each network: smoothing, momentum, beta1, beta2, eps, max_norm

judge_rows: adds losses and hits of rows to totals, without dropout and without label smoothing

judge_many: the same for M networks, each on rows of its own

    orders               one a network
    totals, work         (M, 3) and (threads, floats)
    layers               their number in each network
"""

import torch

from ... import compat
from ...backends import native, registry

_DATA = "Tensor x, Tensor y, {order}, Tensor? mean, Tensor? std, "
_STATE = "Tensor(a!)[] params, Tensor(b!)[] m1, Tensor(c!)[] m2, "
_OUT = "Tensor(d!) totals, Tensor(e!) work, int[] ints, float[] numbers, "
_ONE, _MANY = _DATA.format(order="Tensor order"), _DATA.format(order="Tensor[] orders")
_SCHEMAS = {
    "train_steps": (
        f"({_ONE}Tensor? lr_scale, {_STATE}{_OUT}float divisor, int batch, int loss, "
        "float smoothing, int rule, float momentum, float beta1, float beta2, float eps, "
        "int updates, float max_norm, int seed, int first_step, int mask_layers) -> int"
    ),
    "train_many": (
        f"({_MANY}Tensor[] lr_scales, {_STATE}{_OUT}int[] member_ints, float[] member_numbers, "
        "float divisor, int loss) -> int"
    ),
    "judge_rows": f"({_ONE}Tensor[] params, {_OUT}float divisor, int batch, int loss) -> int",
    "judge_many": (
        f"({_MANY}Tensor[] params, {_OUT}int[] layers, float divisor, int batch, int loss) -> int"
    ),
}
CROSS_ENTROPY, MSE, LOGISTIC = 0, 1, 2
SGD, NESTEROV, ADAMW, ADAM, ADAM_EPSILON_HAT = 0, 1, 2, 3, 4

_lib = torch.library.Library("fusedmlp", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _lib.define(f"{_name}.native{_schema}")
train_steps = torch.ops.fusedmlp.train_steps.native
train_many = torch.ops.fusedmlp.train_many.native
judge_rows = torch.ops.fusedmlp.judge_rows.native
judge_many = torch.ops.fusedmlp.judge_many.native


def unavailable(backend: str | None = None) -> str | None:
    """Why the op cannot run here, or None; opens the extension.

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
