"""The network of a config, its first weights, its optimizer, and its outputs on rows that it is not
trained on."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .. import compat
from ..nn import FusedLinear, FusedMLP
from ..nn.groups import activation_of
from ..spec import activations
from .config import TrainConfig
from .data.defaults import resolved
from .data.rows import check_pair
from .data.types import Data, Scaling, seeded
from .losses import loss_sums, mean_figures
from .process import ALONE, World
from .schedule import schedule_of
from .task import Task, autocast

EVAL_ROWS = 4096  # rows of a forward pass without gradients


def build_network(config: TrainConfig, data: Data) -> FusedMLP:
    """The network on the CPU; its weights depend on the seed alone, and the global generator is
    left as it was."""
    config = resolved(config, data)
    return network_of_shape(shape_for(config, data), config.init, config.init_std, config.seed)


def shape_for(config: TrainConfig, data: Data) -> dict:
    """The plain values from which `network_of_shape` builds the network again."""
    return {
        "dims": [data.in_features, *config.hidden, data.out_features],
        "activation": config.activation,
        "dropout": list(config.dropout_per_layer()),
    }


class Ensemble(nn.Module):
    """Networks of one shape, whose probabilities, or numbers, are averaged.

    forward  logarithms of the mean of their probabilities (B, classes), or mean outputs (B, k)
    """

    def __init__(self, networks: Sequence[nn.Module], is_classes: bool):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.is_classes = is_classes

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([network(x) for network in self.networks])
        if not self.is_classes:
            return outputs.mean(0)
        return outputs.log_softmax(-1).logsumexp(0) - math.log(len(self.networks))


def network_of_shape(
    shape: dict, init: str = "default", init_std: float | None = None, seed: int = 0
) -> FusedMLP:
    first, *hidden, last = shape["dims"]
    generator = seeded("init", seed)
    with torch.random.fork_rng(devices=[]):
        # PyTorch's layers draw their first weights from the global generator.
        torch.default_generator.manual_seed(generator.initial_seed())
        model = FusedMLP(
            first, hidden, last, activation=shape["activation"], dropout=shape["dropout"]
        )
    if init == "normal":
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=init_std, generator=generator)
                nn.init.zeros_(layer.bias)
    return model


def dims_of(model: nn.Module) -> list[int]:
    """[in, hidden, ..., out] of the linear layers of any model, as far as they form a chain."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | FusedLinear)]
    if not layers or any(a.out_features != b.in_features for a, b in pairwise(layers)):
        return []
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def shape_of(model: FusedMLP) -> dict | None:
    """The plain values from which `network_of_shape` builds this network again; None where children
    were added or replaced."""
    layers, names, dropout = [], [], []
    for child in model:
        if type(child) is nn.Linear:
            layers.append(child)
            names.append("none")
            dropout.append(0.0)
        elif layers and type(child) is nn.Dropout:
            dropout[-1] = child.p
        elif layers and (found := activation_of(child)) is not None:
            names[-1] = activations.NAMES[found[0]]
        else:
            return None
    hidden = set(names[:-1]) or {"relu"}
    if (
        len(hidden) != 1
        or names[-1] != "none"
        or dropout[-1]
        or any(m.bias is None for m in layers)
    ):
        return None
    return {"dims": dims_of(model), "activation": hidden.pop(), "dropout": dropout[:-1]}


def optimizer_for(model: nn.Module, config: TrainConfig, loss: str) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = {"lr": config.learning_rate(loss), "weight_decay": config.weight_decay}
    if config.optimizer == "adam":
        return compat.make_optimizer(torch.optim.Adam, parameters, **settings)
    if config.optimizer == "adamw":
        return compat.make_optimizer(torch.optim.AdamW, parameters, **settings)
    return compat.make_optimizer(torch.optim.SGD, parameters, momentum=config.momentum, **settings)


def task_for(
    model: nn.Module,
    config: TrainConfig,
    loss: str,
    device: torch.device,
    scaling: Scaling,
    steps: int | None,
    world: World = ALONE,
) -> Task:
    """The task of a config without None, to which the data are still to be added.

    steps  of an epoch; None where a loader does not know
    """
    task = Task(model, optimizer_for(model, config, loss), loss, device, scaling=scaling)
    task.precision, task.seed, task.world = config.precision, config.seed, world
    task.label_smoothing, task.clip_norm = config.label_smoothing, config.clip_norm
    task.schedule = schedule_of(config, steps)
    return task


def regression(outputs: Tensor, data: Data) -> dict[str, float]:
    """{"test_rmse", "test_r2"} of outputs (n, ...) for the test rows: the root of the mean squared
    error in the target's own units, and the mean of each target's coefficient of determination, as
    r2_score of scikit-learn has it."""
    true, found = in_units(data, data.y_test, outputs)
    squares = (found - true).square()
    error, spread = squares.sum(0), (true - true.mean(0)).square().sum(0)
    # A target without spread is met exactly or not at all.
    share = torch.where(spread > 0, error / spread, (error > 0).double())
    return {
        "test_rmse": float(squares.mean().sqrt()),
        "test_r2": float(1 - share.mean()) if len(true) > 1 else math.nan,
    }


def in_units(data: Data, targets: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """(true, predicted), each (n, k), in the target's own units."""
    scaling = data.target_scaling or Scaling()
    true, found = (scaling.undo(each.reshape(len(outputs), -1)) for each in (targets, outputs))
    return true, found


def predict(model: nn.Module, x: Tensor, scaling: Scaling, precision: str = "fp32") -> Tensor:
    """Outputs (n, C) in fp32 of rows x (n, ...) as stored, in evaluation mode; the mode is put
    back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(x.device, precision):
            outputs = [_at_least_fp32(model(scaling(rows))) for rows in x.split(EVAL_ROWS)]
    finally:
        model.train(was_training)
    # A model that squeezes its outputs loses the dimension of a single row.
    row = outputs[0].shape[1:]
    return torch.cat([part.reshape(-1, *row) for part in outputs])


def _at_least_fp32(outputs: Tensor) -> Tensor:
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    scaling: Scaling,
    loss: str,
    *,
    precision="fp32",
    world=None,
) -> tuple[float, float | None]:
    """(loss, accuracy) over rows x, y; accuracy is None for regression. Each process takes its
    share."""
    check_pair(x, y, "x", "y", with_values=False)
    first, last = world.rows(len(x)) if world is not None else (0, len(x))
    total = torch.zeros(3, dtype=torch.float64, device=x.device)
    if last > first:
        total = loss_sums(loss, predict(model, x[first:last], scaling, precision), y[first:last])
    total = total if world is None else world.sum(total)
    return mean_figures(loss, total.tolist())


def evaluate_batches(task, batches) -> tuple[float | None, float | None]:
    """The same as evaluate, over (inputs, targets) that are on the device already."""
    total = torch.zeros(3, dtype=torch.float64, device=task.device)
    for inputs, targets in batches:
        total += loss_sums(
            task.loss,
            predict(task.model, inputs, Scaling(dtype=inputs.dtype), task.precision),
            targets,
        )
    return mean_figures(task.loss, total.tolist())
