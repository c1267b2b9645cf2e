"""The 28x28 image sets: where their four IDX files are looked for, how they are read and checked,
and the one download.

Files on disk are read here, from any of several layouts, packed or not and read-only or not, in
half the time that importing torchvision takes. torchvision downloads what is not there and checks
its MD5, in a process that can be ended: a network that swallows packets can stop a thread for good.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ... import environment
from ..errors import TrainError
from .packed import check_unpacked, most_bytes
from .types import Data, Scaling

# (what, file, number of dimensions), images before labels.
FILES = (
    ("train images", "train-images-idx3-ubyte", 3),
    ("train labels", "train-labels-idx1-ubyte", 1),
    ("test images", "t10k-images-idx3-ubyte", 3),
    ("test labels", "t10k-labels-idx1-ubyte", 1),
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
CONNECT_SECONDS = 5.0
DOWNLOAD_SECONDS = 120.0
START_SECONDS = 20.0  # added for the start of Python on a busy machine

# The probe uses the standard library only, so that a missing network is noticed within the time to
# connect and not after the seconds that importing torchvision takes.
_PROBE = """
import sys, urllib.request
file = sys.argv[1] + "t10k-labels-idx1-ubyte.gz"
urllib.request.urlopen(file, timeout=float(sys.argv[2])).read(1)
"""
_DOWNLOAD = """
import socket, sys
from torchvision import datasets
mirror, seconds, name, folder = sys.argv[1:]
socket.setdefaulttimeout(float(seconds))
kind = getattr(datasets, name)
kind.mirrors = kind.mirrors if mirror in kind.mirrors else [mirror]
kind(folder, download=True)
"""


class NotFound(TrainError):
    """None of a data set's files is on disk and they could not be downloaded."""


@dataclass(frozen=True)
class ImageSet:
    """folder: torchvision's class and folder; mirror: the first of torchvision's own; md5: of the
    four official .gz files, and of their contents where known, to tell the sets apart."""

    title: str
    folder: str
    mirror: str
    classes: tuple[str, ...]
    md5: tuple[str, ...]
    system_folders: tuple[Path, ...] = ()


IMAGE_SETS = {
    "fashion_mnist": ImageSet(
        "Fashion-MNIST",
        "FashionMNIST",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        (
            *("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe"),
            *("bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
            *("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"),
            *("8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"),
        ),
        (DEBIAN_FOLDER,),
    ),
    "mnist": ImageSet(
        "MNIST",
        "MNIST",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        tuple("0123456789"),
        (
            *("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432"),
            *("9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
    ),
    "kmnist": ImageSet(
        "KMNIST",
        "KMNIST",
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        (
            *("bdb82020997e1d708af4cf47b453dcf7", "e144d726b3acfaa3e44228e80efcd344"),
            *("5c965bf0a639b31b8f53240b1b52f4d7", "7320c461ea6c1c855c0b718fb2a4b134"),
        ),
    ),
}


def default_folder() -> Path:
    if named := environment.read("FUSEDMLP_DATA"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fusedmlp"


def load_images(name: str, data_dir: Path | None) -> Data:
    """The data set from data_dir, the system's folder or, once, the network; NotFound where none
    has it."""
    images = IMAGE_SETS[name]
    root = Path(data_dir) if data_dir is not None else default_folder()
    if root.exists() and not root.is_dir():
        raise TrainError(f"data folder {root} must be a folder, but it is a file")
    paths = find_files(images, root)
    if paths is None:
        reason = download(images.folder, root, images.mirror)
        paths = find_files(images, root) if reason is None else None
        if paths is None:
            reason = reason or "the download left no files"
            package = "; or install Debian's package dataset-fashion-mnist"
            raise NotFound(
                f"{images.title} is not in {root} and could not be fetched ({reason}). To get it, "
                "put its four *-ubyte.gz files there or name their folder with --data-dir or "
                f"FUSEDMLP_DATA{package if images.system_folders else ''}"
            )
    return _read(name, paths)


def find_files(images: ImageSet, root: Path) -> list[Path] | None:
    """The four files, .gz or unpacked, or None where a folder has none of them; some but not all
    is an error."""
    folders = (root / images.folder / "raw", root / images.folder, root / "raw", root)
    for folder in (*folders, *images.system_folders):
        paths = [_find_file(folder, file) for _, file, _ in FILES]
        if all(paths):
            return paths
        if any(paths):
            missing = [file for (_, file, _), p in zip(FILES, paths, strict=True) if p is None]
            raise TrainError(
                f"{images.title} in {folder} is not complete: {', '.join(missing)} (or .gz) is "
                "missing"
            )
    return None


def _find_file(folder: Path, file: str) -> Path | None:
    try:
        # The unpacked file first: it needs no second of unpacking.
        return next((p for p in (folder / file, folder / f"{file}.gz") if p.is_file()), None)
    except OSError as error:
        raise TrainError(f"cannot look into {folder}: {error.strerror}") from error


def _read(name: str, paths: list[Path]) -> Data:
    images = IMAGE_SETS[name]
    notes: list[str] = []
    tensors = []
    for (what, _, ndim), path in zip(FILES, paths, strict=True):
        content = _read_bytes(path)
        if not _is_official(images, path, content):
            notes.append(
                f"{path} is not {images.title}'s official file (by its MD5); taken as it is"
            )
        tensors.append(parse(content, path, what, ndim))
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


def _read_bytes(path: Path) -> bytearray:
    try:
        if path.suffix != ".gz":
            return bytearray(path.read_bytes())
        packed = path.stat().st_size
        with gzip.open(path) as file:
            content = bytearray(file.read(most_bytes(packed) + 1))
        check_unpacked(str(path), len(content), packed)
        return content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TrainError(
            f"{path} is truncated or corrupted ({error}); delete it and get it again"
        ) from error
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error


def _is_official(images: ImageSet, path: Path, content: bytearray) -> bool:
    """Whether the MD5 is known; an error for a file of another set."""
    digests = {hashlib.md5(content, usedforsecurity=False).hexdigest()}
    if not digests & set(images.md5) and path.suffix == ".gz":
        digests.add(hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest())
    if digests & set(images.md5):
        return True
    for other in IMAGE_SETS.values():
        if digests & set(other.md5):
            raise TrainError(
                f"{path} must belong to {images.title}, but it is a file of {other.title}"
            )
    return False


def parse(content: bytearray, path: Path, what: str, ndim: int) -> Tensor:
    """(sizes) uint8, a view of the content; IDX: 0, 0, type, number of dimensions, the sizes, the
    values."""
    start = 4 + 4 * ndim
    if len(content) < start:
        raise TrainError(
            f"{path} is truncated: an IDX header has {start} bytes, got {len(content)}"
        )
    magic, *sizes = (int.from_bytes(content[i : i + 4], "big") for i in range(0, start, 4))
    if magic != 0x800 + ndim:
        raise TrainError(
            f"{path} must be an IDX file of {what} (magic number {0x800 + ndim}), got magic "
            f"number {magic}"
        )
    values = len(content) - start
    if prod(sizes) != values:
        raise TrainError(
            f"{path}: its header says {_times(sizes)} = {prod(sizes)} values, but it holds {values}"
        )
    if not values:
        return torch.empty(sizes, dtype=torch.uint8)
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(sizes)


def download(
    name: str,
    root: Path,
    mirror: str,
    *,
    connect_seconds: float = CONNECT_SECONDS,
    download_seconds: float = DOWNLOAD_SECONDS,
) -> str | None:
    """Download torchvision's class `name` to root/<name>/raw; None, or the reason why not.

    Works in a new folder beside the target, so nothing incomplete is left; root is made if needed.
    """
    missing = [path for path in (root, *root.parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".fetching-", dir=root))
    except OSError as error:
        return f"cannot write to {root}: {error.strerror}"
    arguments = (mirror, str(connect_seconds))
    try:
        return (
            _run(_PROBE, arguments, START_SECONDS + connect_seconds, f"no answer from {mirror}")
            or _run(_DOWNLOAD, (*arguments, name, str(work)), download_seconds, "not done")
            or _put_in_place(work / name / "raw", root / name / "raw")
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
        try:
            for path in missing:  # only folders that are still empty
                path.rmdir()
        except OSError:
            pass


def _run(code: str, arguments: tuple[str, ...], seconds: float, failed: str) -> str | None:
    """Run the code in a process; None, or why it failed: the last line of its error output."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=seconds,
            start_new_session=True,  # Ctrl-C is for the caller, who ends the child
        )
    except subprocess.TimeoutExpired:
        return f"{failed} within {seconds:g} s"
    if child.returncode == 0:
        return None
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"{failed}: exit code {child.returncode}"


def _put_in_place(made: Path, target: Path) -> str | None:
    try:
        target.parent.mkdir(exist_ok=True)
        os.rename(made, target)
    except OSError as error:
        # Another process was faster: its files serve as well.
        if not target.is_dir():
            return f"cannot write to {target.parent}: {error.strerror}"
    return None
