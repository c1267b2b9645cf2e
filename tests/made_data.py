"""Small made data sets for the tests of the trainer, and a way to run the command."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedmlp import cli
from fusedmlp.train.data.types import Data, Scaling

ROOT = Path(__file__).resolve().parent.parent
TRAIN_EXTRA = ("tyro", "safetensors", "matplotlib", "numpy")


def need(*packages: str) -> None:
    """Skip the calling test module where a package of the train extra is not installed."""
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package} of the train extra")


def blobs(rows: int = 240, features: int = 12, classes: int = 3, seed: int = 0) -> Data:
    """Gaussian clusters, three quarters of them training rows."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % classes
    centres = 2 * torch.randn(classes, features, generator=generator)
    x = centres[y] + torch.randn(rows, features, generator=generator)
    cut = rows * 3 // 4
    names = tuple(str(i) for i in range(classes))
    return Data("blobs", x[:cut], y[:cut], x[cut:], y[cut:], classes=names)


def pictures(rows: int = 240, side: int = 8, classes: int = 4, seed: int = 0) -> Data:
    """uint8 images: one bright quarter a class, and noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % classes
    x = torch.randint(0, 100, (rows, side, side), generator=generator)
    half = side // 2
    for row, label in enumerate(y.tolist()):
        top, left = (label // 2) * half, (label % 2) * half
        x[row, top : top + half, left : left + half] += 120
    x = x.to(torch.uint8).flatten(1)
    cut = rows * 3 // 4
    names = tuple("abcd"[:classes])
    return Data(
        "pictures",
        x[:cut],
        y[:cut],
        x[cut:],
        y[cut:],
        classes=names,
        image_shape=(side, side),
        scaling=Scaling(255.0),
    )


def line(rows: int = 200, features: int = 3, seed: int = 0) -> Data:
    """A noisy linear target."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    y = x @ torch.tensor([[2.0], [-1.0], [0.5]])[:features] + 0.7
    y = y + 0.05 * torch.randn(rows, 1, generator=generator)
    cut = rows * 3 // 4
    return Data("line", x[:cut], y[:cut], x[cut:], y[cut:], target="y")


def labels(rows: int = 200, features: int = 12, outputs: int = 3, seed: int = 0) -> Data:
    """Float targets of 0 and 1, several a row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator)
    y = (x[:, :outputs] + torch.randn(rows, outputs, generator=generator) > 0).float()
    cut = rows * 3 // 4
    return Data("labels", x[:cut], y[:cut], x[cut:], y[cut:])


def mixed_table(rows: int = 400, seed: int = 0):
    """A DataFrame of every kind of column, of which `kind` and `price` can be predicted."""
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(seed)
    size = random.normal(10, 3, rows)
    colour = random.choice(["red", "green", "blue"], rows)
    new = random.random(rows) < 0.5
    price = 3 * size + 10 * (colour == "red") + 5 * new + random.normal(0, 1, rows)
    found = pd.DataFrame(
        {
            "id": np.arange(rows),
            "size": np.where(random.random(rows) < 0.1, np.nan, size),
            "colour": np.where(random.random(rows) < 0.1, None, colour),
            "new": new,
            "day": pd.Timestamp("2020-01-01") + pd.to_timedelta(random.integers(0, 700, rows), "D"),
            "same": 7,
            "name": [f"item {i}" for i in range(rows)],
            "weight": random.integers(0, 3, rows),
            "price": price.round(2),
        }
    )
    found["kind"] = np.where(price > np.median(price), "dear", "cheap")
    return found


def idx_bytes(values: torch.Tensor, sizes=None, magic: int | None = None) -> bytes:
    """An IDX file of uint8 values; sizes and magic can lie."""
    sizes = list(values.shape) if sizes is None else sizes
    magic = 0x800 + values.dim() if magic is None else magic
    header = b"".join(int(number).to_bytes(4, "big") for number in (magic, *sizes))
    return header + values.to(torch.uint8).contiguous().numpy().tobytes()


def idx_parts(side: int = 28, rows: int = 40, test_rows: int = 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def images(n):
        return torch.randint(0, 256, (n, side, side), generator=generator)

    return {
        "train-images-idx3-ubyte": images(rows),
        "train-labels-idx1-ubyte": torch.arange(rows) % 10,
        "t10k-images-idx3-ubyte": images(test_rows),
        "t10k-labels-idx1-ubyte": torch.arange(test_rows) % 10,
    }


def write_idx(folder: Path, parts: dict | None = None, compress: bool = True) -> Path:
    """The four files of an image set; values that are bytes are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (parts or idx_parts()).items():
        content = values if isinstance(values, bytes) else idx_bytes(values)
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def environment(**changes: str) -> dict[str, str]:
    """For child processes: one thread, no data folder of the developer's, and output that Python
    buffers, as it does for users."""
    ours = ("FUSEDMLP_DATA", "RANK", "WORLD_SIZE", "PYTHONUNBUFFERED")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    path = os.pathsep.join(p for p in (str(ROOT), kept.get("PYTHONPATH", "")) if p)
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | changes


def fusedmlp(*arguments, cwd: Path, **changes: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fusedmlp", *map(str, arguments)],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=120,
    )


def command(*arguments) -> int:
    """The exit code of the command in this process."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # of tyro
        return stop.code


# Before a test puts another folder in its place.
GIVEN_DATA = os.environ.get("FUSEDMLP_DATA")


def fashion_folder() -> Path:
    """Where the real Fashion-MNIST is; skips the test where it is not."""
    places = [Path(GIVEN_DATA)] if GIVEN_DATA else []
    places.append(Path("/usr/share/datasets/fashion-mnist"))
    for place in places:
        for folder in (place / "FashionMNIST" / "raw", place):
            if (folder / "train-images-idx3-ubyte.gz").exists():
                return place
    pytest.skip("Fashion-MNIST is not on this machine; name its folder with FUSEDMLP_DATA")
