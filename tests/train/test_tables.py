"""npz files: what is read, and what every bad one is told."""

from __future__ import annotations

import pytest
import torch

from fusedmlp.train import TrainConfig, TrainError
from fusedmlp.train.data import datasets, types

from .. import made_data

made_data.need("numpy")
import numpy as np  # noqa: E402


def load(**settings) -> types.Data:
    return datasets.load(TrainConfig(**settings))


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


def test_the_largest_number_of_fp32_is_taken(tmp_path):
    x, y = np.full((10, 2), float(np.finfo(np.float32).max)), np.arange(10) % 2
    x[::2] *= -1
    found = load(dataset=_npz(tmp_path / "a.npz", x_train=x, y_train=y), standardize=False)
    assert found.x_train.abs().eq(torch.finfo(torch.float32).max).all()


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
    "text_to_test_numbers": (
        dict(x_train=_X, y_train=_Y / 7, x_test=_X, y_test=np.array([*"ababab"])),
        "y_test must hold numbers",
    ),
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
    "one_label": (dict(x_train=_X, y_train=np.int64(3)), "6 rows to match x_train, got a single"),
    "other_labels": (
        dict(x_train=_X, y_train=_Y, x_test=_X, y_test=np.array(list("012345"))),
        "classes of the training rows, got 2 in row 2",
    ),
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
    with pytest.raises(TrainError, match="truncated, corrupted or no .npz"):
        load(dataset=str(tmp_path / "text.npz"))


def test_an_array_in_an_archives_name_is_said_to_be_one(tmp_path):
    path = tmp_path / "OK.NPZ"
    np.save(tmp_path / "a.npy", _X)
    (tmp_path / "a.npy").rename(path)
    with pytest.raises(TrainError, match=r"it is an .npy file: one array of shape \(6, 2\)"):
        load(dataset=str(path))


def test_the_case_of_a_files_name_does_not_matter(tmp_path):
    whole = _npz(tmp_path / "a.npz", x_train=_X, y_train=_Y)
    (tmp_path / "OK.NPZ").write_bytes((tmp_path / "a.npz").read_bytes())
    assert torch.equal(load(dataset=str(tmp_path / "OK.NPZ")).x_train, load(dataset=whole).x_train)


def test_labels_of_bytes_are_their_text(tmp_path):
    y = np.array([b"j", b"k", b"j", b"k", b"j", "\u00fc".encode()])
    found = load(dataset=_npz(tmp_path / "a.npz", x_train=_X, y_train=y, x_test=_X, y_test=y))
    assert found.classes == ("j", "k", "\u00fc") and found.y_test.tolist() == [0, 1, 0, 1, 0, 2]


def test_labels_larger_than_int64_are_classes(tmp_path):
    y = np.array([2**64 - 1, 10**19, 7] * 2, dtype=np.uint64)
    file = _npz(tmp_path / "a.npz", x_train=_X, y_train=y, x_test=_X, y_test=y)
    found = load(dataset=file)
    assert found.classes == ("7", str(10**19), str(2**64 - 1))
    assert found.y_test.tolist() == [2, 1, 0, 2, 1, 0]


def test_integers_without_end_are_a_number_to_predict(tmp_path):
    x, y = np.random.rand(2000, 2), np.arange(2000) * 7
    file = _npz(tmp_path / "a.npz", x_train=x, y_train=y)
    found = load(dataset=file, standardize=False)
    assert not found.is_classes and set(found.y_train.flatten().tolist()) <= set(y.tolist())
    assert "2000 different integers and is predicted as a number" in found.notes[0]
    with pytest.raises(TrainError, match="2000 different integers, more than 1000 classes"):
        load(dataset=file, loss="cross_entropy")
    few = _npz(tmp_path / "b.npz", x_train=x, y_train=y % 300)
    found = load(dataset=few)
    assert len(found.classes) == 300 and "taken for classes; --loss mse" in found.notes[0]
