"""npz and csv files: what is read, and what every bad one is told."""

from __future__ import annotations

import pytest
import torch

from fusedmlp.train import TrainConfig, TrainError, UsageError, data, tables

from . import made_data

made_data.need("numpy")
import numpy as np  # noqa: E402


def load(**settings) -> data.Data:
    return data.load(TrainConfig(**settings))


def _npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_npz_classes_images_and_test_rows(tmp_path):
    x = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
    y = np.array(["cat", "dog", "cat", "eel", "dog", "eel"])
    file = _npz(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    found = load(dataset=file)
    assert found.x_train.dtype == torch.uint8 and found.image_shape == (4, 4)
    assert found.classes == ("cat", "dog", "eel")
    assert found.y_train.tolist() == [0, 1, 0, 2, 1, 2]
    assert found.scaling(found.x_train).max() < 1


def test_npz_float_target_is_regression_and_a_test_set_is_held_out(tmp_path):
    x, y = np.random.rand(50, 3), np.random.rand(50)
    found = load(dataset=_npz(tmp_path / "a.npz", x_train=x, y_train=y))
    assert not found.is_classes and found.y_train.shape == (40, 1) and len(found.x_test) == 10
    assert "held out" in found.notes[0]


_X = np.random.default_rng(0).random((6, 2))
_Y = np.array([0, 1, 0, 1, 0, 1])
BAD_NPZ = {
    "without_y": (dict(x_train=_X), "must hold x_train and y_train, got x_train"),
    "other_rows": (dict(x_train=_X, y_train=_Y[:4]), "y_train must have 6 rows"),
    "half_a_test_set": (dict(x_train=_X, y_train=_Y, x_test=_X), "x_test without y_test"),
    "nan": (dict(x_train=_X * [[1, np.nan]], y_train=_Y), r"finite fp32 .* nan at \[0, 1\]"),
    "too_large": (dict(x_train=_X * 1e300, y_train=_Y), "finite fp32"),
    "strings": (dict(x_train=_X.astype(str), y_train=_Y), "must hold numbers"),
    "one_class": (dict(x_train=_X, y_train=_Y * 0), "at least two classes"),
    "objects": (dict(x_train=np.array([{}] * 6), y_train=_Y), "Python objects"),
    "unknown_class": (
        dict(x_train=_X, y_train=_Y, x_test=_X[:1], y_test=np.array([7])),
        "classes of the training rows, got 7",
    ),
    "other_features": (
        dict(x_train=_X, y_train=_Y, x_test=_X[:, :1], y_test=_Y),
        r"rows of x_test must be \(2,\)",
    ),
    "no_rows": (dict(x_train=_X[:0], y_train=_Y[:0]), "at least one row"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_a_bad_npz_is_a_clear_error(tmp_path, case):
    arrays, message = BAD_NPZ[case]
    with pytest.raises(TrainError, match=message):
        load(dataset=_npz(tmp_path / "a.npz", **arrays))


def test_missing_truncated_and_foreign_npz_files_are_clear_errors(tmp_path):
    with pytest.raises(TrainError, match="does not exist"):
        load(dataset=str(tmp_path / "none.npz"))
    whole = tmp_path / "a.npz"
    _npz(whole, x_train=_X, y_train=_Y)
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(TrainError, match="truncated, corrupted or no .npz"):
        load(dataset=str(whole))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(TrainError):
        load(dataset=str(tmp_path / "text.npz"))


def _csv(tmp_path, text: str) -> str:
    path = tmp_path / "a.csv"
    path.write_text(text)
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
    "bytes": ("a,b\n\0\0", "must|csv"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_bad_csv_is_a_clear_error(tmp_path, case):
    text, message = BAD_CSV[case]
    with pytest.raises(TrainError, match=message):
        load(dataset=_csv(tmp_path, text))


def test_an_unknown_target_column_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="--target must be a column of .*: a, b; got 'c'"):
        load(dataset=_csv(tmp_path, "a,b\n1,2\n"), target="c")


def test_integers_without_end_are_no_classes(tmp_path):
    text = "a,n\n" + "".join(f"{i},{i * 7}\n" for i in range(2000))
    with pytest.raises(TrainError, match="2000 different integers; .*--loss mse"):
        tables.read_csv(_csv(tmp_path, text), None)
