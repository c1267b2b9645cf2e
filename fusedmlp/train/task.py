"""Task: what an engine trains, on its device."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..nn import FusedSequential
from ..nn.groups import is_fused_module
from .data.scaling import Scaling
from .process import ALONE, World
from .schedule import Schedule


@dataclass
class Task:
    """A model, its optimizer and its loss, with the rows to train on or None where batches come
    from a loader."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    loss: str  # one of losses.KINDS
    device: torch.device
    x: Tensor | None = None  # (n, ...) rows as stored; None where batches come from a loader
    y: Tensor | None = None  # (n,) int64 for cross_entropy, else (n, k) floats
    scaling: Scaling = field(default_factory=Scaling)
    precision: str = "fp32"
    seed: int = 0
    world: World = ALONE
    label_smoothing: float = 0.0  # cross_entropy only
    clip_norm: float = 0.0  # largest norm of all gradients together; 0: any
    schedule: Schedule = field(default_factory=Schedule)  # of the learning rates
    row_weights: Tensor | None = None  # (n,) in the loss of each batch; None: all are equal
    backend: str | None = None  # of the fused layers; None: as the context says

    @property
    def mask_layers(self) -> int:
        """Streams that a step takes, or 0 where masks do not come from the state of the run.

        Only one fused network can be handed a state; other models draw from torch's generator,
        which `fit` seeds.
        """
        is_one = isinstance(self.model, FusedSequential) and is_fused_module(self.model)
        return self.model._layer_count() if is_one else 0


def autocast(device: torch.device, precision: str):
    """The context of bf16 and fp16 arithmetic; a context without effect for fp32 and tf32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
