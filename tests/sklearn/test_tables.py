"""The estimators for tables take DataFrames as they are, and keep scikit-learn's contract."""

import pickle

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("pandas", reason="pandas is not installed")

import pandas as pd
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from fusedmlp.sklearn import FusedTableClassifier, FusedTableRegressor

SMALL = {"n_estimators": 2, "epochs": 20, "random_state": 0}
KINDS = [FusedTableClassifier, FusedTableRegressor]
_HELD_OUT = "which rows are held out is drawn by place, so a row twice is no row of weight two"


def _expected(estimator):
    return {
        name: _HELD_OUT
        for name in (
            "check_sample_weight_equivalence_on_dense_data",
            "check_sample_weights_invariance",
        )
    }


@parametrize_with_checks(
    [FusedTableClassifier(**SMALL), FusedTableRegressor(**SMALL)],
    expected_failed_checks=_expected,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def _table(rows=300):
    """(frame, classes, numbers): words decide, and cells are missing in each column."""
    random = np.random.RandomState(0)
    word = random.choice(["red", "green", "blue"], rows)
    size = random.randn(rows)
    frame = pd.DataFrame(
        {
            "colour": pd.Series(word).where(random.rand(rows) > 0.05),
            "size": pd.Series(size).where(random.rand(rows) > 0.05),
            "kind": pd.Categorical(random.choice(["a", "b"], rows)),
            "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(random.randint(0, 99, rows), "D"),
            "flag": random.rand(rows) > 0.5,
        }
    )
    number = (word == "red") * 3.0 + size + 10
    return frame, np.where(word == "red", "stop", np.where(size > 0, "go", "wait")), number


def test_words_dates_and_missing_cells_need_no_preparation():
    frame, y, number = _table()
    mine = FusedTableClassifier(**SMALL).fit(frame, y)
    assert list(mine.classes_) == ["go", "stop", "wait"]
    assert list(mine.feature_names_in_) == list(frame.columns) and mine.n_features_in_ == 5
    assert mine.n_estimators_ == 2
    assert mine.score(frame, y) > 0.85
    shares = mine.predict_proba(frame)
    assert shares.shape == (300, 3)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert list(mine.predict(frame)) == list(mine.classes_[shares.argmax(1)])
    assert FusedTableRegressor(**SMALL).fit(frame, number).score(frame, number) > 0.8


def test_all_rows_stand_where_they_stood():
    frame, y, _ = _table()
    turned = frame.set_axis(range(1000, 700, -1))
    a, b = (FusedTableClassifier(**SMALL).fit(x, y) for x in (frame, turned))
    assert np.array_equal(a.predict_proba(frame), b.predict_proba(turned))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_predicts_the_same(kind):
    frame, y, number = _table(100)
    y = y if kind is FusedTableClassifier else number
    fitted = kind(**SMALL).fit(frame, y)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.predict(frame), fitted.predict(frame))
    assert clone(fitted).get_params() == fitted.get_params()
    same = clone(fitted).fit(frame, y)
    assert np.array_equal(same.predict(frame), fitted.predict(frame))
    other = clone(fitted).set_params(random_state=1).fit(frame, y)
    assert not np.array_equal(other.network_.predict(frame), fitted.network_.predict(frame)) or (
        kind is FusedTableClassifier
    )


def test_weights_and_class_weights_count():
    frame, y, _ = _table()
    # Where the column says nothing, the weights alone decide.
    noise = frame[["day"]]
    rare = np.where(y == "stop", 1.0, 0.001)
    settings = SMALL | {"epochs": 60}
    by_row = FusedTableClassifier(**settings).fit(noise, y, sample_weight=rare)
    assert (by_row.predict(noise) == "stop").mean() > 0.9
    weights = {"stop": 1.0, "go": 0.001, "wait": 0.001}
    by_class = FusedTableClassifier(class_weight=weights, **settings).fit(noise, y)
    assert np.array_equal(by_class.predict_proba(noise), by_row.predict_proba(noise))


def test_searches_over_frames():
    frame, y, _ = _table()
    grid = {"hidden_layer_sizes": [16, (16, 16)], "n_estimators": [1]}
    search = GridSearchCV(FusedTableClassifier(**SMALL), grid, cv=2).fit(frame, y)
    assert search.best_score_ > 0.6
    assert len(cross_val_score(FusedTableClassifier(**SMALL), frame, y, cv=2)) == 2


def test_words_unknown_to_training_are_predicted():
    frame, y, _ = _table()
    fitted = FusedTableClassifier(**SMALL).fit(frame, y)
    new = frame.head(3).assign(colour=["violet", None, "red"])
    assert fitted.predict(new).shape == (3,)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x, y: (x, np.full(len(y), "a")), "at least two classes, got one class, 'a'"),
        (lambda x, y: (x.head(1), y[:1]), "at least 2 rows, got 1 sample"),
        (lambda x, y: (x, y[:-1]), "inconsistent numbers of samples"),
        (lambda x, y: (x[["flag"]].assign(flag=True), y), "no column is left"),
    ],
    ids=["one class", "one row", "lengths", "no column"],
)
def test_data_that_cannot_be_are_named(change, said):
    frame, y, _ = _table(60)
    with pytest.raises(ValueError, match=said):
        FusedTableClassifier(**SMALL).fit(*change(frame, y))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"preset": "fast"}, ": preset must be one of plain, table, ensemble, got 'fast'"),
        ({"n_estimators": 0}, ": n_estimators must be at least 1, got 0"),
        ({"epochs": 0}, ": epochs must be at least 1, got 0"),
        ({"dropout": 2.0}, ": dropout must be between 0 and 1, got 2"),
        ({"class_weight": "even"}, "class_weight"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, said):
    frame, y, _ = _table(60)
    with pytest.raises(ValueError, match=said):
        FusedTableClassifier(**SMALL | settings).fit(frame, y)


def test_new_rows_must_have_the_columns_of_training():
    frame, y, _ = _table(100)
    fitted = FusedTableClassifier(**SMALL).fit(frame, y)
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.predict(frame.rename(columns={"size": "length"}))
    with pytest.raises(ValueError, match="size"):
        fitted.predict(frame.assign(size="large"))
