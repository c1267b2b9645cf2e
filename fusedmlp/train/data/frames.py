"""Where the rows of a table come from: a csv or Parquet file, or a DataFrame of the caller's.

Each has names, where (for messages), notes, and blocks(rows, text): DataFrames of at most so many
rows, or one of all, in which the columns named by `text` are as they are written.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import TrainError, first_line
from .csv_table import CsvTable


def is_frame(source) -> bool:
    """Whether it is a DataFrame, of pandas or of a library that makes one of its own (polars)."""
    return hasattr(source, "columns") and (hasattr(source, "iloc") or hasattr(source, "to_pandas"))


def open_table(source):
    """A CsvTable, ParquetTable or FrameTable.

    source  a path, or a DataFrame
    """
    try:
        import pandas  # noqa: F401
    except ImportError as error:
        name = "a table" if is_frame(source) else source
        raise TrainError(
            f"reading {name} needs pandas ({error}): pip install 'fusedmlp[train]'"
        ) from error
    if is_frame(source):
        return FrameTable(source)
    path = Path(source)
    return ParquetTable(path) if path.suffix.lower() == ".parquet" else CsvTable(path)


class FrameTable:
    where = name = "the table"
    notes = ()

    def __init__(self, frame):
        if not hasattr(frame, "iloc"):
            frame = _to_pandas(frame)
        self.frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
        self.names = list(self.frame.columns)
        _check_names(self.names, self.where)

    def blocks(self, rows: int | None = None, text: Collection[str] = ()) -> Iterator:
        if len(self.frame) == 0:
            raise TrainError(f"{self.where} must have rows, got none")
        rows = rows or len(self.frame)
        for start in range(0, len(self.frame), rows):
            yield self.frame.iloc[start : start + rows].copy(deep=False)


class ParquetTable:
    notes = ()

    def __init__(self, path: Path):
        self.path, self.where, self.name = path, str(path), path.name
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise TrainError(f"reading {path} needs pyarrow: pip install pyarrow") from error
        try:
            self.file = parquet.ParquetFile(path)
        except FileNotFoundError as error:
            raise TrainError(f"{path} does not exist") from error
        except (ArrowException, OSError, ValueError) as error:
            raise TrainError(
                f"{path} is truncated, corrupted or no Parquet file ({first_line(error)})"
            ) from error
        # A pandas index is kept as a column of its own.
        self.names = list(self.file.schema_arrow.names)
        _check_names(self.names, self.where)

    def blocks(self, rows: int | None = None, text: Collection[str] = ()) -> Iterator:
        from pyarrow import ArrowException

        count = self.file.metadata.num_rows
        if count == 0:
            raise TrainError(f"{self.path} must have rows, got none")
        try:
            if rows is None:
                parts = [self.file.read()]
            else:
                parts = self.file.iter_batches(rows)
            for part in parts:
                part.validate(full=True)  # words that are no text are seen here, not in pandas
                yield part.to_pandas(ignore_metadata=True)
        except (ArrowException, OSError, ValueError) as error:
            raise TrainError(
                f"{self.path} is truncated, corrupted or no Parquet file ({first_line(error)})"
            ) from error


def _to_pandas(frame):
    try:
        return frame.to_pandas()
    except ImportError as error:
        raise TrainError(
            f"a {type(frame).__module__.split('.')[0]} DataFrame becomes one of pandas by another "
            f"package ({error}); install it, or pass a pandas DataFrame"
        ) from error


def _check_names(names: list[str], where: str) -> None:
    if not names:
        raise TrainError(f"{where} must have columns, got none")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise TrainError(f"{where} must name each column once, got {twice!r} twice")
