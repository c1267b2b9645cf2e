"""What `fit` may be given as data: a Data, tensors, or loaders; checked against the model before
the first step."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .data import Data, Scaling, in_fp32, standardized, with_validation
from .errors import TrainError, UsageError


@dataclass(frozen=True)
class Loaders:
    """Batches (x, y) from the caller's own iterables, for data that does not fit in memory."""

    train: Iterable
    test: Iterable | None = None
    name: str = "loader"

    @property
    def length(self) -> int | None:
        """Batches an epoch, where the loader knows."""
        try:
            return len(self.train)
        except TypeError:
            return None


def of(data, config: TrainConfig) -> Data | Loaders:
    """A Data or Loaders from whatever `fit` was given."""
    if isinstance(data, Data | Loaders):
        return data
    parts = data if isinstance(data, tuple | list) else (data,)
    arrays = [part if isinstance(part, Tensor) else _array(part) for part in parts]
    if all(a is not None for a in arrays) and len(arrays) in (2, 4):
        return _tensors(arrays, config)
    if len(parts) in (1, 2) and all(
        a is None and hasattr(p, "__iter__") for a, p in zip(arrays, parts, strict=True)
    ):
        if config.val_split or config.standardize:
            flag = "val_split" if config.val_split else "standardize"
            raise UsageError(f"fit: {flag} needs data in memory; a loader has to do it itself")
        return Loaders(*parts)
    raise TypeError(
        "fit: data must be (x, y), (x, y, x_test, y_test), a Data, a loader of (x, y) batches or "
        f"(loader, test_loader), got {_kinds(data)}"
    )


def _array(part) -> Tensor | None:
    """Tensors of array-likes (NumPy); None for everything else."""
    return torch.as_tensor(part) if hasattr(part, "__array__") else None


def _kinds(data) -> str:
    if isinstance(data, tuple | list):
        return "(" + ", ".join(type(part).__name__ for part in data) + ")"
    return type(data).__name__


def _tensors(arrays: list[Tensor], config: TrainConfig) -> Data:
    x, y, *test = (a.detach() for a in arrays)
    for rows, targets, where in ((x, y, ""), (*test, "_test") if test else (x, y, "")):
        if rows.dim() < 1 or targets.dim() < 1 or len(rows) != len(targets):
            raise TrainError(
                f"fit: y{where} must have one target a row of x{where} {_shape(rows)}, got "
                f"{_shape(targets)}"
            )
        if len(rows) == 0:
            raise TrainError(f"fit: x{where} must have at least one row, got {_shape(rows)}")
        if rows.is_floating_point() and not bool(torch.isfinite(rows).all()):
            raise TrainError(f"fit: x{where} must hold finite numbers, got NaN or infinity")
        if targets.is_floating_point() and not bool(torch.isfinite(targets).all()):
            raise TrainError(f"fit: y{where} must hold finite numbers, got NaN or infinity")
    is_classes = not y.is_floating_point() and config.loss != "mse"
    if config.loss == "cross_entropy" and not is_classes:
        raise UsageError(
            f"fit: loss cross_entropy needs integer classes, got y of {y.dtype}; take mse"
        )
    if is_classes:
        if y.dim() != 1:
            raise TrainError(f"fit: y must be (n,) integer classes, got {_shape(y)}")
        if int(y.min()) < 0:
            raise TrainError(f"fit: y must hold classes from 0 on, got {int(y.min())}")
    cast = (lambda t: t.long()) if is_classes else (lambda t: _floats(t).reshape(len(t), -1))
    data = Data(
        "tensors",
        x,
        cast(y),
        test[0] if test else None,
        cast(test[1]) if test else None,
        classes=tuple(str(i) for i in range(int(y.max()) + 1)) if is_classes else None,
        image_shape=tuple(x.shape[1:]) if x.dim() == 3 and x.dtype == torch.uint8 else None,
        scaling=Scaling(255.0) if x.dtype == torch.uint8 else Scaling(),
    )
    data = with_validation(data, config.val_split)
    return standardized(data) if config.standardize else data


def _floats(targets: Tensor) -> Tensor:
    """In fp64 what is not in fp32: the digits are needed until the targets are scaled."""
    return targets if targets.dtype == torch.float32 else targets.double()


def of_loader(loaders: Loaders, model: nn.Module, config: TrainConfig) -> tuple[Scaling, str]:
    """(scaling, loss) for batches from loaders, judged by the first batch."""
    try:
        x, y = next(iter(loaders.train))
    except StopIteration:
        raise TrainError("fit: the loader must give at least one batch, got none") from None
    except (TypeError, ValueError):
        raise TypeError("fit: the loader must give (x, y) batches of two tensors") from None
    loss = config.loss
    if loss == "auto":
        loss = "mse" if torch.as_tensor(y).is_floating_point() else "cross_entropy"
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return Scaling(255.0 if x.dtype == torch.uint8 else 1.0, dtype=dtype), loss


def batch_on(batch, task) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of a loader's batch on the task's device, scaled and in the model's
    dtype."""
    x, y = batch
    inputs = task.scaling(x.to(task.device, non_blocking=True))
    y = y.to(task.device, non_blocking=True)
    if task.loss == "cross_entropy":
        return inputs, y.long()
    return inputs, y.to(task.scaling.dtype).reshape(len(y), -1)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def on_device(data: Data, model: nn.Module, device: torch.device) -> Data:
    """The data on the device, in the model's dtype, with as many classes as the model has
    outputs."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        data = data.to(device)
    except torch.OutOfMemoryError as error:
        size = sum(t.nbytes for t in (data.x_train, data.x_test, data.x_val) if t is not None)
        raise TrainError(
            f"the data set takes {size / 2**30:.1f} GiB, which {device} does not have free; "
            "pass fit a DataLoader, or take device cpu"
        ) from error
    data = replace(data, scaling=replace(data.scaling.to(device), dtype=dtype))
    if dtype != torch.float64:
        data = in_fp32(data)
    if not data.is_classes:
        casted = {
            n: t.to(dtype)
            for n in ("y_train", "y_test", "y_val")
            if (t := getattr(data, n)) is not None
        }
        data = replace(data, **casted)
    return _fitted_to(model, data)


def _fitted_to(model: nn.Module, data: Data) -> Data:
    """Check one row through the model against the targets; match their shapes."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(data.scaling(data.x_train[:1]))
    except (RuntimeError, ValueError, TypeError) as error:
        raise TrainError(
            f"the model cannot take a row of the data, {_shape(data.x_train[:1])}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(outputs, Tensor):
        raise TrainError(f"the model must return one tensor, got {type(outputs).__name__}")
    if data.is_classes:
        if outputs.dim() != 2:
            raise TrainError(
                f"the model must return (rows, classes), got {_shape(outputs)} for one row"
            )
        if outputs.shape[1] < len(data.classes):
            raise TrainError(
                f"the model must have at least {len(data.classes)} outputs for classes 0 to "
                f"{len(data.classes) - 1}, got {outputs.shape[1]}"
            )
        for name in ("y_test", "y_val"):
            targets = getattr(data, name)
            if targets is not None and (
                int(targets.max()) >= outputs.shape[1] or int(targets.min()) < 0
            ):
                raise TrainError(
                    f"{name} must hold classes 0 to {outputs.shape[1] - 1}, got "
                    f"{int(targets.max())}"
                )
        extra = tuple(str(i) for i in range(len(data.classes), outputs.shape[1]))
        return replace(data, classes=data.classes + extra)
    shape = outputs.shape[1:]
    if data.y_train[:1].numel() != outputs.numel():
        raise TrainError(
            f"the model must return {data.y_train[0].numel()} values a row to match the "
            f"targets, got {_shape(outputs)}"
        )
    matched = {
        name: targets.reshape(len(targets), *shape)
        for name in ("y_train", "y_test", "y_val")
        if (targets := getattr(data, name)) is not None
    }
    return replace(data, **matched)
