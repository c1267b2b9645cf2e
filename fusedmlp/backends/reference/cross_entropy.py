"""cross_entropy: the loss of every row and its gradient, by F.log_softmax.

p = softmax(z)            q = (1 - e) onehot(target) + e / C        e: label smoothing
loss = -sum(q log p)      dz = (p - q) * grad_scale
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...spec import dtypes


def cross_entropy(logits, target, label_smoothing, ignore_index, grad_scale):
    """losses (M,), 0 for ignored rows, and dlogits (M, C): grad_scale times that of their sum.

    A target outside [0, C) that is not ignore_index gives a row of NaN, as on every backend.
    """
    dtype, classes = dtypes.compute(logits.dtype), logits.shape[1]
    log_p = F.log_softmax(logits.to(dtype), dim=1)
    counted = target != ignore_index
    known = (target >= 0) & (target < classes)
    at = torch.where(known, target, 0)[:, None]
    losses = (label_smoothing - 1) * log_p.gather(1, at)[:, 0]
    if label_smoothing:
        # Not at 0: a logit of -inf elsewhere must not become a NaN.
        losses = losses - label_smoothing * log_p.mean(1)
    q = torch.full_like(log_p, label_smoothing / classes)
    q.scatter_add_(1, at, torch.full_like(at, 1 - label_smoothing, dtype=dtype))
    dlogits = (log_p.exp() - q) * grad_scale
    nan = float("nan")
    losses = torch.where(counted, torch.where(known, losses, nan), 0.0)
    dlogits = torch.where(counted[:, None], torch.where(known[:, None], dlogits, nan), 0.0)
    return losses, dlogits.to(logits.dtype)
