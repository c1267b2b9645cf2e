"""The data sets that `--dataset` may name: files, image sets, and two that need no file.

Images are read in data/images.py, npz files in tables.py, tables with named columns in
frame_data.py.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ..config import FRAME, TABLE_FILES, TrainConfig, is_table_file
from ..errors import TrainError, UsageError
from . import images, tables
from .defaults import resolved
from .frame_data import read_table
from .scaling import Scaling
from .types import (
    TEST_SHARE,
    Data,
    hold_out,
    prepared,
    seeded,
    with_test,
    with_validation,
)


def load(config: TrainConfig | None = None, frame=None) -> Data:
    """The data set that the config names, or a DataFrame with the columns that it names, split and
    scaled as it says, on the CPU. `in_features` and `out_features` of it are those of its networks.
    """
    config = TrainConfig() if config is None else config
    if frame is not None:
        config = config.replace(dataset=FRAME)
    several = config.preset == "ensemble" or (config.networks or 1) > 1
    data = read(config.check(), frame, several)
    return prepared(data, resolved(config, data, several).standardize)


def read(config: TrainConfig, frame=None, several: bool = False) -> Data:
    """The same before it is scaled: tables as raw rows in fp64.

    several  whether it may be for several networks, which hold out rows of their own
    """
    data = with_test(_read(config, frame))
    return with_validation(data, resolved(config, data, several).val_split)


def _read(config: TrainConfig, frame) -> Data:
    name = str(config.dataset)
    if name.lower().endswith(".npz"):
        data = tables.read_npz(name, config.loss)
    elif frame is not None or is_table_file(name):
        data = read_table(
            name if frame is None else frame,
            config.target,
            config.loss,
            leave_out=config.leave_out,
            weight_column=config.weight_column,
        )
    elif name in SETS:
        data = SETS[name](config)
    elif name in ("auto", *images.IMAGE_SETS):
        try:
            data = images.load_images("fashion_mnist" if name == "auto" else name, config.data_dir)
        except images.NotFound as absent:
            if name != "auto":
                raise
            data = digits(config, notes=(f"training on scikit-learn's digits instead: {absent}",))
    else:
        known = ", ".join(("auto", *images.IMAGE_SETS, *SETS))
        raise UsageError(
            f"unknown dataset {name!r}; known: {known}, or a file ending in .npz, "
            f"{', '.join(TABLE_FILES)}"
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
    return data


def digits(config, notes: tuple[str, ...] = ()) -> Data:
    """scikit-learn's bundled 1,797 images of 8x8, a fifth of them held out as the test set.

    Its file is read without importing scikit-learn, which takes longer than training on it.
    """
    package = find_spec("sklearn")
    if package is None:
        raise TrainError(
            "the digits need scikit-learn: pip install 'fusedmlp[train]'"
            + "".join(f"\n{n}" for n in notes)
        )
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        pixels, labels = table[:, :-1], table[:, -1]
    else:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).to(torch.uint8), torch.from_numpy(labels).long()
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
        "synthetic",
        x[:10_000],
        labels[:10_000],
        x[10_000:],
        labels[10_000:],
        classes=classes,
        is_table=True,
    )


SETS = {"digits": digits, "synthetic": synthetic}
