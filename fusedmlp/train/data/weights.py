"""The weights of training rows in their loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TrainError, UsageError
from .types import Data


def row_weights(data: Data, class_weight: str | None) -> Tensor | None:
    """(n,) fp32 of the training rows, on their device; None where all are equal.

    A row has its own weight times that of its class, which for `balanced` is n / (classes * rows of
    the class), as scikit-learn has it. Classes without a training row are not counted.
    """
    weights = None
    if data.weights is not None:
        check_weights(data.weights, len(data.x_train))
        weights = data.weights.double().to(data.y_train.device)
    if class_weight == "balanced":
        if not data.is_classes:
            raise UsageError(
                f"--class-weight needs classes, but the target of {data.name} is a number; leave "
                "it out"
            )
        counts = torch.bincount(data.y_train).double()
        of_class = len(data.y_train) / (counts * (counts > 0).sum())
        weights = of_class[data.y_train] * (1.0 if weights is None else weights)
    return None if weights is None else weights.float()


def check_weights(weights: Tensor, rows: int) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor, got {type(weights).__name__}")
    if tuple(weights.shape) != (rows,):
        raise TrainError(
            f"weights must be ({rows},), one a training row, got {tuple(weights.shape)}"
        )
    if not bool((weights >= 0).all() & weights.isfinite().all()) or not bool(weights.any()):
        raise TrainError("weights must be finite numbers of at least 0, and not all of them 0")
