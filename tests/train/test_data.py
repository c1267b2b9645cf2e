"""Image sets and splits: which files are found, what damaged ones are told, what is held out."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace

import pytest
import torch

from fusedmlp.train import TrainConfig, TrainError
from fusedmlp.train.data import datasets, images, types

from .. import made_data

made_data.need("numpy")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    """No test downloads, and no data set of this machine is found by accident."""
    monkeypatch.setattr(images, "download", lambda *_: "no network in tests")
    monkeypatch.setattr(images, "DEBIAN_FOLDER", tmp_path / "debian")
    fashion = images.IMAGE_SETS["fashion_mnist"]
    monkeypatch.setitem(
        images.IMAGE_SETS,
        "fashion_mnist",
        replace(fashion, system_folders=(tmp_path / "debian",)),
    )
    monkeypatch.setenv("FUSEDMLP_DATA", str(tmp_path / "cache"))


def load(**settings) -> types.Data:
    return datasets.load(TrainConfig(**settings))


# image sets


@pytest.mark.parametrize("compress", [True, False], ids=["gz", "unpacked"])
@pytest.mark.parametrize("place", ["FashionMNIST/raw", "FashionMNIST", "raw", "."])
def test_image_files_are_found_in_torchvision_roots_and_plain_folders(tmp_path, place, compress):
    parts = made_data.idx_parts()
    made_data.write_idx(tmp_path / place, parts, compress)
    found = load(dataset="fashion_mnist", data_dir=tmp_path)
    assert found.x_train.dtype == torch.uint8 and found.image_shape == (28, 28)
    assert torch.equal(found.x_train.view(-1, 28, 28), parts["train-images-idx3-ubyte"].byte())
    assert torch.equal(found.y_test, parts["t10k-labels-idx1-ubyte"])
    assert found.classes[9] == "Ankle boot"


def test_the_debian_package_and_the_environment_are_looked_into(tmp_path, monkeypatch):
    made_data.write_idx(tmp_path / "debian")
    assert load(dataset="auto").name == "fashion_mnist"
    made_data.write_idx(tmp_path / "cache" / "MNIST" / "raw")
    assert load(dataset="mnist").name == "mnist"


def test_a_read_only_folder_serves(tmp_path):
    folder = made_data.write_idx(tmp_path / "ro" / "FashionMNIST" / "raw")
    folder.chmod(0o555)
    try:
        assert load(dataset="fashion_mnist", data_dir=tmp_path / "ro").name == "fashion_mnist"
    finally:
        folder.chmod(0o755)


def test_auto_without_files_or_network_takes_the_digits_and_says_so():
    pytest.importorskip("sklearn", reason="needs scikit-learn of the train extra")
    found = load(dataset="auto")
    assert found.name == "digits"
    assert len(found.notes) == 1 and "\n" not in found.notes[0]
    for said in ("no network in tests", "--data-dir", "FUSEDMLP_DATA", "dataset-fashion-mnist"):
        assert said in found.notes[0]


def test_a_set_asked_for_by_name_is_not_replaced_by_another(tmp_path):
    with pytest.raises(TrainError, match="MNIST is not in .* could not be fetched"):
        load(dataset="mnist", data_dir=tmp_path)


_IMAGES, _LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def _damaged(name, content) -> dict:
    return made_data.idx_parts() | {name: content}


_PARTS = made_data.idx_parts()
DAMAGE = {
    "header_of_labels": (
        _damaged(_IMAGES, made_data.idx_bytes(_PARTS[_IMAGES], magic=0x801)),
        "magic number 2051.*got magic number 2049",
    ),
    "header_says_more": (
        _damaged(_IMAGES, made_data.idx_bytes(_PARTS[_IMAGES], sizes=[41, 28, 28])),
        "header says 41x28x28 = 32144 values, but it holds 31360",
    ),
    "header_says_less": (
        _damaged(_LABELS, made_data.idx_bytes(_PARTS[_LABELS], sizes=[39])),
        "header says 39 = 39 values, but it holds 40",
    ),
    "header_says_gigabytes": (
        _damaged(_IMAGES, made_data.idx_bytes(_PARTS[_IMAGES], sizes=[2**31, 28, 28])),
        "header says 2147483648x28x28",
    ),
    "only_half_a_header": (_damaged(_LABELS, b"\0\0\x08"), "truncated: an IDX header has 8"),
    "empty": (_damaged(_LABELS, b""), "truncated"),
    "no_idx_file": (_damaged(_IMAGES, b"<html>not found</html>"), "magic number"),
    "label_11": (
        _damaged(_LABELS, made_data.idx_bytes(torch.full((40,), 11))),
        "labels must be 0 to 9, got 11",
    ),
    "fewer_labels": (
        _damaged(_LABELS, made_data.idx_bytes(_PARTS[_LABELS][:30])),
        "holds 40 images, but .* holds 30 labels",
    ),
    "no_rows": (
        _damaged(_IMAGES, made_data.idx_bytes(torch.empty(0, 28, 28)))
        | {_LABELS: made_data.idx_bytes(torch.empty(0))},
        "holds no images",
    ),
    "other_image_size": (
        _damaged("t10k-images-idx3-ubyte", made_data.idx_bytes(torch.zeros(20, 27, 28))),
        "images of 28x28, but .* of 27x28",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_image_file_is_named_with_what_is_wrong(tmp_path, case):
    parts, message = DAMAGE[case]
    made_data.write_idx(tmp_path, parts)
    with pytest.raises(TrainError, match=message):
        load(dataset="fashion_mnist", data_dir=tmp_path)


@pytest.mark.parametrize("cut", [5, 200, -4], ids=["in_the_header", "in_the_data", "in_the_crc"])
def test_a_truncated_gz_is_a_clear_error(tmp_path, cut):
    made_data.write_idx(tmp_path)
    path = tmp_path / f"{_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(TrainError, match=f"{_IMAGES}.gz is truncated or corrupted .*get it again"):
        load(dataset="auto", data_dir=tmp_path)


def test_a_flipped_byte_in_a_gz_is_a_clear_error(tmp_path):
    made_data.write_idx(tmp_path)
    path = tmp_path / f"{_IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(TrainError, match="truncated or corrupted"):
        load(dataset="auto", data_dir=tmp_path)


def test_a_missing_file_of_four_is_named(tmp_path):
    made_data.write_idx(tmp_path)
    (tmp_path / f"{_LABELS}.gz").unlink()
    with pytest.raises(TrainError, match=f"not complete: {_LABELS} .*is missing"):
        load(dataset="fashion_mnist", data_dir=tmp_path)


def test_files_of_another_set_are_refused_and_unknown_ones_noted(tmp_path, monkeypatch):
    import hashlib

    folder = made_data.write_idx(tmp_path)
    digest = hashlib.md5((folder / f"{_LABELS}.gz").read_bytes()).hexdigest()
    assert "not Fashion-MNIST's official file" in load(dataset="auto", data_dir=tmp_path).notes[0]
    foreign = replace(images.IMAGE_SETS["kmnist"], md5=(digest,))
    monkeypatch.setitem(images.IMAGE_SETS, "kmnist", foreign)
    with pytest.raises(
        TrainError, match="must belong to Fashion-MNIST, but it is a file of KMNIST"
    ):
        load(dataset="fashion_mnist", data_dir=tmp_path)


def test_a_torchvision_that_fails_to_import_does_not_matter_for_files_on_disk(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    made_data.write_idx(tmp_path)
    assert load(dataset="fashion_mnist", data_dir=tmp_path).name == "fashion_mnist"


def test_the_real_fashion_mnist_is_recognised():
    found = load(dataset="fashion_mnist", data_dir=made_data.fashion_folder())
    assert found.x_train.shape == (60_000, 784) and found.x_test.shape == (10_000, 784)
    assert found.notes == ()
    assert torch.bincount(found.y_train).tolist() == [6000] * 10


# splits and scaling


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_a_split_is_stratified_disjoint_complete_and_fixed(share):
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate((500, 60, 40))])
    kept, held = types.hold_out(600, share, labels)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(600))
    for label, count in enumerate((500, 60, 40)):
        assert abs(int((labels[held] == label).sum()) - share * count) <= 1
    assert torch.equal(held, types.hold_out(600, share, labels)[1])


def test_a_validation_set_is_taken_from_the_training_rows():
    made_data.need("sklearn")
    whole, split = load(dataset="digits"), load(dataset="digits", val_split=0.25)
    assert len(split.x_train) + len(split.x_val) == len(whole.x_train)
    assert torch.equal(split.x_test, whole.x_test)


def test_a_split_that_leaves_nothing_is_a_clear_error():
    with pytest.raises(TrainError, match="leaves no rows on one side"):
        types.hold_out(3, 0.01)


def test_standardized_inputs_have_mean_0_and_deviation_1():
    for made in (made_data.blobs(), made_data.pictures()):
        scaled = types.standardized(made)
        inputs = scaled.scaling(scaled.x_train)
        by = None if made.image_shape else 0
        mean = inputs.mean() if by is None else inputs.mean(by)
        std = inputs.std(correction=0) if by is None else inputs.std(by, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
        torch.testing.assert_close(std, torch.ones_like(std))


def test_tables_are_scaled_as_standardscaler_does_in_fp64():
    """Time stamps keep their distinct values, and what rounding leaves of a constant stays 0."""
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 5, generator=generator, dtype=torch.float64)
    x[:, 0] = 1.7e9 + torch.arange(160).double()
    x[:, 1] = 0.1
    x[:, 2] *= 1e-12
    x[:, 3] = 1e6 - x[:, 3]
    y = (3e7 + torch.arange(160).double() / 7).reshape(-1, 1)
    made = types.Data("table", x[:120], y[:120], x[120:], y[120:])
    found = types.standardized(made)
    for part, given in (("x", x), ("y", y)):
        wanted = torch.from_numpy(StandardScaler().fit(given[:120]).transform(given))
        both = torch.cat([getattr(found, f"{part}_train"), getattr(found, f"{part}_test")])
        torch.testing.assert_close(both, wanted, rtol=1e-9, atol=1e-9)
    narrow = types.prepared(made, True)
    assert narrow.x_train.dtype == narrow.y_train.dtype == torch.float32
    assert len(narrow.x_train[:, 0].unique()) == 120
    torch.testing.assert_close(
        narrow.target_scaling.undo(narrow.y_test), y[120:], rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32])
def test_rows_of_any_type_are_scaled_in_fp64(dtype):
    x = (1_000_000 + torch.arange(300).reshape(100, 3)).to(dtype)
    found = types.standardized(types.Data("rows", x, torch.arange(100) % 2, classes=("a", "b")))
    wide = x.double()
    wanted = (wide - wide.mean(0)) / wide.std(0, correction=0)
    torch.testing.assert_close(found.scaling(found.x_train).double(), wanted, atol=1e-6, rtol=0)


def test_scaling_survives_its_way_through_json():
    for made in (made_data.blobs(), made_data.pictures()):
        found = types.standardized(made)
        listed = json.loads(json.dumps(found.describe()))
        again = types.Scaling.from_dict(listed["scaling"])
        assert torch.equal(again(made.x_train), found.scaling(found.x_train))
        assert listed["digest"] == made.digest()


def test_pixels_are_scaled_as_torchvision_does():
    rows = torch.arange(256, dtype=torch.uint8).view(1, 256)
    assert torch.equal(types.Scaling(255.0)(rows), rows.float().div(255))


def test_orders_of_epochs_and_seeds_differ_and_repeat():
    orders = [types.permutation(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert torch.equal(orders[4], types.permutation(1, 1, 100))
    assert torch.equal(orders[0].sort().values, torch.arange(100))


def test_gz_reading_needs_no_second_copy_of_the_file(tmp_path):
    """The tensor is a view of the bytes that were read."""
    content = bytearray(gzip.decompress(gzip.compress(made_data.idx_bytes(_PARTS[_IMAGES]))))
    rows = images.parse(content, tmp_path / "x", "train images", 3)
    content[16] ^= 1
    assert rows[0, 0, 0] == content[16]
