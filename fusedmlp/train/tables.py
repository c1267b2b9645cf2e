"""Data sets in one file: npz with named arrays, csv with a header line. Reads and checks; nothing
is executed."""

import csv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .data import Data, Scaling
from .errors import TrainError, UsageError

MOST_CLASSES = 1000  # more distinct integers than this are taken for a number, not a class
_CSV_CHUNK = 20_000  # rows held as strings at a time


def read_npz(file: str, loss: str = "auto") -> Data:
    """x_train, y_train and, if there, x_test, y_test; a float y is regression, integers and
    strings are classes."""
    import numpy as np

    path = Path(file)
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise TrainError(
                    f"{path} must be an .npz archive with x_train and y_train, got a single array"
                )
            arrays = {
                name: archive[name]
                for name in ("x_train", "y_train", "x_test", "y_test")
                if name in archive.files
            }
            names = archive.files
    except FileNotFoundError as error:
        raise TrainError(f"{path} does not exist") from error
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        if "pickle" in str(error):
            raise TrainError(
                f"{path}: arrays must hold numbers or strings, got Python objects"
            ) from error
        raise TrainError(f"{path} is truncated, corrupted or no .npz file ({error})") from error
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error
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
        if len(rows) != len(arrays[f"y_{part}"]):
            raise TrainError(
                f"{path}: y_{part} must have {len(rows)} rows to match x_{part}, got "
                f"{len(arrays[f'y_{part}'])}"
            )
    if "test" in x and x["test"].shape[1:] != x["train"].shape[1:]:
        raise TrainError(
            f"{path}: rows of x_test must be {tuple(x['train'].shape[1:])} as in x_train, got "
            f"{tuple(x['test'].shape[1:])}"
        )
    shape = tuple(x["train"].shape[1:])
    targets = Targets.of(arrays["y_train"], f"{path}: y_train", loss)
    is_bytes = x["train"].dtype == torch.uint8
    return Data(
        path.name,
        x["train"].flatten(1),
        targets.encode(arrays["y_train"], f"{path}: y_train"),
        x["test"].flatten(1) if "test" in x else None,
        targets.encode(arrays["y_test"], f"{path}: y_test") if "test" in x else None,
        classes=targets.classes,
        image_shape=shape if len(shape) == 2 else None,
        scaling=Scaling(255.0 if is_bytes else 1.0),
    )


def _inputs(array, name: str) -> Tensor:
    """(n, ...) uint8 or finite fp32."""
    import numpy as np

    if array.ndim < 1 or len(array) == 0:
        raise TrainError(f"{name} must have at least one row, got shape {array.shape}")
    if array.ndim == 1:
        array = array[:, None]
    if array.dtype.kind not in "biuf":
        raise TrainError(f"{name} must hold numbers, got {array.dtype}")
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    with np.errstate(over="ignore"):  # what fp32 cannot hold is found below
        array = np.ascontiguousarray(array, dtype=np.float32)
    _need_finite(array, name)
    return torch.from_numpy(array)


def _need_finite(array, name: str) -> None:
    import numpy as np

    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = ", ".join(str(i) for i in bad[0])
        raise TrainError(
            f"{name} must hold finite fp32 numbers, got {array[tuple(bad[0])]} at [{place}] "
            f"({len(bad)} in all)"
        )


@dataclass(frozen=True)
class Targets:
    """How the values of a target become tensors: a class number each, or floats."""

    classes: tuple[str, ...] | None
    values: tuple | None = None  # the value of each class, rising

    @classmethod
    def of(cls, array, name: str, loss: str) -> "Targets":
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
        if len(values) < 2:
            raise TrainError(f"{name} must hold at least two classes, got only {values[0]}")
        if array.dtype.kind in "iu" and len(values) > MOST_CLASSES:
            raise TrainError(
                f"{name} holds {len(values)} different integers; for a number to predict take "
                "--loss mse"
            )
        if (
            array.dtype.kind in "iu"
            and 0 <= values[0]
            and values[-1] < min(MOST_CLASSES, 2 * len(values) + 10)
        ):
            values = np.arange(
                values[-1] + 1, dtype=array.dtype
            )  # numbered from 0: keep the numbers, gaps too
        return cls(tuple(str(value) for value in values), tuple(values.tolist()))

    def encode(self, array, name: str) -> Tensor:
        """(n,) int64 for classes, (n, k) fp32 for regression."""
        import numpy as np

        if self.values is None:
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(array, dtype=np.float32).reshape(len(array), -1)
            _need_finite(array, name)
            return torch.from_numpy(array)
        values = np.array(self.values)
        places = np.searchsorted(values, array).clip(max=len(values) - 1)
        wrong = np.flatnonzero(values[places] != array)
        if len(wrong):
            raise TrainError(
                f"{name} must hold classes of the training rows, got {array[wrong[0]]!s} in row "
                f"{wrong[0]}"
            )
        return torch.from_numpy(places.astype(np.int64))


def read_csv(file: str, target: str | None, loss: str = "auto") -> Data:
    """A header line, then numbers; the target column (the last one unless named) may hold numbers
    or names."""
    import numpy as np

    path = Path(file)
    header, columns = read_columns(path)
    target = target if target is not None else header[-1]
    if target not in header:
        raise UsageError(
            f"--target must be a column of {path}: {', '.join(header)}; got {target!r}"
        )
    features = tuple(name for name in header if name != target)
    if not features:
        raise TrainError(f"{path} must have a column besides the target {target!r}")
    x = np.stack([_numbers(columns[name], path, name) for name in features], axis=1)
    array = _target_column(columns[target], path, target)
    targets = Targets.of(array, f"{path}: column {target!r}", loss)
    return Data(
        path.name,
        torch.from_numpy(x),
        targets.encode(array, f"{path}: column {target!r}"),
        classes=targets.classes,
        features=features,
        target=target,
    )


def read_columns(path: Path) -> tuple[list[str], dict]:
    """(header, {name: array of strings}); every row as long as the header."""
    import numpy as np

    chunks, rows = [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, path)
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise TrainError(
                        f"{path}, line {reader.line_num}: a row must have {len(header)} values "
                        f"as the header, got {len(row)}"
                    )
                rows.append(row)
                if len(rows) == _CSV_CHUNK:
                    chunks.append(np.char.strip(np.array(rows)))
                    rows = []
    except FileNotFoundError as error:
        raise TrainError(f"{path} does not exist") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise TrainError(f"{path} is no csv text file ({error})") from error
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error
    if rows:
        chunks.append(np.char.strip(np.array(rows)))
    if not chunks:
        raise TrainError(f"{path} must have rows below its header line")
    table = np.concatenate(chunks)
    return header, {name: table[:, i] for i, name in enumerate(header)}


def _check_header(header: list[str], path: Path) -> None:
    if not header:
        raise TrainError(f"{path} must start with a header line, but it is empty")
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise TrainError(f"{path}: the header must name each column once, got {twice!r} twice")
    numbers = [name for name in header if _is_number(name)]
    if len(numbers) == len(header):
        raise TrainError(
            f"{path} must start with a line of column names, got only numbers: "
            f"{', '.join(header[:4])}"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(column, path: Path, name: str):
    """(n,) fp32, finite, or an error that names the first bad cell (row 1 is the one below the
    header)."""
    import numpy as np

    try:
        values = column.astype(np.float64)
    except ValueError as error:
        row = next(i for i, text in enumerate(column) if not _is_number(text))
        text = column[row] or "an empty cell"
        raise TrainError(
            f"{path}: column {name!r} must hold numbers, got {text!s} in row {row + 1}"
        ) from error
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise TrainError(
            f"{path}: column {name!r} must hold finite fp32 numbers, got {column[bad[0]]} in "
            f"row {bad[0] + 1} "
            f"({len(bad)} in all); fill or drop such rows"
        )
    return values


def _target_column(column, path: Path, name: str):
    """Integers, floats or strings, whichever is the first that fits all cells."""
    import numpy as np

    empty = np.flatnonzero(column == "")
    if len(empty):
        raise TrainError(
            f"{path}: column {name!r} must have a value in every row, got an empty cell in row "
            f"{empty[0] + 1}"
        )
    try:
        return column.astype(np.int64)
    except ValueError:
        pass
    return _numbers(column, path, name) if _is_number(column[0]) else column
