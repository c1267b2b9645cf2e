"""The best epoch of a training on the rows held out for validation, and its weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .config import TrainConfig
from .errors import UsageError


def best_epoch(history: Sequence[dict]) -> int:
    """The epoch, 1 for the first, with the highest val_accuracy, for numbers the lowest val_loss;
    of equal ones that of the lower loss, then the earlier. 0 where none has a finite loss."""
    best, lowest = 0, (math.inf, math.inf)
    for epoch, row in enumerate(history, start=1):
        rank = (-(row["val_accuracy"] or 0.0), row["val_loss"])
        if math.isfinite(row["val_loss"]) and rank < lowest:
            best, lowest = epoch, rank
    return best


@dataclass
class Best:
    """The best of the epochs so far.

    patience  epochs without a better one after which the training is to stop; None: it goes on
    """

    patience: int | None = None
    epoch: int = 0  # 1 for the first; 0: there is none yet
    weights: dict[str, Tensor] | None = None

    def see(self, history: Sequence[dict], model: nn.Module) -> None:
        """Keep the model's weights if the last epoch of the history is the best."""
        self.epoch = best_epoch(history)
        if self.epoch == len(history):
            state = model.state_dict()
            if self.weights is None:
                self.weights = {name: tensor.clone() for name, tensor in state.items()}
            for name, tensor in state.items():
                self.weights[name].copy_(tensor)

    def is_over(self, done: int) -> bool:
        """Whether a training of so many epochs is to stop."""
        return self.patience is not None and done - self.epoch >= self.patience

    def put_back(self, model: nn.Module) -> None:
        if self.weights is not None:
            model.load_state_dict(self.weights)

    def to_dict(self) -> dict:
        return {"epoch": self.epoch, "weights": self.weights}


def best_for(config: TrainConfig, has_validation: bool) -> Best | None:
    """None where the weights of the last epoch are kept.

    raises  UsageError where no rows tell which epoch is the best
    """
    if config.keep != "best":
        return None
    if not has_validation:
        raise UsageError(
            "--keep best needs rows held out for validation, and there are none; give --val-split, "
            "or data with a validation part"
        )
    return Best(config.patience)
