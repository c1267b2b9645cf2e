"""How the columns of a table become inputs: fitted on training rows, kept as plain data."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from fusedmlp.train import TrainError
from fusedmlp.train.data import preparation, types
from fusedmlp.train.data.columns import UNKNOWN, Column, Schema
from fusedmlp.train.data.preparation import Preparation

from .. import made_data

made_data.need("numpy", "pandas", "sklearn")
import numpy as np  # noqa: E402
from sklearn.model_selection import KFold  # noqa: E402
from sklearn.preprocessing import RobustScaler, TargetEncoder  # noqa: E402

NAN = math.nan
NUMBER = Column("a", "number")


def _fit(column: Column, values, y=None, classes=2, is_scaled=True):
    raw = torch.tensor(values, dtype=torch.float64).reshape(-1, 1)
    y = torch.arange(len(raw)) % 2 if y is None else y
    schema = Schema((column,), Column("y", "words", ("no", "yes")))
    return preparation.fit(schema, raw, y, classes, is_scaled, 20)


def _apply(found: Preparation, values):
    raw = torch.tensor(values, dtype=torch.float64).reshape(-1, 1)
    return found(raw, found.columns)


def test_numbers_are_scaled_robustly_and_cut_smoothly():
    values = np.concatenate([np.random.default_rng(0).normal(5, 3, 200), [1e6]])
    found, inputs, _ = _fit(NUMBER, values)
    z = RobustScaler().fit_transform(values.reshape(-1, 1))
    np.testing.assert_allclose(inputs, z / np.sqrt(1 + (z / 3) ** 2), rtol=1e-6)
    assert abs(inputs).max() < 3.0001
    assert torch.equal(_apply(found, values), inputs)
    assert _apply(found, [3e38]).item() == pytest.approx(3.0)


def test_a_column_with_equal_quartiles_is_scaled_by_its_range():
    values = [0.0] * 90 + [10.0] * 10
    _, inputs, _ = _fit(NUMBER, values)
    z = 2.0
    assert inputs[0].item() == 0 and inputs[-1].item() == pytest.approx(
        z / math.sqrt(1 + z * z / 9)
    )


def test_a_large_offset_keeps_its_digits():
    values = 1.7e9 + torch.arange(100, dtype=torch.float64) / 100
    _, inputs, _ = _fit(NUMBER, values.tolist())
    assert len(inputs.unique()) == 100


def test_a_missing_number_is_the_median_and_has_a_flag_beside_it():
    found, inputs, _ = _fit(NUMBER, [1.0, 2.0, 3.0, NAN])
    assert found.parts[0].names == ("a", "a missing")
    assert inputs[:, 1].tolist() == [0, 0, 0, 1] and inputs[3, 0] == inputs[1, 0] == 0
    plain, inputs, _ = _fit(NUMBER, [1.0, 2.0, 3.0, NAN], is_scaled=False)
    assert inputs.tolist() == [[1, 0], [2, 0], [3, 0], [2, 1]]
    never, _, _ = _fit(NUMBER, [1.0, 2.0, 3.0])
    assert never.width == 1 and _apply(never, [NAN]).item() == 0


def test_a_date_is_its_time_and_the_cycles_that_vary():
    days = np.arange(800) * 86_400.0
    found, inputs, _ = _fit(Column("d", "date"), days)
    assert found.parts[0].names == (
        "d",
        "d year sine",
        "d year cosine",
        "d week sine",
        "d week cosine",
    )
    weeks = inputs[:, 3:].double()
    assert torch.allclose(weeks[7:], weeks[:-7], atol=1e-5)
    found, _, _ = _fit(Column("d", "date"), days + np.arange(800) * 3600.0)
    assert found.width == 7


WORDS = Column("w", "words", ("a", "b", "c"))


def test_words_have_an_input_each_and_unknown_ones_none():
    found, inputs, _ = _fit(WORDS, [0, 1, 0, 1, NAN])
    assert found.parts[0].names == ("w=a", "w=b", "w missing")
    assert inputs.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    # The third word of the file is in no training row.
    raw = torch.tensor([[2.0], [1.0], [UNKNOWN], [NAN]], dtype=torch.float64)
    assert found(raw, (WORDS,)).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_rare_words_share_an_input_with_unknown_ones():
    column = Column("w", "words", tuple(f"w{i:02}" for i in range(14)))
    values = [i % 12 for i in range(60)] + [12, 13]
    found, inputs, _ = _fit(column, values)
    assert found.width == 13 and found.parts[0].names[-1] == "w other"
    assert inputs[-2:, -1].tolist() == [1, 1] and inputs[:-2, -1].sum() == 0
    assert _apply(found, [UNKNOWN])[0].tolist() == [0.0] * 12 + [1.0]
    assert _apply(found, [NAN])[0].tolist() == [0.0] * 12 + [1.0]


def _many_words(rows: int = 3000, levels: int = 100):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(levels, (rows,), generator=generator)
    column = Column("w", "words", tuple(f"w{i:03}" for i in range(levels)))
    return column, codes, generator


@pytest.mark.parametrize("classes", [None, 2, 3])
def test_many_words_become_target_statistics_of_other_rows(classes):
    column, codes, generator = _many_words()
    if classes is None:
        y = codes.double().unsqueeze(1) + torch.randn(len(codes), 1, generator=generator)
    else:
        y = (codes + torch.randint(2, codes.shape, generator=generator)) % classes
    found, inputs, _ = _fit(column, codes.tolist(), y, classes)
    outputs = {None: 1, 2: 1, 3: 3}[classes]
    assert found.parts[0].way == "target" and found.width == outputs
    kind = {None: "continuous", 2: "binary", 3: "multiclass"}[classes]
    part, x, target = found.parts[0], codes.numpy()[:, None], y.numpy().ravel()

    def scaled(statistics):
        z = (statistics - np.array(part.center)) * np.array(part.scale)
        return z / np.sqrt(1 + (z / 3) ** 2)

    for rest, held in KFold(5, shuffle=True, random_state=20).split(x):
        encoder = TargetEncoder(target_type=kind).fit(x[rest], target[rest])
        wanted = scaled(encoder.transform(x[held]))
        np.testing.assert_allclose(inputs[held], wanted, rtol=1e-5, atol=1e-6)
    # New rows get the statistics of all training rows, unknown words the mean.
    encoder = TargetEncoder(target_type=kind).fit(x, target)
    wanted = scaled(encoder.transform(x))
    np.testing.assert_allclose(_apply(found, codes.tolist()), wanted, rtol=1e-5, atol=1e-6)
    unknown = torch.tensor(part.statistics[-1], dtype=torch.float64)
    assert torch.allclose(unknown, torch.as_tensor(encoder.target_mean_).reshape(-1))


def test_a_target_without_relation_is_not_leaked_to_the_training_rows():
    column, codes, generator = _many_words(rows=2000, levels=600)
    y = torch.randint(2, codes.shape, generator=generator)
    _, inputs, _ = _fit(column, codes.tolist(), y)
    correlation = np.corrcoef(inputs[:, 0], y)[0, 1]
    assert abs(correlation) < 0.1


def test_a_million_words_are_bounded():
    rows = 1_000_000
    column = Column("w", "words", tuple(map(str, range(rows // 2))))
    codes = torch.arange(rows) % (rows // 2)
    codes[: rows // 2] %= 20_000
    found, inputs, _ = _fit(column, codes.double().tolist(), torch.arange(rows) % 2)
    assert found.width == 1 and len(found.parts[0].column.levels) == preparation.MOST_WORDS
    assert inputs.isfinite().all()


def test_what_does_not_vary_in_the_training_rows_is_left_out_and_said():
    schema = Schema((NUMBER, WORDS, Column("b", "number")), Column("y", "words", ("no", "yes")))
    raw = torch.tensor([[1.0, 0, 7], [2.0, 0, 7], [3.0, 0, 7]], dtype=torch.float64)
    found, inputs, notes = preparation.fit(schema, raw, torch.tensor([0, 1, 0]), 2, True, 20)
    assert notes == ["left out, with one value in all training rows: w, b"]
    assert inputs.shape == (3, 1) and found.left_out == ("w", "b")
    with pytest.raises(TrainError, match="no column is left to predict y from: left out, with one"):
        _fit(NUMBER, [1.0, 1.0])


def test_only_training_rows_are_fitted_and_held_out_rows_of_a_fold_are_not():
    x = torch.tensor([[1.0], [2], [3], [4], [100], [200]], dtype=torch.float64)
    data = types.Data(
        "t",
        x[:5],
        torch.tensor([0, 1, 0, 1, 0]),
        x[5:],
        torch.tensor([1]),
        classes=("no", "yes"),
        is_table=True,
        schema=Schema((NUMBER,), Column("y", "words", ("no", "yes"))),
    )
    whole = types.prepared(data, True)
    assert whole.preparation.parts[0].center == (3.0,) and whole.schema is None
    fold = types.prepared(data, True, torch.tensor([0, 1, 2, 3]))
    assert fold.preparation.parts[0].center == (2.5,) and len(fold.x_train) == 5
    assert whole.digest() == fold.digest() == data.digest()
    other = Schema((Column("other", "number"),), data.schema.target)
    assert types.replace(data, schema=other).digest() != data.digest()


def _kept() -> Preparation:
    column, codes, generator = _many_words()
    schema = Schema(
        (NUMBER, WORDS, Column("d", "date", format="%d.%m.%Y"), column),
        Column("y", "words", ("no", "yes")),
        ("id",),
    )
    rows = len(codes)
    raw = torch.stack(
        [
            torch.randn(rows, generator=generator).double(),
            torch.randint(3, (rows,), generator=generator).double(),
            torch.arange(rows) * 3600.0,
            codes.double(),
        ],
        dim=1,
    )
    raw[5] = NAN
    found, _, _ = preparation.fit(schema, raw, torch.arange(rows) % 2, 2, True, 20)
    return found


def test_what_was_fitted_is_the_same_after_json():
    found = _kept()
    again = Preparation.from_dict(json.loads(json.dumps(found.to_dict())), "run")
    assert again == found


def _damages():
    def at(*path, value):
        def damage(listed):
            for step in path[:-1]:
                listed = listed[step]
            listed[path[-1]] = value

        return damage

    return {
        "no_parts": (lambda listed: listed.pop("parts"), "'parts' is missing"),
        "no_scale": (lambda listed: listed["parts"][0].pop("scale"), "'scale' is missing"),
        "more": (lambda listed: listed["parts"][0].update(more=1), "more"),
        "nan": (at("parts", 0, "center", value=[NAN]), "must be finite, got nan"),
        "text": (at("parts", 0, "center", value=["1"]), "must be finite, got 1"),
        "lengths": (at("parts", 0, "scale", value=[1.0, 2.0]), "of 'a' do not fit one another"),
        "way": (at("parts", 0, "way", value="other"), "the way of 'a' must be one of number"),
        "kind": (at("parts", 1, "column", "kind", value="x"), "the kind of 'w' must be one of"),
        "levels": (at("parts", 1, "column", "levels", value=["a"]), "of 'w' do not fit"),
        "statistics": (at("parts", 3, "statistics", 0, value=[]), "statistics of 'w' have other"),
        "is_scaled": (at("is_scaled", value="yes"), "is_scaled must hold bool, got str"),
        "no_dict": (at("parts", value=[3]), "is not iterable"),
    }


@pytest.mark.parametrize("name", _damages())
def test_damage_is_named_when_it_is_read(name):
    damage, message = _damages()[name]
    listed = copy.deepcopy(json.loads(json.dumps(_kept().to_dict())))
    damage(listed)
    with pytest.raises(
        TrainError, match=f"^run: the preparation of its table is damaged.*{message}"
    ):
        Preparation.from_dict(listed, "run")


@pytest.mark.parametrize(("words", "way"), [(50, "one-hot"), (51, "target")])
def test_up_to_fifty_words_are_an_input_each_and_more_are_statistics(words, way):
    column = Column("a", "words", tuple(f"w{i:02}" for i in range(words)))
    found, _, _ = _fit(column, [float(i) for i in range(words)] * 40)
    assert found.parts[0].way == way
