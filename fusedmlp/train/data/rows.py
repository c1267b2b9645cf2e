"""Checks of rows, targets and models, for tensors and for batches of a loader."""

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..errors import TrainError, UsageError


def as_tensor(part) -> Tensor | None:
    """A tensor of an array-like (NumPy); None for everything else."""
    if isinstance(part, Tensor):
        return part.detach()
    if not hasattr(part, "__array__"):
        return None
    import numpy

    values = numpy.asarray(part)
    if any(stride < 0 for stride in values.strides):  # which torch does not take
        values = values.copy()
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"data must be arrays of numbers: {error}; a table with words is passed as one "
            "DataFrame, with config.target"
        ) from error


def type_names(data) -> str:
    if isinstance(data, tuple | list):
        return "(" + ", ".join(type(part).__name__ for part in data) + ")"
    return type(data).__name__


def check_pair(x: Tensor, y: Tensor, x_name: str, y_name: str, with_values: bool = True) -> None:
    """Raise TrainError unless x has at least one row, y one target a row, and all is finite.

    with_values  whether values are checked, which waits for a GPU that holds them
    """
    if x.dim() < 1 or y.dim() < 1 or len(x) != len(y):
        raise TrainError(
            f"{y_name} must have one target a row of {x_name} {shape(x)}, got {shape(y)}"
        )
    if len(x) == 0:
        raise TrainError(f"{x_name} must have at least one row, got {shape(x)}")
    for values, name in ((x, x_name), (y, y_name)):
        if with_values and values.is_floating_point() and not _is_finite(values):
            raise TrainError(f"{name} must hold finite numbers, got NaN or infinity")


def _is_finite(values: Tensor) -> bool:
    # The sum takes a tenth of the time and is not finite where a value is not; but it may overflow.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def check_classes(
    y: Tensor, name: str, outputs: int | None = None, with_values: bool = True
) -> None:
    """Raise TrainError unless y is (n,) classes from 0 on, below `outputs` where that is known.

    with_values  whether values are checked, which waits for a GPU that holds them
    """
    if y.dim() != 1:
        raise TrainError(f"{name} must be (n,) integer classes, got {shape(y)}")
    if y.is_floating_point() or y.is_complex():
        raise TrainError(f"{name} must hold integer classes, got {y.dtype}")
    if not with_values:
        return
    low, high = (int(bound) for bound in y.aminmax())
    if outputs is None and low < 0:
        raise TrainError(f"{name} must hold classes from 0 on, got {low}")
    if outputs is not None and (low < 0 or high >= outputs):
        raise TrainError(
            f"{name} must hold classes 0 to {outputs - 1}, as the model has outputs, got "
            f"{low if low < 0 else high}"
        )


def loss_for(y: Tensor, config: TrainConfig) -> str:
    """cross_entropy or mse: of integers and of floats, unless the config says otherwise."""
    if config.loss == "cross_entropy" and y.is_floating_point():
        raise UsageError(f"loss cross_entropy needs integer classes, but y is {y.dtype}; take mse")
    if config.loss != "auto":
        return config.loss
    return "mse" if y.is_floating_point() else "cross_entropy"


def dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def reshaped_targets(targets: Tensor, wanted: torch.Size, name: str = "the targets") -> Tensor:
    """Float targets (n, ...) in the shape of the model's outputs, (n, *wanted)."""
    if targets[0].numel() != wanted.numel():
        raise TrainError(
            f"the model must return {targets[0].numel()} values a row to match {name}, got "
            f"{tuple(wanted)} a row"
        )
    return targets.reshape(len(targets), *wanted)


def row_shape(model: nn.Module, inputs: Tensor, is_classes: bool) -> torch.Size:
    """The shape of what the model returns for one row, in evaluation mode.

    inputs  (2, ...): a model that squeezes its outputs takes the dimension of a single row away
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise TrainError(
            f"the model cannot take rows of the data, {shape(inputs)}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(outputs, Tensor):
        raise TrainError(f"the model must return one tensor, got {type(outputs).__name__}")
    rows = len(inputs)
    has_rows = outputs.dim() > 0 and len(outputs) == rows
    if not has_rows and rows > 1:
        raise TrainError(
            f"the model must return one output a row, got {shape(outputs)} for {rows} rows"
        )
    found = outputs.shape[1:] if has_rows else outputs.shape
    if is_classes and len(found) != 1:
        raise TrainError(
            f"the model must return (rows, classes), got {shape(outputs)} for {rows} rows"
        )
    return found
