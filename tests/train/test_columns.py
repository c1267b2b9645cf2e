"""The columns of a table: their kinds, their numbers, and which are left out."""

from __future__ import annotations

import math

import pytest

from fusedmlp.train import TrainError
from fusedmlp.train.data import columns

from .. import made_data

made_data.need("numpy", "pandas")
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

NAN = math.nan
DAY = 86_400.0


def _read(values, name: str = "c"):
    series = pd.Series(values)
    column, note = columns.recognise(name, series, "t.csv")
    return column, note, None if column is None else columns.encode(column, series, "t.csv")


READ = {
    "numbers": ([1.5, None, 3], "number", [1.5, NAN, 3]),
    "numbers_as_text": (["1.5", "", " 3 "], "number", [1.5, NAN, 3]),
    "nullable": (pd.array([1, None, 3], dtype="Int64"), "number", [1, NAN, 3]),
    "decimal_comma": (["1,5", "-2", "3,25e2"], "number", [1.5, -2, 325]),
    "decimal_comma_below_one": (["0,125", "3,250"], "number", [0.125, 3.25]),
    "thousands": (["1,234,567.5", "12"], "number", [1_234_567.5, 12]),
    "truth": ([True, False, True], "truth", [1, 0, 1]),
    "truth_as_text": (["TRUE", None, "false"], "truth", [1, NAN, 0]),
    "words": (["b", "a", None, "?", "b"], "words", [1, 0, NAN, NAN, 1]),
    "category": (pd.Categorical(["b", "a", None]), "words", [1, 0, NAN]),
    "lists": ([[1], [2], None], "words", [0, 1, NAN]),
    "date": (["1970-01-02", "", "1970-01-03 12:00"], "date", [DAY, NAN, 2.5 * DAY]),
    "date_of_days": (["31.12.1970", "01.01.1971"], "date", [364 * DAY, 365 * DAY]),
    "date_of_months": (["12/31/1970", "01/01/1971"], "date", [364 * DAY, 365 * DAY]),
    "datetime": (pd.to_datetime(["1970-01-02", None]), "date", [DAY, NAN]),
    "with_zone": (pd.to_datetime(["1970-01-02 01:00+01:00"]), "date", [DAY]),
    "duration": (pd.to_timedelta(["1 day", None]), "number", [DAY, NAN]),
    "decimals": (np.array([__import__("decimal").Decimal("1.50")]), "number", [1.5]),
}


@pytest.mark.parametrize("case", READ)
def test_cells_become_numbers(case):
    values, kind, wanted = READ[case]
    column, note, found = _read(values)
    assert (column.kind, note) == (kind, "")
    np.testing.assert_array_equal(found, wanted)


def test_dates_that_could_be_read_in_two_ways_are_said():
    column, note, found = _read(["02/01/1970", "03/04/1970"])
    assert column.format == "%m/%d/%Y" and found[0] == 31 * DAY
    assert note == "c has dates as 02/01/1970, which are read as month/day/year"


def test_a_few_words_among_numbers_are_missing_numbers_and_many_are_words():
    values = [str(i / 7) for i in range(100)] + ["lost", "-", "lost"]
    column, note, found = _read(values)
    assert column.kind == "number" and set(column.blanks) == {"lost", "-"}
    assert note == (
        "c has words among its numbers, lost in row 101 (3 in all): they are taken for missing "
        "numbers"
    )
    assert np.isnan(found[-3:]).all()
    with pytest.raises(TrainError, match="'c' must hold numbers, got gone in row 2"):
        columns.encode(column, pd.Series(["lost", "gone"]), "new.csv")
    column, note, _ = _read(["1", "x", "2", "y"])
    assert column.levels == ("1", "2", "x", "y")
    assert note == "c has words among its numbers, x in row 2: its values are taken as words"


LEFT_OUT = {
    "counts": ("c", range(30), "it counts the rows"),
    "counts_from_one": ("c", range(1, 31), "it counts the rows"),
    "numbers_rows": ("PassengerId", [7 * i % 31 for i in range(31)], "it numbers the rows"),
    "no_name": ("", [7 * i % 31 for i in range(31)], "it numbers the rows"),
    "identifiers": ("c", [f"k{i}" for i in range(30)], "nearly as many words as rows, 30 in 30"),
    "texts": ("c", [f"{'word ' * 20}{i % 17}" for i in range(30)], "it holds long texts"),
    "empty": ("c", [None] * 30, "it has no values"),
    "empty_text": ("c", [""] * 30, "it has no values"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_cannot_be_learned_from_is_left_out_with_a_reason(case):
    name, values, reason = LEFT_OUT[case]
    column, note = columns.recognise(name, pd.Series(list(values)), "t.csv")
    assert column is None and reason in note


@pytest.mark.parametrize(
    "name, values",
    [("year", range(1950, 1990)), ("paid", [7 * i % 31 for i in range(31)]), ("c", range(5))],
    ids=["years", "a name that ends in id", "few rows"],
)
def test_other_whole_numbers_stay(name, values):
    assert columns.recognise(name, pd.Series(list(values)), "t.csv")[0].kind == "number"


def test_a_column_that_changed_since_training_is_an_error():
    cases = [
        (columns.Column("c", "number"), ["1", "x"], "numbers, got x in row 2"),
        (columns.Column("c", "truth"), ["true", "maybe"], "true or false, got maybe in row 2"),
        (columns.Column("c", "truth"), [0, 2], "true or false, got 2 in row 2"),
        (columns.Column("c", "date", format="%d.%m.%Y"), ["2001-01-01"], "written as %d.%m.%Y"),
        (columns.Column("c", "words", ("f", "m")), [0, 1], "words as in training .f, m., got 0"),
        (columns.Column("c", "number"), [1.0, math.inf], "finite fp32 numbers, got inf in row 2"),
    ]
    for column, values, message in cases:
        with pytest.raises(
            TrainError, match=f"new.csv: column 'c' must hold .*{message}|{message}"
        ):
            columns.encode(column, pd.Series(values), "new.csv")


def test_unknown_words_have_a_number_of_their_own():
    column = columns.Column("c", "words", ("f", "m"))
    found = columns.encode(column, pd.Series(["m", "x", None]), "new.csv")
    np.testing.assert_array_equal(found, [1, columns.UNKNOWN, NAN])


def test_complex_numbers_are_no_column():
    with pytest.raises(TrainError, match="column 'c' must hold numbers or words, got complex128"):
        _read([1j, 2.0, 3.0, 4.0])
