"""Data sets in npz files, and how the values of a target become class numbers or floats. Nothing of
a file is executed."""

import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TrainError, first_line
from .packed import check_unpacked
from .types import Data, Scaling

MAX_CLASSES = 1000  # a target of more different integers is a number, not a class


def read_npz(file: str, loss: str = "auto") -> Data:
    """x_train, y_train and, if there, x_test, y_test; a float y is regression, integers and
    strings are classes. Rows other than bytes, and float targets, are fp64."""
    import numpy as np

    path = Path(file)
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise TrainError(
                f"{path} must be an .npz archive with x_train and y_train, but it is an .npy file: "
                f"one array of shape {archive.shape}; write both with numpy.savez"
            )
        with archive:
            names = archive.files
            _check_count(path, len(archive.zip.infolist()))
            wanted = [n for n in ("x_train", "y_train", "x_test", "y_test") if n in names]
            for name in wanted:
                member = archive.zip.getinfo(f"{name}.npy")
                check_unpacked(f"{path}: {name}", member.file_size, member.compress_size)
                # Where a turned bit makes the array shorter, NumPy stops before the end of the
                # member, at which its checksum is looked at.
                with archive.zip.open(member) as content:
                    while content.read(1 << 20):
                        pass
            arrays = {name: archive[name] for name in wanted}
    except TrainError:
        raise
    except FileNotFoundError as error:
        raise TrainError(f"{path} does not exist") from error
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # NumPy's reader of a damaged header raises whatever it likes
        if "pickle" in str(error) and zipfile.is_zipfile(path):
            raise TrainError(
                f"{path}: arrays must hold numbers or strings, got Python objects"
            ) from error
        raise TrainError(
            f"{path} is truncated, corrupted or no .npz file ({first_line(error)})"
        ) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise TrainError(f"{path}: {name} must be an array of NumPy's, got other bytes")
        # A number beyond Unicode's last would stop NumPy itself.
        if array.dtype.kind == "U" and _code_points(array).max(initial=0) > sys.maxunicode:
            raise TrainError(f"{path}: {name} must hold text, got numbers that are no characters")
    for name in ("x_train", "y_train"):
        if name not in arrays:
            raise TrainError(
                f"{path} must hold x_train and y_train, got {', '.join(names) or 'nothing'}"
            )
    if ("x_test" in arrays) != ("y_test" in arrays):
        given, absent = ("x_test", "y_test") if "x_test" in arrays else ("y_test", "x_test")
        raise TrainError(f"{path} holds {given} without {absent}")
    x = {
        part: _inputs(arrays[f"x_{part}"], f"{path}: x_{part}")
        for part in ("train", "test")
        if f"x_{part}" in arrays
    }
    for part, rows in x.items():
        shape = arrays[f"y_{part}"].shape
        if shape[:1] != (len(rows),):
            raise TrainError(
                f"{path}: y_{part} must have {len(rows)} rows to match x_{part}, got "
                f"{shape[0] if shape else 'a single value'}"
            )
    if "test" in x and x["test"].shape[1:] != x["train"].shape[1:]:
        raise TrainError(
            f"{path}: rows of x_test must be {tuple(x['train'].shape[1:])} as in x_train, got "
            f"{tuple(x['test'].shape[1:])}"
        )
    shape = tuple(x["train"].shape[1:])
    targets = Targets.from_array(arrays["y_train"], f"{path}: y_train", loss)
    is_bytes = x["train"].dtype == torch.uint8
    notes = ()
    if arrays["y_train"].dtype.kind in "iu" and loss == "auto":
        count = len(np.unique(arrays["y_train"]))
        notes = targets.about_integers(count, len(x["train"]), "y_train")
    return Data(
        path.name,
        x["train"].flatten(1),
        targets.encode(arrays["y_train"], f"{path}: y_train"),
        x["test"].flatten(1) if "test" in x else None,
        targets.encode(arrays["y_test"], f"{path}: y_test") if "test" in x else None,
        classes=targets.classes,
        image_shape=shape if len(shape) == 2 else None,
        scaling=Scaling(255.0 if is_bytes else 1.0),
        notes=notes,
        is_table=len(shape) != 2 and not is_bytes,
    )


def _check_count(path: Path, found: int) -> None:
    """Raise for an archive that says at its end that it has another number of members: a turned
    bit in its index can hide those that follow, and zipfile does not count them."""
    with open(path, "rb") as file:
        file.seek(-min(path.stat().st_size, 1 << 17), os.SEEK_END)  # its comment is no longer
        end = file.read().rpartition(b"PK\5\6")[2]
    count = int.from_bytes(end[6:8], "little")
    if count not in (found, 0xFFFF):  # the latter where the number stands elsewhere
        raise ValueError(f"its index has {found} members of {count}")


def _code_points(array):
    import numpy as np

    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("=")).view(np.uint32)


def _inputs(array, name: str) -> Tensor:
    """(n, ...) uint8, or fp64 that is finite in fp32."""
    import numpy as np

    if array.ndim < 1 or len(array) == 0:
        raise TrainError(f"{name} must have at least one row, got shape {array.shape}")
    if array.ndim == 1:
        array = array[:, None]
    if array.dtype.kind not in "biuf":
        raise TrainError(f"{name} must hold numbers, got {array.dtype}")
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    return _finite(array, name)


def _finite(array, name: str) -> Tensor:
    import numpy as np

    try:
        array = np.ascontiguousarray(array, dtype=np.float64)
    except (TypeError, ValueError):
        raise TrainError(f"{name} must hold numbers, got {array.dtype}") from None
    bad = np.argwhere(~(np.abs(array) <= np.finfo(np.float32).max))
    if len(bad):
        place = ", ".join(str(i) for i in bad[0])
        raise TrainError(
            f"{name} must hold finite fp32 numbers, got {array[tuple(bad[0])]} at [{place}] "
            f"({len(bad)} in all)"
        )
    return torch.from_numpy(array)


@dataclass(frozen=True)
class Targets:
    """How the values of a target become tensors: a class number each, or floats."""

    classes: tuple[str, ...] | None  # None: regression

    @classmethod
    def from_array(cls, array, name: str, loss: str) -> "Targets":
        import numpy as np

        if array.dtype.kind == "f" or loss == "mse":
            if array.dtype.kind not in "biuf":
                raise TrainError(f"{name} must hold numbers for --loss mse, got {array.dtype}")
            return cls(None)
        if array.dtype.kind not in "biuUS":
            raise TrainError(f"{name} must hold numbers or strings, got {array.dtype}")
        if array.ndim != 1:
            raise TrainError(f"{name} must have one class a row, got shape {array.shape}")
        values = np.unique(array)
        if array.dtype.kind in "iu":
            return cls.from_integers(values.tolist(), name, loss)
        return cls.from_names(_names(values), len(values), name)

    @classmethod
    def from_integers(cls, values: list[int], name: str, loss: str) -> "Targets":
        """values: the different ones, rising. Classes numbered from 0 keep their numbers, also with
        gaps."""
        if len(values) > MAX_CLASSES and loss == "auto":
            return cls(None)
        if len(values) > MAX_CLASSES:
            raise TrainError(
                f"{name} holds {len(values)} different integers, more than {MAX_CLASSES} "
                "classes; for a number to predict take --loss mse"
            )
        if 0 <= values[0] and values[-1] < min(MAX_CLASSES, 2 * len(values) + 10):
            return cls.from_names(
                [str(value) for value in range(values[-1] + 1)], len(values), name
            )
        return cls.from_names([str(value) for value in values], len(values), name)

    @classmethod
    def from_names(cls, names: list[str], count: int, name: str) -> "Targets":
        """count: how many of these classes the training rows have."""
        if count < 2:
            raise TrainError(f"{name} must hold at least two classes, got only {names[-1]}")
        return cls(tuple(names))

    def about_integers(self, count: int, rows: int, name: str) -> tuple[str, ...]:
        """A note where `count` different integers in so many rows may be meant in two ways."""
        if self.classes is None:
            return (f"{name} has {count} different integers and is predicted as a number",)
        if rows < 20 * count:
            return (
                f"{name} has {count} different integers in {rows} rows, which are taken for "
                "classes; --loss mse predicts a number",
            )
        return ()

    def encode(self, array, name: str) -> Tensor:
        """(n,) int64 for classes, (n, k) fp64 for regression."""
        import numpy as np

        if self.classes is None:
            return _finite(array, name).reshape(len(array), -1)
        values, places = np.unique(array, return_inverse=True)
        index = {each: place for place, each in enumerate(self.classes)}
        numbers = np.array([index.get(each, -1) for each in _names(values)], dtype=np.int64)
        found = numbers[places.reshape(len(array))]
        wrong = np.flatnonzero(found < 0)
        if len(wrong):
            raise TrainError(
                f"{name} must hold classes of the training rows, got "
                f"{_names(array[wrong[:1]])[0]} in row {wrong[0]}"
            )
        return torch.from_numpy(found)


def _names(values) -> list[str]:
    if values.dtype.kind == "S":
        return [value.decode(errors="backslashreplace") for value in values.tolist()]
    return [str(value) for value in values.tolist()]
