"""The target of a table: integers and words are classes, other numbers are regression. The type
follows from all of the rows."""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import TrainError
from .columns import (
    MISSING,
    Column,
    Text,
    date_column,
    encode,
    is_number,
    number_column,
    numbers_of_text,
    parse_numbers,
    shown,
    text_of,
)
from .tables import MAX_CLASSES

# Different integers that are classes whatever they are; more of them are classes where they are
# numbered without gaps and have rows enough.
FEW_CLASSES = 20
ROWS_A_CLASS = 20
LEAST_ROWS = 10  # from which a class for each row says that something else was meant
# None is a word that a class may have.
MISSING_TARGET = tuple(word for word in MISSING if word != "None")
_INTEGER = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Target:
    """y: (n,) int64, the places among column.levels, or (n, 1) fp64 where the column is a number;
    for the rows in `kept` (m,) bool, which have a target."""

    column: Column
    y: Tensor
    kept: Tensor
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.column.levels if self.column.kind == "words" else None


def read_target(series, name: str, loss: str, where: str) -> Target:
    """raises  TrainError for a target that cannot be learned"""
    import pandas as pd

    kinds = pd.api.types
    if kinds.is_datetime64_any_dtype(series.dtype):
        raise _of_dates(name, where)
    is_missing = series.isna()
    if kinds.is_float_dtype(series.dtype):
        whole = (series.dropna() % 1 == 0).all()
        # pandas makes floats of integers where one is missing.
        is_float = loss == "mse" or not (whole and is_missing.any())
        if is_float and not is_missing.all():
            column = Column(name, "number")
            return _numbers(column, encode(column, series, where), where)
    text = text_of(series, MISSING_TARGET)
    if "None" in text.texts and all(t == "None" or is_number(t) for t in text.texts):
        text = text_of(series)  # a missing number, written as Python does
    if not text.texts:
        raise TrainError(f"{where}: column {name!r} must hold values to predict, got none")
    return _from_text(text, name, loss, where)


def _from_text(text: Text, name: str, loss: str, where: str) -> Target:
    import numpy as np

    kept = torch.from_numpy(text.codes >= 0)
    as_number = number_column(name, text.texts, where)
    # Python makes no integer of more digits than some thousands, and fp32 none of that size.
    is_whole = all(map(_INTEGER.fullmatch, text.texts)) and max(map(len, text.texts)) < 1000
    is_spelled = is_whole and all(str(int(t)) == t for t in text.texts)
    if loss == "mse" or (as_number is not None and not is_whole):
        column = as_number or Column(name, "number")
        return _numbers(column, numbers_of_text(column, text, where), where)
    rows, count = text.present, len(text.texts)
    notes = ()
    if is_spelled:
        if _is_counted(sorted(map(int, text.texts)), rows, loss):
            column = Column(name, "number")
            target = _numbers(column, numbers_of_text(column, text, where), where)
            note = f"{name} has {count} different integers and is predicted as a number"
            return replace(target, notes=(note, *target.notes))
        levels = [str(value) for value in sorted(map(int, text.texts))]
        if rows < ROWS_A_CLASS * count:
            notes = (
                f"{name} has {count} different integers in {rows} rows, which are taken for "
                "classes; --loss mse predicts a number",
            )
    else:
        levels = sorted(text.texts)
        if is_whole:
            odd = next(t for t in text.texts if str(int(t)) != t)
            notes = (
                f"{name} has integers written as {odd}: its classes are told apart by spelling",
            )
        else:
            notes = _about_mixed(text, name, where)
    if count > FEW_CLASSES and date_column(name, text.texts)[0] is not None:
        raise _of_dates(name, where)
    if count > MAX_CLASSES:
        raise TrainError(
            f"{where}: column {name!r} holds {count} different values, more than {MAX_CLASSES} "
            "classes" + ("; for a number to predict take --loss mse" if is_whole else "")
        )
    if loss == "auto" and count == rows >= LEAST_ROWS:
        raise TrainError(
            f"{where}: column {name!r} must hold classes of several rows, got another value in "
            f"each of its {rows} rows" + ("; --loss mse predicts a number" if is_whole else "")
        )
    if count < 2:
        raise TrainError(
            f"{where}: column {name!r} must hold at least two classes, got only {levels[0]}"
        )
    index = {level: place for place, level in enumerate(levels)}
    places = np.array([index[t] for t in text.texts])
    y = torch.from_numpy(places[text.codes[text.codes >= 0]])
    return Target(
        Column(name, "words", levels=tuple(levels)), y, kept, (*notes, *_about_missing(name, kept))
    )


def _of_dates(name: str, where: str) -> TrainError:
    return TrainError(
        f"{where}: column {name!r} must hold numbers or words to predict, got dates; make a number "
        "of them"
    )


def _numbers(column: Column, values, where: str) -> Target:
    values = torch.from_numpy(values)
    kept = ~values.isnan()
    y = values[kept].reshape(-1, 1)
    if len(y) and not (y != y[0]).any():
        raise TrainError(
            f"{where}: column {column.name!r} must hold at least two different numbers to predict, "
            f"got only {float(y[0]):g}"
        )
    return Target(column, y, kept, _about_missing(column.name, kept))


def _about_missing(name: str, kept: Tensor) -> tuple[str, ...]:
    count = len(kept) - int(kept.sum())
    return (f"{count} rows have no {name} and are left out",) if count else ()


def _is_counted(values: list[int], rows: int, loss: str) -> bool:
    """Whether these integers are numbers and no classes."""
    if loss == "cross_entropy" or len(values) <= FEW_CLASSES:
        return False
    is_numbered = values[0] in (0, 1) and values[-1] - values[0] == len(values) - 1
    return not is_numbered or len(values) > MAX_CLASSES or rows < ROWS_A_CLASS * len(values)


def _about_mixed(text: Text, name: str, where: str) -> tuple[str, ...]:
    """A note of words among numbers.

    raises  TrainError where a column of measured numbers would become a class for each number
    """
    numbers = [t for t in text.texts if is_number(t)]
    if not numbers or len(numbers) == len(text.texts):
        return ()
    first = next(place for place, t in enumerate(text.texts) if not is_number(t))
    what = f"words among its numbers, {shown(text.texts[first])} in row {text.row(first)}"
    is_measured = any(not _INTEGER.fullmatch(t) for t in numbers)
    if (is_measured and 2 * len(numbers) > text.present) or len(numbers) > MAX_CLASSES:
        raise TrainError(
            f"{where}: column {name!r} has {what}; to predict a number fill or drop such rows, for "
            f"classes have fewer than {len(numbers)} different values"
        )
    return (f"{name} has {what}: its {len(text.texts)} different values are classes",)


def encode_target(column: Column, series, where: str, known_to: str) -> tuple[Tensor, Tensor]:
    """(y, kept) of the target of new rows, as read_target has them.

    raises  TrainError for a class that training did not know
    """
    import numpy as np

    text = text_of(series, MISSING if column.kind == "number" else MISSING_TARGET)
    kept = text.codes >= 0
    if column.kind == "number":
        values = np.append(parse_numbers(column, text.texts), np.nan)[text.codes]
        bad = np.flatnonzero(kept & ~np.isfinite(values))
        if len(bad):
            raise TrainError(
                f"{where}: column {column.name!r} must hold finite numbers, got "
                f"{shown(text.texts[text.codes[bad[0]]])} in row {bad[0] + 1}"
            )
        return torch.from_numpy(values[kept]).reshape(-1, 1), torch.from_numpy(kept)
    index = {level: place for place, level in enumerate(column.levels)}
    places = np.array([index.get(t, -1) for t in text.texts], dtype=np.int64)
    unknown = np.flatnonzero(places < 0)
    if len(unknown):
        place = int(unknown[0])
        some = ", ".join(shown(level) for level in column.levels[:5])
        raise TrainError(
            f"{where}: column {column.name!r} must hold classes that {known_to} knows ({some}"
            f"{', ...' if len(column.levels) > 5 else ''}), got {shown(text.texts[place])} in row "
            f"{text.row(place)}"
        )
    return torch.from_numpy(places[text.codes[kept]]), torch.from_numpy(kept)
