"""csv files: a header line, then a row a line. The separator and the encoding are found in the
file, and the type of the target follows from all of its rows.

pandas reads the rows; nothing is executed.
"""

import codecs
import csv
import re
import warnings
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

from ..errors import TrainError, UsageError
from .tables import MAX_CLASSES, Targets
from .types import Data

SEPARATORS = ",;\t"
_SAMPLE_ROWS = 20  # rows from which the separator is found
_INTEGER = re.compile(r"[+-]?\d+")
_WAY_OUT = "; make numbers of its cells, or leave the column out"


def read_csv(file: str, target: str | None, loss: str = "auto") -> Data:
    """Numbers below a header line; the target column (the last one unless named) may hold numbers
    or names. Rows and float targets are fp64."""
    import numpy as np

    table = _Table(Path(file))
    header, path = table.header, table.path
    target = target if target is not None else header[-1]
    if target not in header:
        raise UsageError(
            f"--target must be a column of {path}: {', '.join(header)}; got {target!r}"
        )
    features = [i for i, name in enumerate(header) if name != target]
    if not features:
        raise TrainError(
            f"{path} must have a column besides the target {target!r}; columns are separated by "
            "commas, semicolons or tabs"
        )
    columns = table.columns()
    y, classes, notes = _target(table, columns[header.index(target)], target, loss)
    x = np.empty((len(columns), len(features)))
    for place, number in enumerate(features):
        x[:, place] = _numbers(table, columns[number], header[number], _WAY_OUT)
    return Data(
        path.name,
        torch.from_numpy(x),
        y,
        classes=classes,
        features=tuple(header[i] for i in features),
        target=target,
        notes=notes,
        is_table=True,
    )


class _Table:
    """A file whose header has been read: its encoding and separator, and its columns on request."""

    def __init__(self, path: Path):
        self.path = path
        with _file_errors(path):
            with open(path, "rb") as file:
                start = file.read(2)
                utf16 = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                self.encoding = "utf-16" if utf16 else "utf-8-sig"
                if not utf16 and b"\0" in start + file.read(4096):
                    raise TrainError(f"{path} is no csv text file (it holds zero bytes)")
            self.separator = max(SEPARATORS, key=self._fit)
            records = self._records(self.separator)
            line, header = next(((n, r) for n, r in records if r), (0, []))
        self.skipped = line  # lines up to the end of the header
        self.header = [name.strip() for name in header]
        _check_header(self.header, path)

    def _records(self, separator: str):
        """(number of the last line, cells) of each record; an empty line has none."""
        with open(self.path, newline="", encoding=self.encoding) as file:
            reader = csv.reader(file, delimiter=separator, skipinitialspace=True)
            for record in reader:
                yield reader.line_num, record

    def _fit(self, separator: str) -> tuple[float, int]:
        """How well it separates: the share of the first rows that are as long as the header, then
        the length; commas where none does."""
        try:
            rows = [r for _, r in islice(self._records(separator), _SAMPLE_ROWS) if r]
        except csv.Error:
            return 0.0, 0
        width = len(rows[0]) if rows else 0
        return (sum(len(r) == width for r in rows) / len(rows), width) if width > 1 else (0.0, 0)

    def columns(self, **settings):
        """A DataFrame with a column for each name of the header, under its number."""
        try:
            import pandas as pd
        except ImportError as error:
            raise TrainError(
                f"reading {self.path} needs pandas ({error}): pip install 'fusedmlp[train]'"
            ) from error
        with _file_errors(self.path), warnings.catch_warnings():
            # pandas warns of rows that are too long.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            try:
                found = pd.read_csv(
                    self.path,
                    sep=self.separator,
                    header=None,
                    names=range(len(self.header)),
                    index_col=False,
                    skiprows=self.skipped,
                    keep_default_na=False,
                    skipinitialspace=True,
                    low_memory=False,  # else a column gets a type for each piece of the file
                    encoding=self.encoding,
                    **settings,
                )
            except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
                self.check_lengths()
                raise TrainError(f"{self.path} is no csv text file ({error})") from error
            except pd.errors.EmptyDataError:
                found = ()
        if len(found) == 0:
            raise TrainError(f"{self.path} must have rows below its header line")
        return found

    def check_lengths(self) -> None:
        """Raise for the first row that is not as long as the header; where one is too short,
        pandas adds empty cells."""
        for line, row in self._records(self.separator):
            if row and len(row) != len(self.header):
                raise TrainError(
                    f"{self.path}, line {line}: a row must have {len(self.header)} values as the "
                    f"header, got {len(row)}"
                )

    def fail(self, message: str):
        """Raise the error of a cell, or that of its row where that has a wrong length."""
        self.check_lengths()
        raise TrainError(f"{self.path}: {message}")


@contextmanager
def _file_errors(path: Path):
    """Raise errors of opening, decoding and splitting a file as TrainError."""
    try:
        yield
    except FileNotFoundError as error:
        raise TrainError(f"{path} does not exist") from error
    except UnicodeError as error:
        raise TrainError(
            f"{path} must be text in UTF-8{_first_undecodable(path)}; save it as UTF-8"
        ) from error
    except csv.Error as error:
        raise TrainError(f"{path} is no csv text file ({error})") from error
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error


def _first_undecodable(path: Path) -> str:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f", got the byte {line[error.start]:#04x} in line {number}"
    return ""


def _check_header(header: list[str], path: Path) -> None:
    if not header:
        raise TrainError(f"{path} must start with a header line, but it is empty")
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise TrainError(f"{path}: the header must name each column once, got {twice!r} twice")
    if all(_is_number(name) for name in header):
        raise TrainError(
            f"{path} must start with a line of column names, got only numbers: "
            f"{', '.join(header[:4])}"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # Python's own way to group digits


def _parsed(column):
    """(n,) fp64 of a column as pandas made it; NaN where a cell is no number."""
    import numpy as np
    import pandas as pd

    if column.dtype.kind not in "biuf":
        column = pd.to_numeric(column.astype(str).str.strip(), errors="coerce")
    return np.array(column, dtype=np.float64)


def _numbers(table: _Table, column, name: str, way_out: str = ""):
    """(n,) fp64, or an error that names the first bad cell (row 1 is the one below the header)."""
    import numpy as np

    values = _parsed(column)
    bad = np.flatnonzero(~(np.abs(values) <= np.finfo(np.float32).max))
    if not len(bad):
        return values
    text = str(column.iloc[bad[0]]).strip()
    if _is_number(text):
        table.fail(
            f"column {name!r} must hold finite fp32 numbers, got {_shown(text)} in row "
            f"{bad[0] + 1} ({len(bad)} in all); fill or drop such rows"
        )
    if re.fullmatch(r"[+-]?\d+,\d+", text):
        way_out = "; write numbers with a decimal point"
    table.fail(
        f"column {name!r} must hold numbers, got {_shown(text)} in row {bad[0] + 1}{way_out}"
    )


def _shown(text: str) -> str:
    if not text:
        return "an empty cell"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _target(table: _Table, column, name: str, loss: str):
    """(tensor, classes or None, notes): integers and words are classes, floats are regression."""
    import numpy as np
    import pandas as pd

    where = f"{table.path}: column {name!r}"
    if loss == "mse" or column.dtype.kind == "f":
        return Targets(None).encode(_numbers(table, column, name), where), None, ()
    # The text of the file: 007 and 7 may be two names.
    number = column.name
    text = table.columns(usecols=[number], dtype=str)[number].str.strip()
    empty = np.flatnonzero(text == "")
    if len(empty):
        table.fail(
            f"column {name!r} must have a value in every row, got an empty cell in row "
            f"{empty[0] + 1}"
        )
    codes, distinct = pd.factorize(text)
    distinct = [str(value) for value in distinct]
    numbers = _parsed(pd.Series(distinct))
    words = np.flatnonzero(np.isnan(numbers) & [not _is_number(t) for t in distinct])
    is_whole = all(map(_INTEGER.fullmatch, distinct)) and np.isfinite(numbers).all()
    is_spelled = is_whole and all(str(int(t)) == t for t in distinct)
    notes = ()
    if len(words) == 0 and not is_whole:
        targets = Targets(None)
    elif is_spelled:
        targets = Targets.from_integers(sorted(map(int, distinct)), where, loss)
        notes = targets.about_integers(len(distinct), len(text), name)
    else:
        targets = Targets.from_names(sorted(distinct), len(distinct), where)
    if targets.classes is None:
        return targets.encode(_numbers(table, text, name), where), None, notes
    if is_whole and not is_spelled:
        odd = next(t for t in distinct if str(int(t)) != t)
        notes = (f"{name} has integers written as {odd}: its classes are told apart by spelling",)
    if 0 < len(words) < len(distinct):
        row = int(np.argmax(codes == words[0])) + 1
        what = f"words among its numbers, {_shown(distinct[words[0]])} in row {row}"
        _check_mixed(table, name, what, [t for t in distinct if _is_number(t)], len(text))
        notes = (f"{name} has {what}: its {len(distinct)} different values are classes",)
    index = {name: place for place, name in enumerate(targets.classes)}
    places = torch.tensor([index[t] for t in distinct])
    return places[torch.from_numpy(codes)], targets.classes, notes


def _check_mixed(table: _Table, name: str, what: str, numbers: list[str], rows: int) -> None:
    """Raise where a column of measured numbers would become a class for each number."""
    is_measured = any(not _INTEGER.fullmatch(t) for t in numbers) and 2 * len(numbers) > rows
    if is_measured or len(numbers) > MAX_CLASSES:
        table.fail(
            f"column {name!r} has {what}; to predict a number fill or drop such rows, for classes "
            f"have fewer than {len(numbers)} different values"
        )
