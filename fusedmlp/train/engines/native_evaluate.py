"""Losses and hits of several networks over rows that they are not trained on, in one call of C++.

Does not train, and does not run modules: networks that are not plain layers are left to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data.types import Scaling
from ..task import Task
from . import native_op
from .plain_layers import Layer, layers_of, reasons_against_rows


def evaluate(
    models: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    parts: Sequence[Sequence[Tensor]],
    *,
    loss: str,
    scaling: Scaling = Scaling(),  # noqa: B008  frozen
    precision: str = "fp32",
) -> Tensor | None:
    """Sums over rows in evaluation mode, without label smoothing.

    models   FusedMLP or other networks that the `native` engine takes
    x        (n, ...) rows as stored;  y (n,) int64 classes, or (n, k) fp32
    parts    for each model equally many (rows,) int64: numbers of rows of x
    loss     cross_entropy or mse
    precision  fp32, or bf16: of the operands of the matrix products
    returns  (models, parts, 3) fp64: sum of losses, number right, rows; None where one of the
             models, the data or the precision cannot be taken
    """
    networks = [_layers(model, x, y, loss, scaling) for model in models]
    if native_op.unavailable() is not None or native_op.reason_against(precision) is not None:
        return None
    if not networks or None in networks:
        return None
    each = [layers for layers, mine in zip(networks, parts, strict=True) for _ in mine]
    orders = [rows for mine in parts for rows in mine]
    totals, _ = native_op.evaluate(each, x, y, orders, scaling, loss, precision, torch.empty(1, 0))
    return totals.view(len(models), -1, 3)


def _layers(model, x: Tensor, y: Tensor, loss: str, scaling: Scaling) -> list[Layer] | None:
    cpu = torch.device("cpu")
    plain = all(
        p.dtype == torch.float32 and p.device == cpu and p.is_contiguous()
        for p in model.parameters()
    )
    layers, reasons = layers_of(model)
    if reasons or not plain or x.device != cpu or y.device != cpu:
        return None
    task = Task(model, None, loss, cpu, scaling=scaling)
    return None if reasons_against_rows(task, x, y, layers) else layers
