"""csv files: what is read, how the type of a target is found, and the message for every bad one."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from fusedmlp.train import TrainConfig, TrainError, UsageError
from fusedmlp.train.data import csv_table, datasets, types

from . import made_data

made_data.need("numpy", "pandas")
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402


def load(**settings) -> types.Data:
    return datasets.load(TrainConfig(**settings))


def _csv(tmp_path, text: str) -> str:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def _lines(target: str) -> str:
    return "".join(f"{i},{i * 0.5},{target.format(i=i)}\n" for i in range(20))


def test_csv_targets_are_classes_or_numbers(tmp_path):
    floats = load(dataset=_csv(tmp_path, "a,b,price\n" + _lines("{i}.5")))
    assert not floats.is_classes and floats.target == "price" and floats.features == ("a", "b")
    text = "".join(f"{i},{'xy'[i % 2]}\n" for i in range(20))
    assert load(dataset=_csv(tmp_path, "a,kind\n" + text)).classes == ("x", "y")
    whole = _csv(tmp_path, "a,b,n\n" + _lines("{i}"))
    assert load(dataset=whole).is_classes
    assert not load(dataset=whole, loss="mse").is_classes
    named = load(dataset=whole, target="b")
    assert named.features == ("a", "n") and not named.is_classes


BAD_CSV = {
    "empty": ("", "must start with a header line"),
    "only_a_header": ("a,b\n", "must have rows below"),
    "no_header": ("1,2\n3,4\n", "line of column names"),
    "nan": ("a,b\n1,2\nnan,3\n", "column 'a' must hold finite fp32 numbers, got nan in row 2"),
    "hole": ("a,b\n1,2\n,3\n", "column 'a' must hold numbers, got an empty cell in row 2"),
    "word": ("a,b\n1,2\nhello,3\n", "column 'a' must hold numbers, got hello in row 2"),
    "short_row": ("a,b\n1,2\n3\n", "line 3: a row must have 2 values as the header, got 1"),
    "twice": ("a,a\n1,2\n", "name each column once, got 'a' twice"),
    "one_column": ("a\n1\n2\n", "must have a column besides"),
    "hole_in_target": ("a,b\n1,2\n3,\n", "column 'b' must have a value in every row"),
    "long_row": ("a,b\n1,2\n3,4,5\n", "line 3: a row must have 2 values as the header, got 3"),
    "all_rows_long": ("a,b\n1,2,3\n4,5,6\n", "line 2: a row must have 2 values .*, got 3"),
    "short_row_of_names": ("a,b\n1,x\n2\n", "line 3: a row must have 2 values .*, got 1"),
    "short_row_after_a_long_cell": (
        'a,b,c\n1,"x\ny",2\n3,4\n',
        "line 4: a row must have 3 values as the header, got 2",
    ),
    "infinity": ("a,b\n1,2\n-inf,3\n", "'a' must hold finite fp32 numbers, got -inf in row 2"),
    "too_large": (
        "a,b\n1,2\n1e300,3\n",
        r"'a' must hold finite fp32 numbers, got 1e\+300 in row 2",
    ),
    "python_number": ("a,b\n1,2\n1_0,3\n", "'a' must hold numbers, got 1_0 in row 2"),
    "decimal_comma": ("a;b\n1;2\n1,5;3\n", "got 1,5 in row 2; write numbers with a decimal point"),
    "words_for_missing": ("a,b\n1,2\nNA,3\n", "'a' must hold numbers, got NA in row 2; make num"),
    "nan_in_target": ("a,b\n1,2.5\n2,nan\n", "'b' must hold finite fp32 numbers, got nan in row 2"),
    "word_in_measured": (
        "a,b\n1,2.5\n2,2.7\n3,2.9\n4,?\n",
        r"'b' has words among its numbers, \? in row 4; to predict a number fill or drop",
    ),
    "one_class": ("a,b\n1,x\n2,x\n", "at least two classes, got only x"),
    "one_class_of_numbers": ("a,b\n1,1\n2,1\n", "at least two classes, got only 1"),
    "open_quote": ('a,b\n1,"2\n3,4\n', "is no csv text file|values as the header"),
    "no_separator": ("a b\n1 2\n", "separated by commas, semicolons or tabs"),
    "endless_integer": (
        "a,b\n1," + "9" * 5000 + "\n2,3\n",
        "finite fp32 numbers, got 9+[.]{3} in row 1",
    ),
    "bytes": ("a,b\n\0\0", "no csv text file .it holds zero bytes"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_bad_csv_is_a_clear_error(tmp_path, case):
    text, message = BAD_CSV[case]
    with pytest.raises(TrainError, match=message):
        load(dataset=_csv(tmp_path, text))


def test_an_unknown_target_column_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="--target must be a column of .*: a, b; got 'c'"):
        load(dataset=_csv(tmp_path, "a,b\n1,2\n"), target="c")


def _with_target(tmp_path, values) -> types.Data:
    rows = "".join(f"{i},{value}\n" for i, value in enumerate(values))
    return csv_table.read_csv(_csv(tmp_path, "a,y\n" + rows), None)


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
        (["2", "10", "1"], tuple(map(str, range(11)))),  # numbered from 0: gaps are kept
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


def test_integers_without_end_are_a_number_to_predict(tmp_path):
    found = _with_target(tmp_path, range(0, 14_000, 7))
    assert not found.is_classes and found.y_train[2] == 14
    assert "2000 different integers and is predicted as a number" in found.notes[0]
    file = str(tmp_path / "a.csv")
    with pytest.raises(TrainError, match="2000 different integers, more than 1000 classes"):
        csv_table.read_csv(file, None, "cross_entropy")
    assert "; --loss mse predicts a number" in _with_target(tmp_path, range(300)).notes[0]


@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_separator_and_encoding_are_read_off_the_file(tmp_path, separator, encoding, ending):
    lines = [
        ["gr\u00f6\u00dfe", '"a, b; c"', "kind"],
        ["1", " 2.5 ", '"x;, y"'],
        ["-3e2", "4", "z"],
    ]
    path = tmp_path / "P.CSV"
    lines += 4 * lines[1:]
    path.write_bytes("".join(separator.join(line) + ending for line in lines).encode(encoding))
    found = datasets.read(TrainConfig(dataset=str(path), target="kind"))
    assert found.features == ("gr\u00f6\u00dfe", "a, b; c") and found.classes == ("x;, y", "z")
    assert found.x_test.tolist() == [[-300.0, 4.0], [1.0, 2.5]]
    assert found.y_test.tolist() == [1, 0] and len(found.x_train) == 8


def test_what_is_no_utf8_names_the_byte(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("a,b\n1,x\n2,\u00e9\n".encode("latin-1"))
    with pytest.raises(TrainError, match="UTF-8, got the byte 0xe9 in line 3; save it as UTF-8"):
        load(dataset=str(path))


def test_true_and_false_are_numbers_and_empty_lines_are_none(tmp_path):
    found = csv_table.read_csv(_csv(tmp_path, "a,b\n\nTrue,1.5\n\nFALSE,2.5\n\n"), None)
    assert found.x_train.tolist() == [[1.0], [0.0]] and found.y_train.tolist() == [[1.5], [2.5]]


def test_the_numbers_are_pandas_in_fp64(tmp_path):
    """Also of columns of which one cell makes pandas read text, as integers beyond 64 bits do."""
    table = pd.DataFrame(np.random.default_rng(0).random((200, 4)), columns=list("abcy"))
    table["a"] = 1.7e9 + np.arange(200)
    table["b"] = [10**25, *range(199)]
    file = str(tmp_path / "a.csv")
    table.to_csv(file, index=False)
    found = csv_table.read_csv(file, "y")
    wanted = pd.read_csv(file).astype(np.float64)
    assert np.array_equal(found.x_train, wanted[["a", "b", "c"]])
    assert np.array_equal(found.y_train, wanted[["y"]])


_MEASURE = """
import resource, sys
from fusedmlp.train.data import csv_table
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small, large = sys.argv[1:]
csv_table.read_csv(small, None)
before = peak()
found = csv_table.read_csv(large, None)
print((peak() - before) // 1024, len(found.x_train), len(found.classes))
"""


def test_a_long_cell_takes_no_more_memory_than_the_file(tmp_path):
    small, large = tmp_path / "small.csv", tmp_path / "large.csv"
    small.write_text("a,y\n1,x\n2,z\n")
    rows = [f"{i},{'x' * 20_000 if i == 777 else 'z'}" for i in range(20_000)]
    large.write_text("a,y\n" + "\n".join(rows) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(small), str(large)],
        env=made_data.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    megabytes, rows, classes = map(int, done.stdout.split())
    assert megabytes < 50 and (rows, classes) == (20_000, 2)


@pytest.mark.slow
def test_a_large_table_is_read_in_about_pandas_own_time(tmp_path):
    file = str(tmp_path / "a.csv")
    pd.DataFrame(np.random.default_rng(0).random((100_000, 21))).add_prefix("c").to_csv(
        file, index=False
    )

    def seconds(read) -> float:
        """Of the processor: other programs have no part in it."""
        started = time.process_time()
        read()
        return time.process_time() - started

    pairs = [
        (seconds(lambda: csv_table.read_csv(file, None)), seconds(lambda: pd.read_csv(file)))
        for _ in range(3)
    ]
    assert min(ours / theirs for ours, theirs in pairs) < 3
