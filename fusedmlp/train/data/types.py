"""Data: a data set as tensors, how its rows become inputs, and how rows are held out.

uint8 rows stay uint8, and `Scaling` makes float inputs of a gathered batch. Other rows are scaled
once, in fp64, before they are cut to fp32: a column may have an offset that fp32 has no digits for.
The data set that a config names is read in datasets.py.
"""

import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import TrainError
from . import preparation
from .columns import Schema
from .preparation import Preparation
from .scaling import Scaling

SPLIT_SEED = 20  # picks held-out rows: the same for every run seed, so that runs can be compared
TEST_SHARE = 0.2  # of the rows of a file without test rows


@dataclass(frozen=True)
class Data:
    """A data set. Targets: int64 (n,) for classes; float (n, k) for regression."""

    name: str
    x_train: Tensor  # (n, ...)
    y_train: Tensor
    x_test: Tensor | None = None
    y_test: Tensor | None = None
    x_val: Tensor | None = None
    y_val: Tensor | None = None
    classes: tuple[str, ...] | None = None  # None: regression
    image_shape: tuple[int, int] | None = None
    scaling: Scaling = field(default_factory=Scaling)  # from these rows to inputs
    row_scaling: Scaling | None = None  # that made these rows
    target_scaling: Scaling | None = None  # that made a float target
    features: tuple[str, ...] | None = None  # names of a table's columns
    target: str | None = None
    notes: tuple[str, ...] = ()  # one line each, for the user
    is_table: bool = False  # columns of numbers, for which some defaults differ
    schema: Schema | None = None  # of rows that are the raw columns of a table
    preparation: Preparation | None = None  # that made inputs of such rows
    weights: Tensor | None = None  # (n,) of the training rows in their loss; None: all are equal
    fingerprint: str | None = None  # digest of the rows before they were scaled

    @property
    def in_features(self) -> int:
        return self.x_train[0].numel()

    @property
    def out_features(self) -> int:
        return len(self.classes) if self.classes is not None else self.y_train[0].numel()

    @property
    def is_classes(self) -> bool:
        return self.classes is not None

    def map(self, change: Callable[[Tensor], Tensor], kinds: str = "xy") -> "Data":
        """The data with rows ("x"), targets ("y") or both changed, in every part that is there."""
        changed = {
            name: change(tensor)
            for kind in kinds
            for name in (f"{kind}_train", f"{kind}_test", f"{kind}_val")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **changed)

    def to(self, device) -> "Data":
        data = self.map(lambda tensor: tensor.to(device))
        return replace(data, scaling=self.scaling.to(device))

    def describe(self) -> dict:
        """The plain values that evaluate and predict need later."""
        return {
            "name": self.name,
            "classes": list(self.classes) if self.classes is not None else None,
            "image_shape": list(self.image_shape) if self.image_shape else None,
            "scaling": (self.row_scaling or self.scaling).to_dict(),
            "target_scaling": self.target_scaling.to_dict() if self.target_scaling else None,
            "features": list(self.features) if self.features else None,
            "preparation": self.preparation.to_dict() if self.preparation else None,
            "target": self.target,
            "rows": len(self.x_train),
            "digest": self.digest(),
        }

    def digest(self) -> str:
        """Fingerprint of the training rows, so that a run is not resumed on other data.

        64 rows spread over the set, all targets and the sizes: 2 ms instead of 100 for
        Fashion-MNIST.
        """
        if self.fingerprint is not None:
            return self.fingerprint
        picked = self.x_train[
            torch.linspace(0, len(self.x_train) - 1, 64, device=self.x_train.device).long()
        ]
        whole = hashlib.blake2b(
            repr((tuple(self.x_train.shape), self.x_train.dtype)).encode(), digest_size=8
        )
        if self.schema is not None:
            whole.update(repr(self.schema).encode())  # rows hold the places of its words
        if self.weights is not None:
            whole.update(self.weights.numpy().tobytes())
        whole.update(picked.cpu().contiguous().numpy().tobytes())
        whole.update(self.y_train.cpu().contiguous().numpy().tobytes())
        return whole.hexdigest()


def seeded(purpose: str, seed: int, index: int = 0) -> torch.Generator:
    """A CPU generator for one purpose of one run, independent of the global one."""
    text = f"{purpose}:{seed}:{index}".encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(number >> 1)


def permutation(seed: int, epoch: int, rows: int) -> Tensor:
    """The order of training rows in one epoch, the same for every engine: (rows,) int64, CPU."""
    return torch.randperm(rows, generator=seeded("order", seed, epoch))


def hold_out(
    rows: int, share: float, labels: Tensor | None = None, seed: int = SPLIT_SEED
) -> tuple[Tensor, Tensor]:
    """(kept, held) row numbers, each in rising order; with labels the same share of every class.

    labels (rows,) int64
    """
    order = _spread(rows, labels, seed)
    held = round(rows * share)
    if share > 0 and not 0 < held < rows:
        raise TrainError(
            f"a share of {share} of {rows} rows leaves no rows on one side; take another share "
            "or more data"
        )
    return order[held:].sort().values, order[:held].sort().values


def parts_of(
    rows: int, count: int, labels: Tensor | None = None, seed: int = SPLIT_SEED
) -> list[tuple[Tensor, Tensor]]:
    """(kept, held) row numbers for each of `count` parts, every row in one of those held; with
    labels as in hold_out."""
    parts = _spread(rows, labels, seed).tensor_split(count)
    others = (torch.cat([*parts[:i], *parts[i + 1 :]]) for i in range(count))
    return [(o.sort().values, p.sort().values) for o, p in zip(others, parts, strict=True)]


def _spread(rows: int, labels: Tensor | None, seed: int) -> Tensor:
    """(rows,) int64: the rows in a random order, any cut of which has the same share of every
    class."""
    order = torch.randperm(rows, generator=seeded("split", seed))
    if labels is None:
        return order
    by_class = order[torch.argsort(labels.cpu()[order], stable=True)]
    counts = torch.bincount(labels.cpu())
    counts = counts[counts > 0]
    place = torch.cat([(torch.arange(int(n)) + 0.5) / n for n in counts])
    return by_class[torch.argsort(place, stable=True)]


def with_validation(data: Data, share: float) -> Data:
    """Hold out a share of the training rows, stratified for classes."""
    if share == 0.0:
        return data
    kept, held = _held_out(data, share)
    return replace(kept, x_val=data.x_train[held], y_val=data.y_train[held])


@contextmanager
def _errors_named(data: Data):
    """Errors with the name of the data set before them."""
    try:
        yield
    except TrainError as error:
        raise TrainError(f"{data.name}: {error}") from error


def _held_out(data: Data, share: float) -> tuple[Data, Tensor]:
    """(the data without the rows held out, the numbers of those)."""
    with _errors_named(data):
        kept, held = hold_out(len(data.x_train), share, data.y_train if data.is_classes else None)
    weights = None if data.weights is None else data.weights[kept]
    rest = replace(data, x_train=data.x_train[kept], y_train=data.y_train[kept], weights=weights)
    return rest, held


def with_test(data: Data) -> Data:
    """Hold out a fifth of the rows as a test set, with a note, where the file has none."""
    if data.x_test is not None:
        return data
    kept, held = _held_out(data, TEST_SHARE)
    note = f"{data.name} brings no test rows: {len(held)} of its {len(data.x_train)} are held out"
    x, y = data.x_train[held], data.y_train[held]
    return replace(kept, x_test=x, y_test=y, notes=(*data.notes, note))


def standardized(data: Data, rows: Tensor | None = None) -> Data:
    """Inputs, and a float target, of mean 0 and deviation 1 over the training rows, or over those
    of them that `rows` numbers.

    Images have one pair of numbers, tables one for each feature.
    """
    x, y = data.x_train, data.y_train
    if rows is not None:
        x, y = x[rows], y[rows]
    scaling = Scaling.from_rows(x, data.scaling.divisor, each=data.image_shape is None)
    return scaled(data, scaling, None if data.is_classes else Scaling.from_rows(y))


def scaled(data: Data, scaling: Scaling, target_scaling: Scaling | None) -> Data:
    """The data with bytes to be scaled as they are gathered, other rows and targets scaled."""
    data = replace(data, fingerprint=data.digest())
    if data.x_train.dtype == torch.uint8:
        data = replace(data, scaling=scaling.to(dtype=torch.float32))
    else:
        data = data.map(lambda rows: _scale(scaling, rows), "x")
        data = replace(data, scaling=Scaling(), row_scaling=scaling)
    return data if target_scaling is None else _with_scaled_target(data, target_scaling)


def _with_scaled_target(data: Data, scaling: Scaling) -> Data:
    data = data.map(lambda targets: _scale(scaling, targets), "y")
    note = f"losses are in units of the variance of {data.target or 'the target'}"
    return replace(data, target_scaling=scaling, notes=(*data.notes, note))


def _scale(scaling: Scaling, values: Tensor) -> Tensor:
    # fp64 stays, for a model in fp64.
    wide = values.dtype in (torch.float64, torch.int64)
    return replace(scaling, dtype=torch.float64 if wide else torch.float32)(values)


def in_fp32(data: Data) -> Data:
    """The data with fp64 rows and targets cut to fp32, which the engines read."""
    tensors = (data.x_train, data.y_train, data.x_test, data.y_test, data.x_val, data.y_val)
    if not any(t is not None and t.dtype == torch.float64 for t in tensors):
        return data
    narrow = data.map(lambda t: t.float() if t.dtype == torch.float64 else t)
    return replace(narrow, fingerprint=data.digest())


def prepared(data: Data, standardize: bool, rows: Tensor | None = None) -> Data:
    """A data set of `datasets.read` as networks are trained on it; what is fitted is fitted to the
    training rows, or to those of them that `rows` numbers."""
    if data.schema is not None:
        return in_fp32(_tabulated(data, standardize, rows))
    return in_fp32(standardized(data, rows) if standardize else data)


def _tabulated(data: Data, standardize: bool, rows: Tensor | None) -> Data:
    """A table with the inputs of its raw rows."""
    data = replace(data, fingerprint=data.digest())
    every = slice(None) if rows is None else rows
    x, y = data.x_train[every], data.y_train[every]
    classes = len(data.classes) if data.is_classes else None
    with _errors_named(data):
        fitted, inputs, notes = preparation.fit(data.schema, x, y, classes, standardize, SPLIT_SEED)
    raw, columns = data.x_train, data.schema.columns
    data = data.map(lambda rows: rows if rows is raw else fitted(rows, columns), "x")
    if rows is not None:
        inputs = fitted(raw, columns).index_copy(0, rows, inputs)
    found = replace(data, x_train=inputs, schema=None, preparation=fitted)
    found = replace(found, notes=(*data.notes, *notes))
    if standardize and not data.is_classes:
        found = _with_scaled_target(found, Scaling.from_rows(y))
    return found
