"""csv files: what is read, and the message for every bad one."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from fusedmlp.train import TrainConfig, TrainError, UsageError
from fusedmlp.train.data import datasets, types
from fusedmlp.train.data.frame_data import read_table

from .. import made_data

made_data.need("numpy", "pandas")
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402


def load(**settings) -> types.Data:
    return datasets.load(TrainConfig(**settings))


def _csv(tmp_path, text: str) -> str:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def test_a_csv_has_named_columns_and_the_last_one_is_the_target(tmp_path):
    rows = "".join(f"{i % 7},{i * 0.5},{i}.5\n" for i in range(20))
    found = load(dataset=_csv(tmp_path, "a,b,price\n" + rows))
    assert not found.is_classes and found.target == "price" and found.features == ("a", "b")
    named = load(dataset=_csv(tmp_path, "a,b,price\n" + rows), target="b")
    assert named.features == ("a", "price") and not named.is_classes


@pytest.mark.parametrize("before", ["", "\n\n"])
def test_a_name_in_quotes_may_have_several_lines(tmp_path, before):
    rows = "".join(f"{i % 7},{i}.5\n" for i in range(1, 20))
    found = read_table(_csv(tmp_path, f'{before}"size\nin\ncm",price\n' + rows))
    assert found.features == ("size\nin\ncm",) and len(found.x_train) == 19
    assert found.x_train[0, 0] == 1 and found.y_train[0, 0] == 1.5


BAD_CSV = {
    "empty": ("", "must start with a header line"),
    "only_a_header": ("a,b\n", "must have rows below"),
    "no_header": ("1,2\n3,4\n", "line of column names"),
    "twice": ("a,a\n1,2\n", "name each column once, got 'a' twice"),
    "one_column": ("a\n1\n2\n", "must have a column besides the target 'a'; its columns are: a"),
    "short_row": ("a,b\n1,2\n3\n", "line 3: a row must have 2 values as the header, got 1"),
    "long_row": ("a,b\n1,2\n3,4,5\n", "line 3: a row must have 2 values as the header, got 3"),
    "all_rows_long": ("a,b\n1,2,3\n4,5,6\n", "line 2: a row must have 2 values .*, got 3"),
    "short_row_of_names": ("a,b\n1,x\n2\n", "line 3: a row must have 2 values .*, got 1"),
    "short_row_before_missing_cells": (
        "a,b\n1,2\n3,\n4\n",
        "line 4: a row must have 2 values .*, got 1",
    ),
    "short_row_after_a_long_cell": (
        'a,b,c\n1,"x\ny",2\n3,4\n',
        "line 4: a row must have 3 values as the header, got 2",
    ),
    "infinity": ("a,b\n1,2\n-inf,3\n", "'a' must hold finite fp32 numbers, got -inf in row 2"),
    "too_large": (
        "a,b\n1,2\n1e300,3\n",
        r"'a' must hold finite fp32 numbers, got 1e\+300 in row 2",
    ),
    "endless_integer": (
        "a,b\n1," + "9" * 5000 + "\n2,3\n",
        "finite fp32 numbers, got (inf|9+[.]{3}) in row 1",
    ),
    "ambiguous_comma": (
        "a;b\n1,234;2\n5,678;3\n",
        "'a' must hold numbers that can be read in one way, got 1,234, which may be 1.234 or 1234",
    ),
    "open_quote": ('a,b\n1,"2\n3,4\n', "is no csv text file|values as the header"),
    "bytes": ("a,b\n\0\0", "no csv text file .it holds zero bytes"),
    "nothing_left": (
        "a,b\n" + "".join(f"{i},{i % 2}\n" for i in range(30)),
        "no column is left to predict b from: left out: a: it counts the rows",
    ),
    "all_constant": (
        "a,b\n" + "".join(f"7,{i % 2}\n" for i in range(30)),
        "no column is left to predict b from: left out, with one value in all training rows: a",
    ),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_bad_csv_is_a_clear_error(tmp_path, case):
    text, message = BAD_CSV[case]
    with pytest.raises(TrainError, match=message):
        load(dataset=_csv(tmp_path, text))


def test_an_unknown_target_column_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="--target must be a column of .*: a, b; got 'c'"):
        load(dataset=_csv(tmp_path, "a,b\n1,2\n"), target="c")


@pytest.mark.parametrize(
    "separator", [",", ";", "\t", "|"], ids=["comma", "semicolon", "tab", "bar"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_separator_and_encoding_are_read_off_the_file(tmp_path, separator, encoding, ending):
    lines = [
        ["gr\u00f6\u00dfe", '"a, b; c|"', "kind"],
        ["1", " 2.5 ", '"x;, |y"'],
        ["-3e2", "4", "z"],
    ]
    path = tmp_path / "P.CSV"
    lines += 4 * lines[1:]
    path.write_bytes("".join(separator.join(line) + ending for line in lines).encode(encoding))
    found = datasets.read(TrainConfig(dataset=str(path), target="kind", val_split=0.0))
    assert found.features == ("gr\u00f6\u00dfe", "a, b; c|") and found.classes == ("x;, |y", "z")
    assert found.x_test.tolist() == [[-300.0, 4.0], [1.0, 2.5]]
    assert found.y_test.tolist() == [1, 0] and len(found.x_train) == 8


def test_spaces_separate_where_nothing_else_does(tmp_path):
    found = read_table(_csv(tmp_path, "a kind\n1   x\n2 y\n"))
    assert found.features == ("a",) and found.classes == ("x", "y")
    found = read_table(_csv(tmp_path, "the a,kind\nup 1,x x\nup 2,y x\n"))
    assert found.features == ("the a",) and found.classes == ("x x", "y x")


def test_what_is_no_utf8_is_read_as_latin_1_and_said_so(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("a,b\n1,x\n2,\u00e9\n3,\u20ac\n".encode("cp1252"))
    found = read_table(str(path))
    assert found.classes == ("x", "\u00e9", "\u20ac")
    assert found.notes == ("a.csv is no UTF-8 and is read as latin-1 (Windows-1252)",)


def test_true_and_false_are_numbers_and_empty_lines_are_none(tmp_path):
    found = read_table(_csv(tmp_path, "a,b\n\nTrue,1.5\n\nFALSE,2.5\n\n"))
    assert found.x_train.tolist() == [[1.0], [0.0]] and found.y_train.tolist() == [[1.5], [2.5]]


def test_the_numbers_are_pandas_in_fp64(tmp_path):
    """Also of columns of which one cell makes pandas read text, as integers beyond 64 bits do."""
    table = pd.DataFrame(np.random.default_rng(0).random((200, 4)), columns=list("abcy"))
    table["a"] = 1.7e9 + np.arange(200)
    table["b"] = [10**25, *range(199)]
    file = str(tmp_path / "a.csv")
    table.to_csv(file, index=False)
    found = read_table(file, "y")
    wanted = pd.read_csv(file).astype(np.float64)
    assert np.array_equal(found.x_train, wanted[["a", "b", "c"]])
    assert np.array_equal(found.y_train, wanted[["y"]])


_MEASURE = """
import resource, sys
from fusedmlp.train.data.frame_data import read_table
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small, large = sys.argv[1:]
read_table(small)
before = peak()
found = read_table(large)
print((peak() - before) // 1024, len(found.x_train), len(found.classes))
"""


def test_a_long_cell_takes_no_more_memory_than_the_file(tmp_path):
    small, large = tmp_path / "small.csv", tmp_path / "large.csv"
    small.write_text("a,y\n1,x\n2,z\n")
    rows = [f"{i % 9},{'x' * 20_000 if i == 777 else 'z'}" for i in range(20_000)]
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
        (seconds(lambda: read_table(file)), seconds(lambda: pd.read_csv(file))) for _ in range(3)
    ]
    # The cells of the target are kept as they are written, and looked at one by one.
    assert min(ours / theirs for ours, theirs in pairs) < 4
