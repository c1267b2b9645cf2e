"""The 28x28 image sets: where their four IDX files are looked for, and how they are read and
checked.

Reads only. What is not on disk is fetched by fetch.py, once.
"""

import gzip
import hashlib
import os
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ... import environment
from ..errors import TrainError
from . import fetch
from .types import Data, Scaling

# (what, file, number of dimensions), images before labels.
FILES = (
    ("train images", "train-images-idx3-ubyte", 3),
    ("train labels", "train-labels-idx1-ubyte", 1),
    ("test images", "t10k-images-idx3-ubyte", 3),
    ("test labels", "t10k-labels-idx1-ubyte", 1),
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


class NotFound(TrainError):
    """None of a data set's files is on disk and they could not be fetched."""


@dataclass(frozen=True)
class ImageSet:
    """md5: of the four official .gz files, and of their contents where known, to tell the sets
    apart."""

    title: str
    folder: str  # torchvision's class and folder
    classes: tuple[str, ...]
    md5: tuple[str, ...]
    system_folders: tuple[Path, ...] = ()


IMAGE_SETS = {
    "fashion_mnist": ImageSet(
        "Fashion-MNIST",
        "FashionMNIST",
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
        (DEBIAN_FOLDER,),
    ),
    "mnist": ImageSet(
        "MNIST",
        "MNIST",
        tuple(str(digit) for digit in range(10)),
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "kmnist": ImageSet(
        "KMNIST",
        "KMNIST",
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        (
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
    ),
}


def default_folder() -> Path:
    if named := environment.read("FUSEDMLP_DATA"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fusedmlp"


def load(name: str, data_dir: Path | None) -> Data:
    """The data set from data_dir, the system's folder or, once, the network; NotFound where none
    has it."""
    images = IMAGE_SETS[name]
    root = Path(data_dir) if data_dir is not None else default_folder()
    if root.exists() and not root.is_dir():
        raise TrainError(f"data folder {root} must be a folder, but it is a file")
    found = find(images, root)
    if found is None:
        reason = fetch.fetch(images.folder, root)
        found = find(images, root) if reason is None else None
        if found is None:
            raise NotFound(_how_to_get(images, root, reason or "the download left no files"))
    return read(name, found)


def _how_to_get(images: ImageSet, root: Path, reason: str) -> str:
    packages = (
        "; or install Debian's package dataset-fashion-mnist" if images.system_folders else ""
    )
    return (
        f"{images.title} is not in {root} and could not be fetched ({reason}). To get it, put "
        "its four "
        f"*-ubyte.gz files there or name their folder with --data-dir or FUSEDMLP_DATA{packages}"
    )


def find(images: ImageSet, root: Path) -> list[Path] | None:
    """The four files, .gz or unpacked, or None where a folder has none of them; some but not all
    is an error."""
    places = [
        root / images.folder / "raw",
        root / images.folder,
        root / "raw",
        root,
        *images.system_folders,
    ]
    for place in places:
        paths = [_one(place, file) for _, file, _ in FILES]
        if all(paths):
            return paths
        if any(paths):
            missing = ", ".join(
                file for (_, file, _), path in zip(FILES, paths, strict=True) if path is None
            )
            raise TrainError(
                f"{images.title} in {place} is not complete: {missing} (or .gz) is missing"
            )
    return None


def _one(place: Path, file: str) -> Path | None:
    try:
        # The unpacked file first: it needs no second of unpacking.
        return next((p for p in (place / file, place / f"{file}.gz") if p.is_file()), None)
    except OSError as error:
        raise TrainError(f"cannot look into {place}: {error.strerror}") from error


def read(name: str, paths: list[Path]) -> Data:
    images = IMAGE_SETS[name]
    notes: list[str] = []
    tensors = []
    for (what, _, ndim), path in zip(FILES, paths, strict=True):
        content = _bytes(path)
        note = _identify(images, path, content)
        tensors.append(parse(content, path, what, ndim))
        notes += [note] if note else []
    x_train, y_train, x_test, y_test = tensors
    for x, y, x_path, y_path in ((x_train, y_train, *paths[:2]), (x_test, y_test, *paths[2:])):
        if len(x) != len(y):
            raise TrainError(f"{x_path} holds {len(x)} images, but {y_path} holds {len(y)} labels")
        if len(x) == 0:
            raise TrainError(f"{x_path} holds no images")
        if int(y.max()) >= len(images.classes):
            raise TrainError(
                f"{y_path}: labels must be 0 to {len(images.classes) - 1}, got {int(y.max())} "
                f"for image {int(y.argmax())}; this is not {images.title}"
            )
    if x_train.shape[1:] != x_test.shape[1:]:
        raise TrainError(
            f"{paths[0]} has images of {_times(x_train.shape[1:])}, but {paths[2]} of "
            f"{_times(x_test.shape[1:])}"
        )
    return Data(
        name,
        x_train.flatten(1),
        y_train.long(),
        x_test.flatten(1),
        y_test.long(),
        classes=images.classes,
        image_shape=tuple(x_train.shape[1:]),
        scaling=Scaling(255.0),
        notes=tuple(notes),
    )


def _times(shape) -> str:
    return "x".join(str(size) for size in shape)


def _bytes(path: Path) -> bytearray:
    try:
        if path.suffix != ".gz":
            return bytearray(path.read_bytes())
        with gzip.open(path) as file:
            return bytearray(file.read())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TrainError(
            f"{path} is truncated or corrupted ({error}); delete it and get it again"
        ) from error
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error


def _identify(images: ImageSet, path: Path, content: bytearray) -> str | None:
    """None for an official file; an error for one of another set; a note for an unknown one."""
    digests = {hashlib.md5(content, usedforsecurity=False).hexdigest()}
    if not digests & set(images.md5) and path.suffix == ".gz":
        digests.add(hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest())
    if digests & set(images.md5):
        return None
    for other in IMAGE_SETS.values():
        if digests & set(other.md5):
            raise TrainError(
                f"{path} must belong to {images.title}, but it is a file of {other.title}"
            )
    return f"{path} is not {images.title}'s official file (by its MD5); taken as it is"


def parse(content: bytearray, path: Path, what: str, ndim: int) -> Tensor:
    """(sizes) uint8, a view of the content; IDX: 0, 0, type, number of dimensions, the sizes, the
    values."""
    if len(content) < 4 + 4 * ndim:
        raise TrainError(
            f"{path} is truncated: an IDX header has {4 + 4 * ndim} bytes, got {len(content)}"
        )
    magic = int.from_bytes(content[:4], "big")
    if magic != 0x800 + ndim:
        raise TrainError(
            f"{path} must be an IDX file of {what} (magic number {0x800 + ndim}), got magic "
            f"number {magic}"
        )
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim)]
    values = len(content) - 4 - 4 * ndim
    if prod(sizes) != values:
        raise TrainError(
            f"{path}: its header says {_times(sizes)} = {prod(sizes)} values, but it holds {values}"
        )
    if not values:
        return torch.empty(sizes, dtype=torch.uint8)
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * ndim).view(sizes)
