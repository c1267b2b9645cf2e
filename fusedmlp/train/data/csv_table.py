"""csv files: a header line, then a row a line. The separator and the encoding are found in the
file.

pandas reads the rows; nothing is executed.
"""

import codecs
import csv
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path

from ..errors import TrainError
from .columns import MISSING, is_number

SEPARATORS = ",;\t|"
_SAMPLE_ROWS = 20  # rows from which the separator is found
_LONG_LINE = 1 << 16  # bytes


class CsvTable:
    """A file whose header has been read: its encoding and separator, and its rows on request."""

    def __init__(self, path: Path):
        self.path = path
        self.where = str(path)
        self.name = path.name
        self.notes: tuple[str, ...] = ()
        with _file_errors(path):
            self.encoding = self._find_encoding()
            self.separator = self._find_separator()
            records = self._records(self.separator)
            # pandas skips records too: a name in quotes may go over several lines.
            counted = enumerate((record for _, record in records), 1)
            self.skipped, header = next(((n, r) for n, r in counted if r), (0, []))
        self.names = [name.strip() for name in header]
        self.lengths_checked = False
        _check_header(self.names, path)

    def _find_encoding(self) -> str:
        with open(self.path, "rb") as file:
            start = file.read(4098)
            if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                return "utf-16"
            if b"\0" in start:
                raise TrainError(f"{self.path} is no csv text file (it holds zero bytes)")
            file.seek(0)
            decoder = codecs.getincrementaldecoder("utf-8")()
            try:
                while block := file.read(1 << 20):
                    decoder.decode(block)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                # Every byte is a letter in latin-1, so that it cannot fail; this is Windows' form.
                self.notes = (f"{self.name} is no UTF-8 and is read as latin-1 (Windows-1252)",)
                return "cp1252"
        return "utf-8-sig"

    def _has_long_line(self) -> bool:
        longest = length = 0
        with open(self.path, "rb") as file:
            while block := file.read(1 << 20):
                first, *rest = map(len, block.split(b"\n"))
                longest = max(longest, length + first, *rest)
                length = rest[-1] if rest else length + first
        return longest > _LONG_LINE

    def _open(self):
        errors = "replace" if self.encoding == "cp1252" else "strict"
        return open(self.path, newline="", encoding=self.encoding, errors=errors)

    def _records(self, separator: str):
        """(number of the last line, cells) of each record; an empty line has none."""
        with self._open() as file:
            reader = csv.reader(file, delimiter=separator, skipinitialspace=True)
            for record in reader:
                yield reader.line_num, record

    def _find_separator(self) -> str:
        best = max(SEPARATORS, key=self._fit)
        # Names and words may have spaces, so they separate only where nothing else does.
        return " " if self._fit(best)[0] < 0.9 and self._fit(" ")[0] == 1.0 else best

    def _fit(self, separator: str) -> tuple[float, int]:
        """How well it separates: the share of the first rows that are as long as the header, then
        the length; commas where none does."""
        try:
            rows = [r for _, r in islice(self._records(separator), _SAMPLE_ROWS) if r]
        except csv.Error:
            return 0.0, 0
        width = len(rows[0]) if rows else 0
        return (sum(len(r) == width for r in rows) / len(rows), width) if width > 1 else (0.0, 0)

    def blocks(self, rows: int | None = None, text: Collection[str] = ()) -> Iterator:
        """DataFrames of at most so many rows, or one of all of them.

        text  names of columns whose cells stay as they are written
        """
        import pandas as pd

        numbers = range(len(self.names))
        as_text = {i for i in numbers if self.names[i] in text}
        with _file_errors(self.path), warnings.catch_warnings():
            if self._has_long_line():
                # pandas makes a column of each cell of a row that is too long: a KB of each byte.
                with suppress(csv.Error):
                    self.check_lengths()
            # pandas warns of rows that are too long.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            try:
                reader = pd.read_csv(
                    self.path,
                    sep=self.separator,
                    header=None,
                    names=numbers,
                    index_col=False,
                    skiprows=self.skipped,
                    keep_default_na=False,
                    # For all columns at once where it can be: of each it keeps two sets.
                    na_values={i: [] if i in as_text else list(MISSING) for i in numbers}
                    if as_text
                    else list(MISSING),
                    dtype=dict.fromkeys(as_text, str),
                    skipinitialspace=True,
                    low_memory=False,  # else a column gets a type for each piece of the file
                    encoding=self.encoding,
                    encoding_errors="replace" if self.encoding == "cp1252" else "strict",
                    chunksize=rows,
                )
                found = 0
                with nullcontext([reader]) if rows is None else reader as frames:
                    for block in frames:
                        found += len(block)
                        yield self._checked(block)
            except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
                self.check_lengths()
                raise TrainError(f"{self.path} is no csv text file ({error})") from error
            except pd.errors.EmptyDataError:
                found = 0
        if found == 0:
            raise TrainError(f"{self.path} must have rows below its header line")

    def _checked(self, block):
        """The block under its names. pandas adds empty cells where a row is too short."""
        last = block.iloc[:, -1]
        if not self.lengths_checked and (last.isna() | (last.astype(object) == "")).any():
            self.check_lengths()
            self.lengths_checked = True
        block.columns = self.names
        return block

    def check_lengths(self) -> None:
        """Raise for the first row that is not as long as the header."""
        for line, row in self._records(self.separator):
            if row and len(row) != len(self.names):
                raise TrainError(
                    f"{self.path}, line {line}: a row must have {len(self.names)} values as the "
                    f"header, got {len(row)}"
                )


@contextmanager
def _file_errors(path: Path):
    """Raise errors of opening, decoding and splitting a file as TrainError."""
    try:
        yield
    except FileNotFoundError as error:
        raise TrainError(f"{path} does not exist") from error
    except UnicodeError as error:
        raise TrainError(f"{path} must be text in UTF-16, as its mark says ({error})") from error
    except csv.Error as error:
        raise TrainError(f"{path} is no csv text file ({error})") from error
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error


def _check_header(header: list[str], path: Path) -> None:
    if not header:
        raise TrainError(f"{path} must start with a header line, but it is empty")
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise TrainError(f"{path}: the header must name each column once, got {twice!r} twice")
    if all(is_number(name) for name in header):
        raise TrainError(
            f"{path} must start with a line of column names, got only numbers: "
            f"{', '.join(header[:4])}"
        )
