"""The data that `fit` may be given: a Data, tensors, or loaders. They are checked against the model
before the first step."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import FRAME, TrainConfig, is_table_file
from ..errors import TrainError, UsageError
from . import datasets
from .frames import is_frame
from .loaders import Loaders
from .rows import (
    as_tensor,
    check_classes,
    check_pair,
    dtype_of,
    loss_for,
    reshaped_targets,
    row_shape,
    shape,
    type_names,
)
from .types import Data, Scaling, in_fp32, prepared, standardized, with_validation


def config_for(data, config: TrainConfig | None) -> TrainConfig | None:
    """The config of a run on these data: what it says of columns may belong to a DataFrame, or to
    the table that a Data was made of."""
    made = isinstance(data, Data) and (data.schema or data.preparation) is not None
    if config is None or not (is_frame(data) or (made and not is_table_file(config.dataset))):
        return config
    return config.replace(dataset=FRAME)


def as_data(data, config: TrainConfig) -> Data | Loaders:
    """The data that `fit` was given, as a Data or Loaders."""
    if isinstance(data, Loaders):
        return data
    if is_frame(data):
        data = datasets.load(config, data)
    if isinstance(data, Data) and data.schema is not None:
        data = prepared(data, config.standardize is not False)
    if isinstance(data, Data):
        places = {"": "_train", "_val": "_val", "_test": "_test"}
        parts = [(getattr(data, f"x{p}"), getattr(data, f"y{p}"), n) for n, p in places.items()]
        _check_parts([part for part in parts if part[0] is not None], data.is_classes)
        return data
    parts = data if isinstance(data, tuple | list) else ()
    arrays = [as_tensor(part) for part in parts]
    if len(parts) in (2, 4) and all(a is not None for a in arrays):
        return _tensors(arrays, config)
    given = _loaders(data)
    if given is None:
        raise TypeError(
            "fit: data must be (x, y), (x, y, x_test, y_test), a Data, a DataFrame, a loader of "
            "(x, y) batches (a Dataset needs a DataLoader) or (loader, test_loader), got "
            f"{type_names(data)}"
        )
    asked = ("val_split", "standardize", "class_weight")
    flag = next((name for name in asked if getattr(config, name)), None)
    if flag is not None:
        raise UsageError(f"fit: {flag} needs data in memory; a loader has to do it itself")
    return given


def _loaders(data) -> Loaders | None:
    """None where data is no loader, no list of batches and no pair of loaders."""
    if not isinstance(data, tuple | list):
        return Loaders(data) if _is_loader(data) else None
    are_batches = [isinstance(p, tuple | list) and len(p) == 2 and _are_arrays(p) for p in data]
    if len(data) == 2 and all(are_batches):
        raise TypeError(
            "fit: two pairs of tensors may be two batches, or rows to train and to test on; pass "
            "(batches, None) for the first and (x, y, x_test, y_test) for the second"
        )
    if all(are_batches):
        return Loaders(data)
    if len(data) == 2 and _is_loader(data[0]) and (data[1] is None or _is_loader(data[1])):
        return Loaders(*data)
    return None


def _is_loader(part) -> bool:
    return (
        hasattr(part, "__iter__")
        and as_tensor(part) is None
        and not isinstance(part, str | Mapping)
    )


def _are_arrays(parts) -> bool:
    return all(as_tensor(part) is not None for part in parts)


def _check_parts(parts: list[tuple[Tensor, Tensor, str]], is_classes: bool) -> None:
    """Check each part (x, y, suffix of their names), and that all parts agree."""
    x, y, _ = parts[0]
    for rows, targets, where in parts:
        check_pair(rows, targets, f"x{where}", f"y{where}")
        if is_classes:
            check_classes(targets, f"y{where}")
        elif targets[0].numel() != y[0].numel():
            raise TrainError(
                f"y{where} must have {y[0].numel()} values a row, as y has, got {shape(targets)}"
            )
        if rows.shape[1:] != x.shape[1:]:
            raise TrainError(
                f"x{where} must have rows of {tuple(x.shape[1:])}, as x has, got "
                f"{tuple(rows.shape[1:])}"
            )
        if (rows.dtype == torch.uint8) != (x.dtype == torch.uint8):
            raise TrainError(
                f"x{where} must be {x.dtype}, as x is, got {rows.dtype}: bytes are divided by 255"
            )


def _tensors(arrays: list[Tensor], config: TrainConfig) -> Data:
    x, y, *test = (a.detach() for a in arrays)
    is_classes = loss_for(y, config) == "cross_entropy"
    _check_parts([(x, y, ""), *([(*test, "_test")] if test else [])], is_classes)
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
    data = with_validation(data, config.validation_share())
    return standardized(data) if config.standardize else data


def _floats(targets: Tensor) -> Tensor:
    """fp32 targets unchanged, others in fp64: their digits are needed until they are scaled."""
    return targets if targets.dtype == torch.float32 else targets.double()


def on_device(data: Data, model: nn.Module, device: torch.device) -> Data:
    """The data on the device, in the model's dtype, with as many classes as the model has
    outputs."""
    dtype = dtype_of(model)
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
        data = data.map(lambda targets: targets.to(dtype), "y")
    return _fitted_to(model, data)


def _fitted_to(model: nn.Module, data: Data) -> Data:
    """Check two rows through the model against the targets; match their shapes."""
    wanted = row_shape(model, data.scaling(data.x_train[:2]), data.is_classes)
    if data.is_classes:
        if wanted[0] < len(data.classes):
            raise TrainError(
                f"the model must have at least {len(data.classes)} outputs for classes 0 to "
                f"{len(data.classes) - 1}, got {wanted[0]}"
            )
        for name in ("y_train", "y_test", "y_val"):
            if (targets := getattr(data, name)) is not None:
                check_classes(targets, name, wanted[0])
        extra = tuple(str(i) for i in range(len(data.classes), wanted[0]))
        return replace(data, classes=data.classes + extra)
    return data.map(lambda targets: reshaped_targets(targets, wanted), "y")
