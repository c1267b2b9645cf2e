"""Files that fuzzing found: each is one message that names the file, and none is an error of a
library."""

import io
import json
import zipfile
from types import SimpleNamespace

import pytest

from fusedmlp.train import TrainConfig, TrainError, inference
from fusedmlp.train.data import datasets

from .. import made_data

made_data.need(*made_data.TRAIN_EXTRA, "pandas", "sklearn", "rich")


def load(path):
    return datasets.load(TrainConfig(dataset=str(path)))


def npy(array) -> bytes:
    import numpy as np

    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npz(path, x: bytes, y: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", x)
        archive.writestr("y_train.npy", y)
    return path


def test_a_header_of_an_array_that_ends_early(tmp_path):
    import numpy as np

    good = npy(np.ones((6, 2)))
    bad = good.replace(b"(6, 2), }", b"(6, 2    ")
    assert bad != good
    with pytest.raises(TrainError, match=r"a\.npz is truncated, corrupted or no \.npz file \("):
        load(npz(tmp_path / "a.npz", bad, npy(np.arange(6) % 2)))


def test_a_member_that_is_no_array(tmp_path):
    import numpy as np

    with pytest.raises(TrainError, match=r"a\.npz: y_train must be an array of NumPy's, got other"):
        load(npz(tmp_path / "a.npz", npy(np.ones((6, 2))), b"not an array"))


def test_text_with_numbers_that_are_no_characters(tmp_path):
    import numpy as np

    bad = npy(np.array(["a", "b"] * 3)).replace(b"b\0\0\0", b"b\0\xff\0")
    with pytest.raises(TrainError, match=r"a\.npz: y_train must hold text, got numbers that are"):
        load(npz(tmp_path / "a.npz", npy(np.ones((6, 2))), bad))


def test_a_parquet_file_whose_words_are_no_text(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    ends, words = pa.py_buffer(bytes(n for i in range(7) for n in (i, 0, 0, 0))), b"ab\xffabc"
    column = pa.Array.from_buffers(pa.string(), 6, [None, ends, pa.py_buffer(words)])
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"a": column, "y": list("xyxyxy")}), path)
    with pytest.raises(TrainError, match=r"a\.parquet is truncated, corrupted or no Parquet file"):
        load(path)


def test_a_picture_that_claims_to_be_huge(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    image.new("1", (10_000, 10_000)).save(path)
    assert path.stat().st_size < 50_000
    about = {"data": {"name": "images", "scaling": {"divisor": 255.0}}}
    run = SimpleNamespace(image_shape=(8, 8), about=about, folder=tmp_path)
    with pytest.raises(TrainError, match=r"a\.png is truncated, corrupted or no image \(.*pixels"):
        inference.read_images(run, [path])


def test_a_table_of_two_rows_names_its_file(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,x\n2,y\n")
    with pytest.raises(TrainError, match=r"a\.csv: a share of 0\.2 of 2 rows leaves no rows"):
        load(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"momentum": "a"}, "momentum must be a number, got str"),
        ({"init": 2**70}, "--init must be one of"),
        ({"hidden": 3}, "not iterable"),
        (None, "it holds a NoneType"),
    ],
)
def test_a_config_with_a_wrong_setting_names_its_file(tmp_path, setting, message):
    config = TrainConfig(dataset="synthetic").to_dict()
    text = json.dumps(setting and config | setting)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TrainError, match=r"config\.json is truncated, corrupted or no config") as e:
        inference.load(tmp_path)
    assert message in str(e.value)


@pytest.mark.parametrize("last", ["1,2,3,4,5,6,7,8,9,10", "inf,1", "nan,1"])
def test_metrics_with_a_damaged_last_line_name_their_file(tmp_path, last):
    from fusedmlp.train import compare

    config = TrainConfig(dataset="synthetic").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.csv").write_text(f"epoch,train_loss\n1,0.5\n{last}\n")
    with pytest.raises(TrainError, match=r"metrics\.csv is truncated, corrupted or no metrics"):
        compare.table([tmp_path])


@pytest.mark.parametrize(("name", "value"), [("test_accuracy", "high"), ("train_seconds", [1])])
def test_a_summary_whose_figures_are_none_names_its_file(tmp_path, name, value):
    from fusedmlp.train import compare

    config = TrainConfig(dataset="synthetic").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "summary.json").write_text(json.dumps({"epochs": 1, name: value}))
    with pytest.raises(TrainError, match=rf"summary\.json is .*\({name} must be a number, got"):
        compare.table([tmp_path])


DAMAGED = {
    "no_scaling": (lambda about: about["data"].pop("target_scaling"), "KeyError: 'target_scaling'"),
    "classes": (lambda about: about["data"].update(classes=["a"]), "classes must be 3 names"),
    "image": (lambda about: about["data"].update(image_shape=[2, 3]), "two sizes of 4 pixels"),
    "name": (lambda about: about["data"].update(name=None), "name must be a word, got None"),
    "no_model": (lambda about: about.update(model=3), "AttributeError"),
    "huge": (lambda about: about["model"].update(dims=[4, 10**9, 3]), "must be (1000000000, 4)"),
    "activation": (lambda about: about["model"].update(activation="a"), "a"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_a_model_says_of_itself_is_checked(tmp_path, case):
    import fusedmlp
    from fusedmlp.train import run_folder

    change, message = DAMAGED[case]
    model = fusedmlp.FusedMLP(4, [5], 3)
    data = {"name": "made", "classes": ["a", "b", "c"], "image_shape": None, "preparation": None}
    data |= {"scaling": {"divisor": 1.0}, "target_scaling": None}
    shape = {"kind": "FusedMLP", "dims": [4, 5, 3], "activation": "relu", "dropout": [0.0]}
    about = {"model": shape, "data": data}
    (tmp_path / "config.json").write_text(json.dumps(TrainConfig(dataset="synthetic").to_dict()))
    (tmp_path / "model.safetensors").write_bytes(run_folder.model_bytes(model, about))
    assert inference.load(tmp_path).classes == ["a", "b", "c"]
    change(about)
    (tmp_path / "model.safetensors").write_bytes(run_folder.model_bytes(model, about))
    with pytest.raises(TrainError) as error:
        inference.load(tmp_path)
    assert str(tmp_path) in str(error.value) and message in str(error.value)


def test_a_parquet_file_without_rows(tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pd.DataFrame({"a": [1.0], "y": ["x"]})[:0].to_parquet(tmp_path / "a.parquet")
    with pytest.raises(TrainError, match=r"a\.parquet must have rows, got none"):
        load(tmp_path / "a.parquet")
