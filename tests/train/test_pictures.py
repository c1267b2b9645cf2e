"""What is told of a table's network at the end of its run: importance of the columns, and the
pictures of classes and of numbers."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import pytest
import torch

from fusedmlp.train import RunOptions, TrainConfig, fit, importance, load, load_data, plots, run

from .. import made_data

made_data.need(*made_data.TRAIN_EXTRA, "pandas", "sklearn")
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

OF_CLASSES = {"predictions.png", "confusion.png", "roc.png", "reliability.png"}
OF_NUMBERS = {"predictions.png", "residuals.png"}
OF_COLUMNS = {"importance.csv", "importance.png"}
KINDS = {
    "classes": ("kind", ("price", "weight"), OF_CLASSES),
    "numbers": ("price", ("kind", "weight"), OF_NUMBERS),
}


@pytest.fixture(scope="module", params=KINDS)
def done(request, tmp_path_factory):
    """(kind, the result of its run)."""
    target, leave_out, _ = KINDS[request.param]
    config = TrainConfig(target=target, leave_out=leave_out, device="cpu", epochs=60)
    folder = tmp_path_factory.mktemp("run") / request.param
    return request.param, run(config, RunOptions(out=folder), data=made_data.mixed_table())


def rows_of(path) -> dict[str, dict[str, float]]:
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return {row.pop("column"): {k: float(v) for k, v in row.items()} for row in rows}


def test_a_run_on_a_table_leaves_its_pictures(done):
    kind, result = done
    made = {name for name in result.paths if name.endswith("png") or name.startswith("imp")}
    assert made == {"curves.png"} | KINDS[kind][2] | OF_COLUMNS
    for name in made - {"importance.csv"}:
        assert result.paths[name].read_bytes().startswith(b"\x89PNG")


def test_importance_is_that_of_the_tables_own_columns(done):
    """Price is 3 size + 10 red + 5 new, and the day has nothing to do with it."""
    kind, result = done
    found = rows_of(result.paths["importance.csv"])
    assert set(found) == {"size", "colour", "new", "day"}
    measure = {"classes": "log_loss_rise", "numbers": "r2_fall"}[kind]
    means = [row[measure] for row in found.values()]
    assert means == sorted(means, reverse=True)
    assert next(iter(found)) == "size"
    assert found["size"][measure] > 5 * abs(found["day"][measure])


def test_importance_is_what_shuffling_a_column_of_the_table_costs(done):
    """As somebody would find it by hand, with the network's own predictions of changed tables."""
    kind, result = done
    target = KINDS[kind][0]
    table, trained = made_data.mixed_table(2000, seed=5), load(result.folder)

    def score(frame) -> float:
        predicted = trained.predict(frame)["prediction"]
        if kind == "classes":
            return (predicted == table[target]).mean()
        return -math.sqrt(((predicted - table[target]) ** 2).mean())

    random = np.random.default_rng(0)
    found = rows_of(result.paths["importance.csv"])
    measure = {"classes": "accuracy_fall", "numbers": "rmse_rise"}[kind]
    whole, size = score(table), found["size"][measure]
    for name in ("size", "colour", "day"):
        changed = table.assign(**{name: random.permutation(table[name])})
        assert found[name][measure] == pytest.approx(whole - score(changed), abs=0.3 * size)


def test_importance_of_many_columns_takes_fewer_shuffles_and_rows(monkeypatch):
    x = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
    y = (x[:, :1] > 0).long().flatten()
    data = replace(
        made_data.blobs(), x_test=x, y_test=y, classes=("no", "yes"), is_table=True, features=None
    )
    sizes = []

    def predict(rows):
        sizes.append(len(rows))
        return torch.stack([-3 * rows[:, 0], 3 * rows[:, 0]], 1)

    before = x.clone()
    found = importance.importance(data, predict)
    assert sizes == [400] * (1 + 12 * importance.REPEATS) and torch.equal(x, before)
    assert found.columns[0] == "column 1"
    falls = found.worse["accuracy fall"].mean(1)
    assert 0.4 < falls[0] < 0.6 and not falls[1:].any()
    sizes.clear()
    monkeypatch.setattr(importance, "MOST_SHUFFLES", 24)
    monkeypatch.setattr(importance, "MOST_OUTPUTS", 2400)
    importance.importance(data, predict)
    assert sizes == [100] * (1 + 12 * 2)
    monkeypatch.setattr(plots, "MOST_COLUMNS", 11)
    assert not OF_COLUMNS & plots.run_pictures([], data, predict).keys()


def test_a_run_without_test_rows_is_told_of_by_its_validation_rows(tmp_path):
    table = made_data.mixed_table()
    config = TrainConfig(target="price", leave_out=("kind", "weight"), val_split=0.2, epochs=2)
    data = load_data(config, table)
    data = replace(data, x_test=None, y_test=None)
    import fusedmlp

    net = fusedmlp.FusedMLP(data.in_features, [8], data.out_features)
    result = fit(net, data, config.replace(val_split=0.0), RunOptions(out=tmp_path / "val"))
    assert OF_NUMBERS | OF_COLUMNS <= result.paths.keys()
    data = replace(data, x_val=None, y_val=None)
    result = fit(net, data, config.replace(val_split=0.0), RunOptions(out=tmp_path / "none"))
    assert [name for name in result.paths if name.endswith(".png")] == ["curves.png"]


def test_what_fails_in_the_importance_costs_its_files_only(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(plots, "importance", lambda *_: 1 / 0)
    config = TrainConfig(target="kind", leave_out=("price",), epochs=1)
    result = run(config, RunOptions(out=tmp_path / "run"), data=made_data.mixed_table())
    (record,) = caplog.records
    assert record.getMessage().endswith("no importance.csv, importance.png: division by zero")
    assert {"summary.json", "roc.png"} <= result.paths.keys()


@pytest.mark.parametrize("classes", [2, 9, 70])
def test_pictures_of_any_number_of_classes_can_be_drawn(classes, caplog):
    """Also of classes that no test row has, and of rows that are all of one class."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(60, classes, generator=generator)
    names = tuple(f"$class {i}" * (1 + 5 * (i % 3)) for i in range(classes))
    base = replace(made_data.blobs(), name="a" * 99, classes=names, is_table=True)
    for y in (torch.arange(60) % classes, torch.ones(60, dtype=torch.int64)):
        data = replace(base, x_test=torch.randn(60, 1), y_test=y)
        pictures = plots.run_pictures([], data, lambda _: outputs)
        for name in (*OF_CLASSES, *OF_COLUMNS):
            content = pictures[name]()
            assert content.startswith("column,log_loss_rise" if "csv" in name else b"\x89PNG")
    assert not caplog.records


@pytest.mark.parametrize("rows", [2, 40, 6000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 1e30])
def test_pictures_of_any_numbers_can_be_drawn(rows, spread):
    generator = torch.Generator().manual_seed(0)
    y = spread * torch.randn(rows, 1, generator=generator)
    data = replace(made_data.line(), x_test=torch.randn(rows, 3), y_test=y, is_table=True)
    pictures = plots.run_pictures([], data, lambda x: x[:, :1] * spread)
    for name in (*OF_NUMBERS, *OF_COLUMNS):
        assert pictures[name]()
    assert pd.read_csv(pd.io.common.StringIO(pictures["importance.csv"]())).notna().all(axis=None)


def test_pictures_of_images_do_not_wait_for_scikit_learn():
    made = plots.run_pictures([], made_data.pictures(), None).keys()
    assert made == {"curves.png", "predictions.png", "confusion.png"}


def test_the_axis_of_an_error_names_what_it_is_an_error_of():
    line = made_data.line()
    assert importance._axis_words(line, "RMSE rise") == "RMSE of y rises by"
    assert importance._axis_words(line, "log loss rise") == "log loss rises by"
