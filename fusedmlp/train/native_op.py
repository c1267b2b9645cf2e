"""train_steps: the op behind the `native` step engine, implemented by csrc/ops_step.cpp.

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
    loss      0 cross-entropy, 1 mean squared error;  rule: 0 SGD, 1 Nesterov, 2 AdamW
    updates   that AdamW has done before;  max_norm: of all gradients, 0 for no clipping
    returns   floats of `work` that these arguments take

Step s has the masks of seed and stream (first_step + s) * mask_layers + number of the layer.
"""

import torch

from .. import dispatch
from ..kernels.native import extension

_SCHEMA = (
    "train_steps.native(Tensor x, Tensor y, Tensor order, Tensor? mean, Tensor? std, "
    "Tensor? lr_scale, Tensor(a!)[] params, Tensor(b!)[] m1, Tensor(c!)[] m2, Tensor(d!) totals, "
    "Tensor(e!) work, int[] ints, float[] numbers, float divisor, int batch, int loss, "
    "float smoothing, int rule, float momentum, float beta1, float beta2, float eps, int updates, "
    "float max_norm, int seed, int first_step, int mask_layers) -> int"
)
CROSS_ENTROPY, MSE = 0, 1
SGD, NESTEROV, ADAMW = 0, 1, 2

_lib = torch.library.Library("fusedmlp", "FRAGMENT")
_lib.define(_SCHEMA)
train_steps = torch.ops.fusedmlp.train_steps.native


def unavailable() -> str | None:
    """Why the op cannot run here, or None; opens the extension."""
    reason = extension.unavailable("cpu")
    if reason is not None:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fusedmlp::train_steps.native", "CPU"):
        return "the extension was built from a version without it; build it again"
    if dispatch.explicit(None) not in (None, "native"):
        return f"backend {dispatch.explicit(None)!r} was asked for"
    return None
