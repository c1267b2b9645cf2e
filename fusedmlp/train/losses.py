"""The losses, for training and for evaluation.

cross_entropy   of logits (B, C) and classes (B,) int64
mse             of a row: the mean over its outputs (B, ...) of the squared error
logistic        of a row: the sum over its outputs (B, k) of F.binary_cross_entropy_with_logits
poisson         of a row: the sum over its outputs (B, k), logarithms of the mean, of half the
                Poisson deviance, y log(y / mean) - y + mean
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import TrainError
from .process import World

KINDS = ("cross_entropy", "mse", "logistic", "poisson")
PENDING_VALUES = 1 << 20  # outputs that wait on the device before their losses are summed


def row_losses(kind: str, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """(B,) the loss of each row; smoothing: of the labels of cross_entropy."""
    if kind == "cross_entropy":
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)
    if kind == "logistic":
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1)
    if kind == "poisson":
        return (torch.xlogy(targets, targets) - targets * outputs - targets + outputs.exp()).sum(1)
    each = (outputs - targets).square()
    return each if each.dim() == 1 else each.flatten(1).mean(1)


def batch_loss(
    kind: str,
    outputs: Tensor,
    targets: Tensor,
    reduction: str = "mean",
    smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """The mean or the sum over the rows, to be differentiated; with weights (B,) the mean or sum
    of so many times each row."""
    if weights is not None:
        total = (row_losses(kind, outputs, targets, smoothing) * weights).sum()
        # Rows that all weigh nothing have no gradient.
        least = torch.finfo(weights.dtype).tiny
        return total / weights.sum().clamp_min(least) if reduction == "mean" else total
    if kind == "cross_entropy":
        return F.cross_entropy(outputs, targets, reduction=reduction, label_smoothing=smoothing)
    if kind == "mse":
        loss = F.mse_loss(outputs, targets, reduction=reduction)
        values = targets[0].numel() if len(targets) else 1
        return loss if reduction == "mean" else loss / max(1, values)
    return getattr(row_losses(kind, outputs, targets), reduction)()


def aligned(kind: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs in the shape that the loss takes: a model that squeezes them loses the dimension of
    a single row, and (B,) against (B, 1) would be the loss of all pairs."""
    if kind == "cross_entropy":
        return outputs if outputs.dim() > 1 else outputs.reshape(len(targets), -1)
    if outputs.shape == targets.shape:
        return outputs
    if outputs.numel() != targets.numel():
        raise TrainError(
            f"the model must return {tuple(targets.shape)} to match the targets, got "
            f"{tuple(outputs.shape)}"
        )
    return outputs.reshape(targets.shape)


@torch.no_grad()
def loss_sums(kind: str, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """(3,) fp64: sum of losses, number right, rows. The grouping of rows leaves no trace in it."""
    outputs = aligned(kind, outputs, targets)
    if outputs.dtype in (torch.float16, torch.bfloat16):
        outputs = outputs.float()
    each = row_losses(kind, outputs, targets, smoothing)
    right = torch.zeros((), dtype=torch.float64, device=outputs.device)
    if kind == "cross_entropy":
        right = (outputs.argmax(1) == targets).sum().double()
    rows = torch.tensor(len(targets), device=outputs.device)
    return torch.stack([each.double().sum(), right, rows.double()])


def mean_figures(kind: str, sums: Iterable[float]) -> tuple[float | None, float | None]:
    """(loss, accuracy) of (sum of losses, number right, rows); accuracy is None for regression,
    and both are None without rows."""
    loss, right, rows = sums
    if not rows:
        return None, None
    return loss / rows, right / rows if kind == "cross_entropy" else None


def rounded(figure: float | None) -> float | None:
    """The figure with 9 digits: beyond them the grouping of a sum can be seen."""
    return None if figure is None else float(f"{figure:.9g}")


class LossMeter:
    """Sums losses and hits of training steps on the device.

    Outputs are kept and evaluated many steps at a time: argmax, comparison and sums of each step
    would cost 2 % of a step of 784-256-10 on a CPU.
    """

    def __init__(self, kind: str, smoothing: float, device: torch.device, world: World):
        self.kind, self.smoothing, self.world = kind, smoothing, world
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.values = 0
        self.total = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        self.pending.append((outputs.detach(), targets))
        self.values += outputs.numel()
        if self.values >= PENDING_VALUES:
            self._evaluate()

    def add_weighted(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """A batch whose rows have weights: its mean loss counts for each, a hit counts once."""
        sums = loss_sums(self.kind, outputs.detach(), targets)
        sums[0] = loss.detach().double() * len(targets)
        self.total += sums

    def _evaluate(self) -> None:
        if not self.pending:
            return
        outputs, targets = (torch.cat(parts) for parts in zip(*self.pending, strict=True))
        self.pending, self.values = [], 0
        self.total += loss_sums(self.kind, outputs, targets, self.smoothing)

    def read(self) -> tuple[float, float, int]:
        """(sum of losses, number right, rows) of all processes since the last read."""
        self._evaluate()
        loss, right, rows = self.world.sum(self.total).tolist()  # the one wait for the device
        self.total = torch.zeros_like(self.total)
        return loss, right, int(rows)
