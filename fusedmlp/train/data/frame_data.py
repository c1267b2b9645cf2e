"""A table as a Data: its columns are recognised, its target found, and its rows become raw numbers,
which preparation.py makes inputs of."""

from collections.abc import Collection

import torch

from ..errors import TrainError, UsageError
from .columns import UNKNOWN, Column, Schema, encode, is_id_name, recognise
from .frame_target import read_target
from .frames import open_table
from .types import Data


def read_table(
    source,
    target: str | None = None,
    loss: str = "auto",
    *,
    leave_out: Collection[str] = (),
    weight_column: str | None = None,
) -> Data:
    """All rows that have a target. Raw rows are fp64: numbers, seconds of dates, places of words.

    source         a csv or Parquet file, or a DataFrame
    target         the column to predict, by default the last one
    leave_out      columns to leave out
    weight_column  the column of the rows' weights
    raises         UsageError for a column that is not there, TrainError for what cannot be read
    """
    table = open_table(source)
    names = table.names
    target = _named("--target", target if target is not None else names[-1], table)
    for name in leave_out:
        _named("--leave-out", name, table)
    if weight_column is not None:
        _named("--weight-column", weight_column, table)
    for flag, name in (("--leave-out", [*leave_out]), ("--weight-column", [weight_column])):
        if target in name:
            raise UsageError(f"{flag} must name other columns than the target, got {target!r}")
    features = [n for n in names if n not in (target, weight_column, *leave_out)]
    if not features:
        raise TrainError(
            f"{table.where} must have a column besides the target {target!r}"
            + ("" if leave_out or weight_column else f"; its columns are: {', '.join(names)}")
        )
    (frame,) = table.blocks(text=(target,))
    found = read_target(frame.pop(target), target, loss, table.where)
    weights = None
    if weight_column is not None:
        weights = _weights(frame.pop(weight_column), weight_column, found.kept, table.where)
    columns, values, left_out, notes = [], [], {}, []
    for name in features:
        series = frame.pop(name)
        column, note = _recognised(name, series, table.where)
        if column is None:
            left_out[name] = note
            continue
        columns.append(column)
        values.append(torch.from_numpy(encode(column, series, table.where))[found.kept])
        notes += [note] if note else []
    if left_out:
        told = "; ".join(f"{name or '(no name)'}: {reason}" for name, reason in left_out.items())
        notes.insert(0, f"left out: {told}")
    if not columns:
        raise TrainError(f"{table.where}: no column is left to predict {target} from: {notes[0]}")
    names_left = (*leave_out, *left_out, *([weight_column] if weight_column is not None else []))
    return Data(
        table.name,
        torch.stack(values, dim=1),
        found.y,
        classes=found.classes,
        features=tuple(column.name for column in columns),
        target=target,
        notes=(*table.notes, *found.notes, *notes),
        is_table=True,
        schema=Schema(tuple(columns), found.column, names_left),
        weights=weights,
    )


def _named(flag: str, name: str, table) -> str:
    if name not in table.names:
        raise UsageError(
            f"{flag} must be a column of {table.where}: {', '.join(table.names)}; got {name!r}"
        )
    return name


def _recognised(name: str, series, where: str) -> tuple[Column | None, str]:
    column, note = recognise(name, series, where)
    if column is not None and column.kind == "words" and is_id_name(name):
        if len(series) >= 10 and len(column.levels) == len(series):
            return None, "it names the rows"
    return column, note


def _weights(series, name: str, kept: torch.Tensor, where: str) -> torch.Tensor:
    """(m,) fp64 of the rows in `kept`, at least 0 and not all of them 0."""
    values = torch.from_numpy(encode(Column(name, "number"), series, where))
    bad = torch.nonzero(kept & ~(values >= 0)).flatten()
    if len(bad):
        given = "an empty cell" if values[bad[0]].isnan() else f"{values[bad[0]]:g}"
        raise TrainError(
            f"{where}: column {name!r} must hold weights of at least 0, got {given} in row "
            f"{int(bad[0]) + 1}"
        )
    if not values[kept].any():
        raise TrainError(f"{where}: column {name!r} must hold a weight above 0, got only 0")
    return values[kept]


def raw_rows(
    frame, columns: tuple[Column, ...], left_out: Collection[str], where: str
) -> tuple[torch.Tensor, dict[str, int], list[str]]:
    """(raw rows (n, k) fp64 of new rows, {column: cells with words unknown to training}, columns
    that training did not have).

    raises  TrainError for columns that are missing or hold something else than in training
    """
    missing = [column.name for column in columns if column.name not in frame.columns]
    if missing:
        raise TrainError(
            f"{where} must have the columns of the training table; missing: {', '.join(missing)}; "
            f"got: {', '.join(map(str, frame.columns))}"
        )
    values = [torch.from_numpy(encode(c, frame[c.name], where)) for c in columns]
    unknown = {}
    for column, each in zip(columns, values, strict=True):
        count = int((each == UNKNOWN).sum()) if column.kind == "words" else 0
        if count:
            unknown[column.name] = count
    known = {column.name for column in columns} | set(left_out)
    return torch.stack(values, dim=1), unknown, [n for n in frame.columns if n not in known]
