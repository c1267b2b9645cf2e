"""Tables of words and missing cells from the command line and from Python: train, predict and
evaluate. test_bad_tables.py has what is wrong with a table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import fusedmlp
from fusedmlp.train import (
    RunOptions,
    TrainConfig,
    TrainError,
    crossval,
    fit,
    inference,
    load,
    load_data,
    run,
    table_files,
)

from .. import made_data

made_data.need(*made_data.TRAIN_EXTRA, "pandas", "sklearn")
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


frame, command = made_data.mixed_table, made_data.command
CLASSES = ("--target", "kind", "--leave-out", "price", "weight", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with table.csv and the runs `classes` and `number`."""
    folder = tmp_path_factory.mktemp("runs")
    file = folder / "table.csv"
    frame().to_csv(file, index=False)
    of_price = ("--target", "price", "--leave-out", "kind", "weight", "--device", "cpu")
    assert command("train", "--dataset", file, *CLASSES, "--out", folder / "classes") == 0
    assert command("train", "--dataset", file, *of_price, "--out", folder / "number") == 0
    return folder


def test_a_table_is_trained_without_a_flag_but_its_target(trained, capsys):
    summary = json.loads((trained / "classes" / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.85 and summary["engine"] == "native"
    assert json.loads((trained / "number" / "summary.json").read_text())["test_r2"] > 0.7
    file = trained / "table.csv"
    assert command("train", "--dataset", file, *CLASSES, "--epochs", 1, "--out", "again") == 0
    said = capsys.readouterr().out
    assert "left out: id: it counts the rows; name: it has nearly as many words as rows" in said
    assert "left out, with one value in all training rows: same" in said


def test_predictions_are_written_for_every_row_in_order(trained, capsys):
    new = frame(200, seed=1)
    # Other order, without the target, with words and columns that training did not have.
    new = new[["day", "new", "colour", "size"]].assign(more=1)
    new.loc[3, "colour"] = "violet"
    new.to_csv("new.csv", index=False, sep=";")
    assert command("predict", trained / "classes", "new.csv", "--out", "p.csv", "--proba") == 0
    said = capsys.readouterr()
    assert said.out == "p.csv: 200 rows predicted\n"
    assert "note: new.csv: columns that training did not have: more" in said.err
    assert "note: new.csv: column 'colour' has words unknown to training in 1 rows" in said.err
    found = pd.read_csv("p.csv")
    assert list(found) == ["prediction", "probability_cheap", "probability_dear"]
    assert len(found) == 200
    np.testing.assert_allclose(found.iloc[:, 1:].sum(axis=1), 1, atol=1e-9)
    best = np.where(found.probability_dear > 0.5, "dear", "cheap")
    assert (found.prediction == best).all()
    assert (found.prediction == frame(200, seed=1).kind).mean() > 0.8
    of_frame = load(trained / "classes").predict(new.set_index("size", drop=False), proba=True)
    assert of_frame.index.equals(pd.Index(new["size"]))
    pd.testing.assert_frame_equal(of_frame.reset_index(drop=True), found)


def test_numbers_are_predicted_in_the_targets_own_units(trained, capsys):
    new = frame(300, seed=2)
    new.to_csv("new.csv", index=False)
    assert command("predict", trained / "number", "new.csv") == 0
    lines = capsys.readouterr().out.split()
    assert lines[0] == "prediction"
    found = np.array(lines[1:], dtype=float)
    share = 1 - ((found - new.price) ** 2).sum() / ((new.price - new.price.mean()) ** 2).sum()
    assert share > 0.7
    assert command("evaluate", trained / "number", "new.csv") == 0
    said = capsys.readouterr().out
    assert "new.csv: 300 test rows" in said and f"R2 {share:.4f}" in said
    rmse = math.sqrt(((found - new.price) ** 2).mean())
    assert f"RMSE {rmse:.6g}," in said


def test_evaluate_of_the_test_rows_and_of_their_file_are_one(trained, capsys):
    for name in ("classes", "number"):
        run_folder = load(trained / name)
        data = inference.test_data(run_folder)
        wanted = inference.evaluate(run_folder, data)
        summary = json.loads((trained / name / "summary.json").read_text())
        assert wanted["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
        # The rows that were held out, found by a column that numbers them.
        whole = pd.read_csv(trained / "table.csv")
        held = load_data(run_folder.config.replace(val_split=0.0)).x_test
        raw = data.x_test[:, 0]
        rows = [int((whole["size"] - float(v)).abs().argmin()) for v in raw if not math.isnan(v)]
        assert len(held) == 80 and len(set(rows)) == len(rows) > 60
        whole.iloc[rows].to_csv("held.csv", index=False)
        found = table_files.evaluate_file(run_folder, Path("held.csv"), print)
        mine = run_folder.predict(whole.iloc[rows])["prediction"]
        if name == "classes":
            assert found["test_accuracy"] == (mine == whole.iloc[rows]["kind"]).mean()
            right, of = zip(*found["per_class"].values(), strict=True)
            assert sum(of) == len(rows) and sum(right) / sum(of) == found["test_accuracy"]
        else:
            errors = (mine - whole.iloc[rows]["price"]) ** 2
            assert found["test_rmse"] == pytest.approx(math.sqrt(errors.mean()), rel=1e-6)


def test_blocks_of_rows_give_what_the_whole_gives(trained, monkeypatch, capsys):
    new = frame(300, seed=3)
    new.to_csv("new.csv", index=False)
    assert command("predict", trained / "classes", "new.csv", "--out", "whole.csv") == 0
    whole = table_files.evaluate_file(load(trained / "number"), Path("new.csv"), print)
    for module in (table_files, inference):
        monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    assert command("predict", trained / "classes", "new.csv", "--out", "parts.csv") == 0
    assert open("whole.csv").read() == open("parts.csv").read()
    parts = table_files.evaluate_file(load(trained / "number"), Path("new.csv"), print)
    for name in ("rows", "test_loss", "test_rmse", "test_r2"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-6)
    found = load(trained / "number").predict(new)
    assert len(found) == 300 and found.index.equals(new.index)
    new.loc[200, "size"] = math.inf
    new.to_csv("new.csv", index=False)
    assert command("predict", trained / "classes", "new.csv", "--out", "bad.csv") == 1
    said = capsys.readouterr().err
    assert "new.csv, counted from row 197: column 'size' must hold finite" in said
    assert "got inf in row 5" in said
    assert not Path("bad.csv").exists() and not list(Path().glob(".bad.csv-*"))


def test_a_frame_is_trained_as_its_file_is(trained):
    config = TrainConfig(target="kind", leave_out=("price", "weight"), device="cpu", epochs=20)
    of_frame = run(config, RunOptions(out="f"), data=frame())
    of_file = run(config.replace(dataset=str(trained / "table.csv")), RunOptions(out="g"))
    assert of_frame.summary["test_loss"] == of_file.summary["test_loss"]
    data = load_data(config, frame())
    torch.manual_seed(0)
    net = fusedmlp.FusedMLP(data.in_features, [16], data.out_features)
    fit(net, data, config)
    again = fit(net, frame(), config, RunOptions(out="own"))
    assert again.history[-1]["test_accuracy"] > 0.6
    assert list(load("own").predict(frame(5))) == ["prediction"]
    with pytest.raises(TrainError, match="was trained on data of its caller's"):
        inference.test_data(load("f"))
    with pytest.raises(TrainError, match="the model cannot take rows of the data"):
        fit(fusedmlp.FusedMLP(3, [16], 2), frame(), config)


def test_a_cross_validation_fits_each_fold_and_its_run_predicts(trained, capsys):
    config = TrainConfig(target="kind", leave_out=("price", "weight"), device="cpu", epochs=60)
    found = crossval(config, {"hidden": [8, 16]}, RunOptions(out="cv"), folds=3, data=frame())
    assert found.best.mean("val") < 0.25 and found.test.error < 0.25
    predicted = load("cv").predict(frame(200, seed=1))["prediction"]
    assert (predicted == frame(200, seed=1).kind).mean() > 0.8


def test_parquet_is_read_as_csv_is(trained):
    pytest.importorskip("pyarrow")
    frame().to_parquet("t.parquet")
    run_folder = load(trained / "classes")
    new = frame(50, seed=5)
    new.to_parquet("new.parquet")
    assert command("predict", trained / "classes", "new.parquet", "--out", "p.csv") == 0
    assert (pd.read_csv("p.csv").prediction == run_folder.predict(new).prediction).all()
    data = load_data(TrainConfig(dataset="t.parquet", target="kind"))
    assert torch.equal(data.x_train, load_data(TrainConfig(target="kind"), frame()).x_train)
    Path("cut.parquet").write_bytes(Path("t.parquet").read_bytes()[:-9])
    with pytest.raises(TrainError, match="cut.parquet is truncated, corrupted or no Parquet"):
        load_data(TrainConfig(dataset="cut.parquet"))


def test_a_run_folder_of_a_table_holds_no_pickle_and_damage_is_named(trained):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = trained / "classes" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["fusedmlp"])
        weights = {name: file.get_tensor(name) for name in file.keys()}
    columns = [part["column"]["name"] for part in about["data"]["preparation"]["parts"]]
    assert columns == ["size", "colour", "new", "day"]

    def damaged(change) -> str:
        folder = Path("damaged")
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes((trained / "classes" / "config.json").read_bytes())
        bad = json.loads(json.dumps(about))
        change(bad["data"]["preparation"])
        save_file(weights, folder / "model.safetensors", {"fusedmlp": json.dumps(bad)})
        with pytest.raises(TrainError) as error:
            load(folder)
        return str(error.value)

    assert "must be finite" in damaged(lambda p: p["parts"][0].update(center=[None]))
    assert "belongs to another network: it makes" in damaged(lambda p: p["parts"].pop())
    assert "belongs to another network" in damaged(lambda p: p["target"].update(levels=["a", "b"]))


def test_a_run_that_was_stopped_predicts_from_its_checkpoint(trained, capsys):
    file = trained / "table.csv"
    flags = ("--dataset", file, *CLASSES, "--preset", "plain")
    assert command("train", *flags, "--epochs", 2, "--out", "r") == 0
    (Path("r") / "model.safetensors").unlink()
    assert len(load("r").predict(frame(5))) == 5
    assert command("train", "--resume", "r", "--epochs", 3) == 0
    assert command("train", "--resume", trained / "classes") == 1
    assert "classes holds an ensemble, which has no checkpoint" in capsys.readouterr().err


def test_a_frame_of_another_library_becomes_one_of_pandas():
    class Other:
        columns = ["size", "kind"]

        def to_pandas(self):
            return pd.DataFrame({"size": [1.0, 2.0] * 20, "kind": ["a", "b"] * 20})

    data = load_data(TrainConfig(target="kind"), Other())
    assert data.classes == ("a", "b") and len(data.x_train) + len(data.x_val) == 32


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_every_class_has_training_rows_where_the_test_rows_are_held_out(rows):
    kind = ["x", "y"] * 30 + [f"rare {i // rows}" for i in range(12)]
    data = load_data(TrainConfig(target="kind"), pd.DataFrame({"a": [1, 2, 3] * 24, "kind": kind}))
    assert len(data.y_train.unique()) == len(data.classes) == 2 + 12 // rows


def test_a_column_of_weights_is_no_feature_and_weighs_the_rows(capsys):
    rows = 600
    random = np.random.default_rng(0)
    size = random.normal(size=rows)
    # Half of the rows are wrong, and weigh nothing.
    wrong = np.arange(rows) % 2 == 1
    kind = np.where((size > 0) ^ wrong, "large", "small")
    found = pd.DataFrame({"size": size, "weight": np.where(wrong, 0, 2), "kind": kind})
    found.to_csv("t.csv", index=False)
    flags = ("--dataset", "t.csv", "--weight-column", "weight", "--device", "cpu")
    assert command("train", *flags, "--epochs", 20, "--out", "run") == 0
    assert "passed over" not in capsys.readouterr().out
    about = load("run").about["data"]
    assert about["features"] == ["size"]
    new = pd.DataFrame({"size": [-1.0, 1.0]})
    assert list(load("run").predict(new).prediction) == ["small", "large"]
    config = TrainConfig(dataset="t.csv", weight_column="weight", val_split=0.25)
    data = load_data(config)
    assert len(data.weights) == len(data.x_train) == 360
    # The weights stay with their rows.
    center = data.preparation.parts[0].center[0]
    scale = data.preparation.parts[0].scale[0]
    is_large = data.x_train[:, 0].numpy() > -center * scale
    is_wrong = is_large ^ (data.y_train.numpy() == data.classes.index("large"))
    z = np.abs(data.x_train[:, 0].numpy() + center * scale) > 0.01
    assert (is_wrong == (data.weights.numpy() == 0))[z].all()


def test_cells_that_are_empty_for_the_first_time_are_told(trained, capsys):
    """A column that was never empty in training has no input that says so: the median stands in."""
    new = frame(30)
    new["day"] = [None] * 4 + list(new["day"][4:])
    new["size"] = None  # has been missing in training
    new.to_csv("new.csv", index=False)
    assert command("predict", trained / "number", "new.csv", "--out", "p.csv") == 0
    said = capsys.readouterr().err.splitlines()
    assert said == ["note: new.csv: column 'day' is empty in 4 rows, never so in training"]
