"""The target of a table: its type, its classes, rows without one; what every bad one is told."""

from __future__ import annotations

import pytest
import torch

from fusedmlp.train import TrainError
from fusedmlp.train.data import columns, frame_target
from fusedmlp.train.data.frame_data import read_table

from .. import made_data

made_data.need("numpy", "pandas")
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402


def _file(tmp_path, values) -> str:
    path = tmp_path / "a.csv"
    rows = "".join(f"{i % 5},{value}\n" for i, value in enumerate(values))
    path.write_text("a,y\n" + rows, encoding="utf-8")
    return str(path)


def _with_target(tmp_path, values, loss: str = "auto"):
    return read_table(_file(tmp_path, values), loss=loss)


@pytest.mark.parametrize("order", ["0, 1, unknown", "unknown, 0, 1", "1, unknown, 0"])
def test_the_order_of_rows_does_not_decide_the_type_of_a_target(tmp_path, order):
    values = order.split(", ") * 2
    found = _with_target(tmp_path, values)
    assert found.classes == ("0", "1", "unknown")
    assert [found.classes[i] for i in found.y_train] == values
    row = values.index("unknown") + 1
    assert f"words among its numbers, unknown in row {row}: its 3" in found.notes[0]


@pytest.mark.parametrize(
    "values, classes",
    [
        (["007", "7", "07"], ("007", "07", "7")),
        (["1_0", "10", "1_0"], ("10", "1_0")),
        (["+1", "-1", "+1"], ("+1", "-1")),
        (["2", "10", "1"], ("1", "2", "10")),
        (["None", "mild", "mild"], ("None", "mild")),
        (["-1", "1", "-1"], ("-1", "1")),
        ([str(10**19), "5", str(-(10**20))], (str(-(10**20)), "5", str(10**19))),
        (["True", "False", "True"], ("False", "True")),
        (["b", " a ", '"b"'], ("a", "b")),
        (["1.5", "2.5", "unknown", "1.5"], ("1.5", "2.5", "unknown")),
    ],
    ids=lambda values: "-".join(values)[:20],
)
def test_classes_are_told_apart_by_what_is_written(tmp_path, values, classes):
    found = _with_target(tmp_path, values)
    assert found.classes == classes
    assert [found.classes[i] for i in found.y_train] == [v.strip(' "') for v in values]


def test_integers_of_two_spellings_are_named_in_a_note(tmp_path):
    assert (
        "written as 007: its classes are told apart by spelling"
        in (_with_target(tmp_path, ["1", "007", "7"]).notes[0])
    )
    assert _with_target(tmp_path, ["1", "0"] * 20).notes == ()


@pytest.mark.parametrize(
    "values, is_number",
    [
        (range(0, 14_000, 7), True),  # more than there can be classes
        (range(300), True),  # a row each
        (list(range(30, 61)) * 50, True),  # ages: they do not begin at 0 or 1
        (list(range(1, 41)) * 25, False),  # numbered without a gap, with rows enough
        ([0, 1, 2, 3, 7, 12] * 5, False),  # few
    ],
    ids=["many", "a row each", "ages", "numbered", "few"],
)
def test_integers_are_classes_where_they_number_them(tmp_path, values, is_number):
    found = _with_target(tmp_path, values)
    assert found.is_classes is not is_number
    count = len(set(values))
    assert not is_number or f"{count} different integers and is predicted" in found.notes[0]
    if count <= 1000:
        forced = read_table(str(tmp_path / "a.csv"), loss="cross_entropy")
        assert forced.classes == tuple(str(v) for v in sorted(set(values)))
    assert not read_table(str(tmp_path / "a.csv"), loss="mse").is_classes


def test_rows_without_a_target_are_left_out_counted_and_said(tmp_path):
    found = _with_target(tmp_path, ["x", "", "y", "NA", "x", "?"])
    assert found.classes == ("x", "y") and found.y_train.tolist() == [0, 1, 0]
    assert found.x_train.flatten().tolist() == [0, 2, 4]
    assert found.notes == ("3 rows have no y and are left out",)
    found = _with_target(tmp_path, ["1.5", "None", "2.25", "nan"])
    assert found.y_train.flatten().tolist() == [1.5, 2.25]
    assert found.notes == ("2 rows have no y and are left out",)


def test_a_frame_has_the_targets_that_its_csv_has(tmp_path):
    a = [1.0, 2.0, 3.0, 5.0, 4.0, 8.0] * 5
    for y in (
        [1.0, np.nan, 0.0, 1.0, 0.0, 1.0] * 5,  # integers of which one is missing
        [True, False, True, True, False, True] * 5,
        ["x", None, "y", "x", "y", "z"] * 5,
        [1.5, 2.5, np.nan, 3.5, 2.0, 1.0] * 5,
        pd.Categorical(["x", None, "y", "x", "y", "z"] * 5),
    ):
        frame = pd.DataFrame({"a": a, "y": y})
        plain = pd.Series(y)
        if plain.dtype == float and (plain.dropna() % 1 == 0).all():
            plain = plain.astype("Int64")
        frame.assign(y=plain).to_csv(tmp_path / "a.csv", index=False)
        of_frame, of_file = read_table(frame, "y"), read_table(str(tmp_path / "a.csv"))
        assert of_frame.classes == of_file.classes
        assert torch.equal(of_frame.y_train, of_file.y_train)
        assert of_frame.notes == of_file.notes


BAD = {
    "no_values": (["", "NA"], "auto", "'y' must hold values to predict, got none"),
    "one_class": (["x", "x"], "auto", "at least two classes, got only x"),
    "one_class_of_numbers": (["1", "1"], "auto", "at least two classes, got only 1"),
    "word_in_measured": (
        ["2.5", "2.7", "2.9", "lost"],
        "auto",
        "'y' has words among its numbers, lost in row 4; to predict a number fill or drop",
    ),
    "words_as_numbers": (["1", "x"], "mse", "'y' must hold numbers, got x in row 2"),
    "infinity": (["1.5", "inf"], "auto", "'y' must hold finite fp32 numbers, got inf in row 2"),
    "many_integers": (range(2000), "cross_entropy", "2000 different values, more than 1000 cl"),
    "many_words": ([f"w{i}" for i in range(1500)], "auto", "1500 different values, more than 1000"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_target_is_a_clear_error(tmp_path, case):
    values, loss, message = BAD[case]
    with pytest.raises(TrainError, match=message):
        _with_target(tmp_path, values, loss)


def test_dates_are_no_target():
    frame = pd.DataFrame({"a": [1, 2], "y": pd.to_datetime(["2001-01-01", "2002-01-01"])})
    with pytest.raises(TrainError, match="'y' must hold numbers or words to predict, got dates"):
        read_table(frame, "y")


def test_the_target_of_new_rows_is_kept_where_it_is_given():
    column = columns.Column("y", "words", levels=("a", "b"))
    y, kept = frame_target.encode_target(column, pd.Series(["b", "a", "", "b"]), "t.csv", "known")
    assert y.tolist() == [1, 0, 1] and kept.tolist() == [True, True, False, True]
