"""Data: a data set as tensors, how its rows become inputs, and how rows are held out.

Rows stay as they came (uint8 images stay uint8); `Scaling` makes float inputs of a gathered batch.
Reading files is in idx.py (images) and tables.py (npz, csv), the download in fetch.py.
"""

import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import TrainError, UsageError

SPLIT_SEED = 20  # of held-out rows: the same for every run seed, so that runs can be compared
TEST_SHARE = 0.2  # of a file that brings no test rows


@dataclass(frozen=True)
class Scaling:
    """rows (B, ...) as stored -> inputs (B, ...) of dtype: (rows / divisor - mean) / std."""

    divisor: float = 1.0
    mean: Tensor | None = None  # () or the shape of one row
    std: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def __call__(self, rows: Tensor) -> Tensor:
        if self.divisor == 1.0 and self.mean is None:
            # Integers that need no scaling are indices, for a model that begins with an embedding.
            return rows.to(self.dtype) if rows.is_floating_point() else rows
        inputs = rows.to(self.dtype, copy=True)
        if self.divisor != 1.0:
            inputs.div_(self.divisor)
        return inputs if self.mean is None else inputs.sub_(self.mean).div_(self.std)

    def to(self, device) -> "Scaling":
        return (
            self
            if self.mean is None
            else replace(self, mean=self.mean.to(device), std=self.std.to(device))
        )

    def to_dict(self) -> dict:
        listed = {"divisor": self.divisor}
        if self.mean is not None:
            listed |= {"mean": self.mean.tolist(), "std": self.std.tolist()}
        return listed

    @classmethod
    def from_dict(cls, listed: dict) -> "Scaling":
        if "mean" not in listed:
            return cls(listed["divisor"])
        return cls(listed["divisor"], torch.tensor(listed["mean"]), torch.tensor(listed["std"]))


@dataclass(frozen=True)
class Data:
    """A data set. Targets: int64 (n,) for classes; float32 (n, k) for regression."""

    name: str
    x_train: Tensor  # (n, ...)
    y_train: Tensor
    x_test: Tensor | None = None
    y_test: Tensor | None = None
    x_val: Tensor | None = None
    y_val: Tensor | None = None
    classes: tuple[str, ...] | None = None  # None: regression
    image_shape: tuple[int, int] | None = None
    scaling: Scaling = field(default_factory=Scaling)
    target_scaling: Scaling | None = None  # of a standardised float target
    features: tuple[str, ...] | None = None  # column names of a csv
    target: str | None = None
    notes: tuple[str, ...] = ()  # one line each, for whoever started the run

    @property
    def in_features(self) -> int:
        return self.x_train[0].numel()

    @property
    def out_features(self) -> int:
        return len(self.classes) if self.classes is not None else self.y_train[0].numel()

    @property
    def is_classes(self) -> bool:
        return self.classes is not None

    def to(self, device) -> "Data":
        moved = {
            name: tensor.to(device)
            for name in ("x_train", "y_train", "x_test", "y_test", "x_val", "y_val")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, scaling=self.scaling.to(device), **moved)

    def describe(self) -> dict:
        """What evaluate and predict need of it later, in plain values."""
        return {
            "name": self.name,
            "classes": list(self.classes) if self.classes is not None else None,
            "image_shape": list(self.image_shape) if self.image_shape else None,
            "scaling": self.scaling.to_dict(),
            "target_scaling": self.target_scaling.to_dict() if self.target_scaling else None,
            "features": list(self.features) if self.features else None,
            "target": self.target,
            "rows": len(self.x_train),
            "digest": self.digest(),
        }

    def digest(self) -> str:
        """Fingerprint of the training rows, so that a run is not resumed on other data.

        64 rows spread over the set, all targets and the sizes: 2 ms instead of 100 for
        Fashion-MNIST.
        """
        picked = self.x_train[
            torch.linspace(0, len(self.x_train) - 1, 64, device=self.x_train.device).long()
        ]
        whole = hashlib.blake2b(
            repr((tuple(self.x_train.shape), self.x_train.dtype)).encode(), digest_size=8
        )
        whole.update(picked.cpu().contiguous().numpy().tobytes())
        whole.update(self.y_train.cpu().contiguous().numpy().tobytes())
        return whole.hexdigest()


def seeded(purpose: str, seed: int, index: int = 0) -> torch.Generator:
    """A CPU generator for one purpose of one run; the global one has no part in it."""
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
    generator = seeded("split", seed)
    order = torch.randperm(rows, generator=generator)
    if labels is not None:
        by_class = order[torch.argsort(labels.cpu()[order], stable=True)]
        # Every class is spread evenly over the list, so any cut of it holds the same share of each.
        counts = torch.bincount(labels.cpu())
        counts = counts[counts > 0]
        place = torch.cat([(torch.arange(int(n)) + 0.5) / n for n in counts])
        order = by_class[torch.argsort(place, stable=True)]
    held = round(rows * share)
    if share > 0 and not 0 < held < rows:
        raise TrainError(
            f"a share of {share} of {rows} rows leaves no rows on one side; take another share "
            "or more data"
        )
    return order[held:].sort().values, order[:held].sort().values


def with_validation(data: Data, share: float) -> Data:
    """Hold out a share of the training rows, stratified for classes."""
    if share == 0.0:
        return data
    kept, held = hold_out(len(data.x_train), share, data.y_train if data.is_classes else None)
    return replace(
        data,
        x_train=data.x_train[kept],
        y_train=data.y_train[kept],
        x_val=data.x_train[held],
        y_val=data.y_train[held],
    )


def with_test(data: Data) -> Data:
    """Hold out a fifth of the rows as a test set where the file brings none, and say so."""
    if data.x_test is not None:
        return data
    kept, held = hold_out(len(data.x_train), TEST_SHARE, data.y_train if data.is_classes else None)
    return replace(
        data,
        x_train=data.x_train[kept],
        y_train=data.y_train[kept],
        x_test=data.x_train[held],
        y_test=data.y_train[held],
        notes=(
            *data.notes,
            f"{data.name} brings no test rows: {len(held)} of its {len(data.x_train)} are held out",
        ),
    )


def standardized(data: Data) -> Data:
    """Inputs, and a float target, of mean 0 and deviation 1 over the training rows.

    Images have one pair of numbers, tables one for each feature.
    """
    rows = data.x_train
    if data.image_shape is not None:
        counts = (
            torch.bincount(rows.flatten(), minlength=256).double()
            if rows.dtype == torch.uint8
            else None
        )
        if counts is not None:
            values = torch.arange(len(counts), dtype=torch.float64) / data.scaling.divisor
            mean = (counts * values).sum() / counts.sum()
            std = ((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt()
        else:
            scaled = rows.double() / data.scaling.divisor
            mean, std = scaled.mean(), scaled.std(correction=0)
    else:
        scaled = rows.double() / data.scaling.divisor
        mean, std = scaled.mean(0), scaled.std(0, correction=0)
    data = replace(data, scaling=_scaling(data.scaling.divisor, mean, std))
    if data.is_classes:
        return data
    target = data.y_train.double()
    scaling = _scaling(1.0, target.mean(0), target.std(0, correction=0))
    return replace(
        data,
        target_scaling=scaling,
        y_train=scaling(data.y_train),
        y_test=None if data.y_test is None else scaling(data.y_test),
        y_val=None if data.y_val is None else scaling(data.y_val),
        notes=(
            *data.notes,
            f"losses are in units of the variance of {data.target or 'the target'}",
        ),
    )


def _scaling(divisor: float, mean: Tensor, std: Tensor) -> Scaling:
    return Scaling(
        divisor, mean.float(), torch.where(std > 0, std, 1.0).float()
    )  # a constant feature stays finite


def load(config) -> Data:
    """The data set that the config names, split and scaled as it says, on the CPU."""
    from . import idx, tables

    name = str(config.dataset)
    if name.endswith(".npz"):
        data = tables.read_npz(name, config.loss)
    elif name.endswith(".csv"):
        data = tables.read_csv(name, config.target, config.loss)
    elif name in SETS:
        data = SETS[name](config)
    elif name in ("auto", *idx.IMAGE_SETS):
        try:
            data = idx.load("fashion_mnist" if name == "auto" else name, config.data_dir)
        except idx.NotFound as absent:
            if name != "auto":
                raise
            data = digits(config, notes=(f"training on scikit-learn's digits instead: {absent}",))
    else:
        known = ", ".join(("auto", *idx.IMAGE_SETS, *SETS))
        raise UsageError(
            f"unknown dataset {name!r}; known: {known}, or a file ending in .npz or .csv"
        )
    if config.loss == "mse" and data.is_classes:
        raise UsageError(
            f"--loss mse needs a float target, but {data.name} has classes; take --loss "
            "cross_entropy"
        )
    if config.loss == "cross_entropy" and not data.is_classes:
        raise UsageError(
            f"--loss cross_entropy needs classes, but the target of {data.name} is a float; "
            "take --loss mse"
        )
    data = with_validation(with_test(data), config.val_split)
    return standardized(data) if config.standardize else data


def digits(config, notes: tuple[str, ...] = ()) -> Data:
    """scikit-learn's bundled 1,797 images of 8x8, a fifth of them held out as the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TrainError(
            f"the digits need scikit-learn ({error}): pip install 'fusedmlp[train]'"
            + "".join(f"\n{n}" for n in notes)
        ) from error
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).to(torch.uint8), torch.from_numpy(labels).long()
    kept, held = hold_out(len(x), TEST_SHARE, y)
    return Data(
        "digits",
        x[kept],
        y[kept],
        x[held],
        y[held],
        classes=tuple(str(i) for i in range(10)),
        image_shape=(8, 8),
        scaling=Scaling(16.0),  # its pixels run from 0 to 16
        notes=notes,
    )


def synthetic(config) -> Data:
    """10 classes in 20 dimensions, 3 clusters each; needs no file, network or other package."""
    generator = seeded("synthetic", 0)
    centres = 1.5 * torch.randn(10, 3, 20, generator=generator)
    labels = torch.arange(12_000) % 10
    cluster = torch.randint(3, (12_000,), generator=generator)
    x = centres[labels, cluster] + torch.randn(12_000, 20, generator=generator)
    classes = tuple(f"class {i}" for i in range(10))
    return Data(
        "synthetic", x[:10_000], labels[:10_000], x[10_000:], labels[10_000:], classes=classes
    )


SETS = {"digits": digits, "synthetic": synthetic}
DEFAULTS = {"digits": (32, 30)}  # (batch size, epochs) where they are left unset


def resolved(config, data: Data):
    """The config with batch size and epochs filled in from the data set."""
    batch, epochs = DEFAULTS.get(data.name, (256, 10))
    return config.replace(batch_size=config.batch_size or batch, epochs=config.epochs or epochs)
