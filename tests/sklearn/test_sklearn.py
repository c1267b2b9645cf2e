"""The estimators keep scikit-learn's contract: its own checks, and its MLP's results."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils.estimator_checks import parametrize_with_checks

from fusedmlp.sklearn import FusedMLPClassifier, FusedMLPRegressor

from ..native import needs_native

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


# max_iter is what scikit-learn's own suite gives its MLP.
@parametrize_with_checks([FusedMLPClassifier(max_iter=100), FusedMLPRegressor(max_iter=100)])
def test_scikit_learns_own_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


@pytest.mark.parametrize(
    "ours, theirs", [(FusedMLPClassifier, MLPClassifier), (FusedMLPRegressor, MLPRegressor)]
)
def test_arguments_defaults_and_tags_are_scikit_learns(ours, theirs):
    given, wanted = ours().get_params(), theirs().get_params()
    added = {key: given.pop(key) for key in ("dropout", "device", "backend", "engine")}
    assert given == wanted
    assert added == {"dropout": 0.0, "device": "auto", "backend": "auto", "engine": "auto"}
    assert ours().__sklearn_tags__() == theirs().__sklearn_tags__()


@pytest.mark.parametrize("settings", [{}, {"early_stopping": True}], ids=["plain", "early"])
@pytest.mark.parametrize(
    "ours, theirs", [(FusedMLPClassifier, MLPClassifier), (FusedMLPRegressor, MLPRegressor)]
)
def test_what_a_fit_leaves_behind_has_scikit_learns_names(ours, theirs, settings):
    x, y = _digits(100)
    mine, wanted = (kind(max_iter=2, **settings).fit(x, y) for kind in (ours, theirs))
    names = {name for name in vars(wanted) if name.endswith("_") and name[0] != "_"}
    assert {"coefs_", "intercepts_", "loss_curve_", "n_iter_", "best_loss_"} <= names
    assert names <= set(vars(mine))
    assert len(mine.loss_curve_) == len(wanted.loss_curve_) == 2
    assert [c.shape for c in mine.coefs_] == [c.shape for c in wanted.coefs_]


def _digits(rows=600):
    x, y = load_digits(return_X_y=True)
    return x[:rows] / 16, y[:rows]


def _cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return scale(x), y


def _several_labels():
    x, y = _cancer()
    return x, np.stack([y, x[:, 0] > 0, x[:, 1] > 1], axis=1).astype(int)


def _diabetes():
    x, y = load_diabetes(return_X_y=True)
    return scale(x), scale(y)


def _two_outputs():
    x, y = _diabetes()
    return x, np.stack([y, y**2], axis=1)


def _weights(x):
    return np.random.RandomState(0).rand(len(x))


CLASSES = FusedMLPClassifier, MLPClassifier
NUMBERS = FusedMLPRegressor, MLPRegressor
SGD = {"solver": "sgd", "learning_rate_init": 0.1}
# name -> (estimators, data, settings, whether rows have weights, what runs it)
SAME = {
    "adam": (CLASSES, _digits, {}, False, "native"),
    "adam-alpha": (CLASSES, _digits, {"alpha": 2.0, "beta_1": 0.8}, False, "native"),
    "sgd": (CLASSES, _digits, SGD | {"alpha": 1.0}, False, "native"),
    "no-momentum": (CLASSES, _digits, SGD | {"momentum": 0.0}, False, "native"),
    "invscaling": (CLASSES, _digits, SGD | {"learning_rate": "invscaling"}, False, "native"),
    "adaptive": (
        CLASSES,
        _digits,
        SGD | {"learning_rate": "adaptive", "tol": 0.5, "n_iter_no_change": 1},
        False,
        "native",
    ),
    "logistic": (
        CLASSES,
        _digits,
        {"activation": "logistic", "hidden_layer_sizes": (30, 20)},
        False,
        "native",
    ),
    "identity": (CLASSES, _digits, {"activation": "identity"}, False, "native"),
    "unshuffled": (CLASSES, _digits, SGD | {"shuffle": False, "batch_size": 64}, False, "native"),
    "early": (CLASSES, _digits, {"early_stopping": True}, False, "native"),
    "weights": (CLASSES, _digits, {"alpha": 1.0}, True, "native"),
    "binary": (CLASSES, _cancer, {"alpha": 1.0}, False, "native"),
    "binary-sgd": (CLASSES, _cancer, SGD, False, "native"),
    "binary-early": (CLASSES, _cancer, {"early_stopping": True}, True, "native"),
    "labels": (CLASSES, _several_labels, {"alpha": 1.0}, False, "native"),
    "squared": (NUMBERS, _diabetes, {"activation": "tanh"}, False, "native"),
    "squared-sgd": (NUMBERS, _two_outputs, {"solver": "sgd", "alpha": 1.0}, False, "native"),
    "squared-early": (NUMBERS, _diabetes, {"early_stopping": True}, True, "native"),
    "outputs": (NUMBERS, _two_outputs, {"alpha": 1.0}, False, "native"),
    "outputs-weights": (NUMBERS, _two_outputs, {}, True, "native"),
    "poisson": (
        (
            lambda **kw: FusedMLPRegressor("poisson", **kw),
            lambda **kw: MLPRegressor("poisson", **kw),
        ),
        lambda: (_diabetes()[0], _diabetes()[1] ** 2),
        {},
        False,
        "direct",
    ),
}


@needs_native
@pytest.mark.parametrize("case", SAME)
def test_the_same_random_state_gives_scikit_learns_training(case):
    """Equal first weights and batches, equal formulas: what differs is rounding, in fp32 where C++
    runs, and the point of an epoch at which the penalty in loss_ is taken."""
    (ours, theirs), data, settings, weighted, engine = SAME[case]
    x, y = data()
    fit = {"sample_weight": _weights(x)} if weighted else {}
    settings = {"max_iter": 12, "random_state": 3, **settings}
    wanted = theirs(**settings).fit(x, y, **fit)
    for rows, ran in ((x, "direct"), (x.astype(np.float32), engine)):
        mine = ours(**settings).fit(rows, y, **fit)
        assert mine.engine_ == ran
        assert mine.coefs_[0].dtype == rows.dtype
        _is_the_same_training(mine, wanted, rows, settings)


def _is_the_same_training(mine, wanted, x, settings):
    assert (mine.n_iter_, mine.t_, mine.n_layers_) == (wanted.n_iter_, wanted.t_, wanted.n_layers_)
    assert (mine.out_activation_, mine.n_outputs_) == (wanted.out_activation_, wanted.n_outputs_)
    np.testing.assert_allclose(mine.loss_curve_, wanted.loss_curve_, rtol=5e-3)
    for name in ("coefs_", "intercepts_"):
        for a, b in zip(getattr(mine, name), getattr(wanted, name), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, atol=2e-4)
    if settings.get("early_stopping"):
        np.testing.assert_allclose(mine.validation_scores_, wanted.validation_scores_, atol=1e-4)
        assert mine.best_loss_ is None and wanted.best_loss_ is None
    else:
        assert mine.best_loss_ == min(mine.loss_curve_)
    np.testing.assert_allclose(mine.predict(x), wanted.predict(x), atol=1e-3)
    if hasattr(wanted, "predict_proba"):
        np.testing.assert_allclose(mine.predict_proba(x), wanted.predict_proba(x), atol=1e-4)
        np.testing.assert_allclose(np.exp(mine.predict_log_proba(x)), mine.predict_proba(x), 1e-4)


@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_partial_fit_and_warm_start_go_on_as_scikit_learns(solver):
    x, y = _digits()
    pairs = [kind(solver=solver, random_state=0) for kind in CLASSES]
    for start in (0, 300, 100):
        for estimator in pairs:
            estimator.partial_fit(x[start : start + 250], y[start : start + 250], classes=range(10))
    mine, wanted = pairs
    np.testing.assert_allclose(mine.loss_curve_, wanted.loss_curve_, rtol=1e-4)
    np.testing.assert_allclose(mine.coefs_[0], wanted.coefs_[0], atol=1e-4)
    pairs = [kind(solver=solver, random_state=0, warm_start=True, max_iter=3) for kind in CLASSES]
    for _ in range(2):
        mine, wanted = (estimator.fit(x, y) for estimator in pairs)
    assert len(mine.loss_curve_) == 6
    np.testing.assert_allclose(mine.coefs_[1], wanted.coefs_[1], atol=1e-4)


def test_a_pickle_between_two_partial_fits_changes_nothing():
    x, y = _digits()
    settings = {"random_state": 0, "dropout": 0.5, "activation": "prelu"}
    straight = FusedMLPClassifier(**settings)
    broken = FusedMLPClassifier(**settings)
    for _ in range(3):
        straight.partial_fit(x, y, classes=range(10))
        broken = pickle.loads(pickle.dumps(broken.partial_fit(x, y, classes=range(10))))
    assert np.array_equal(straight.coefs_[0], broken.coefs_[0])
    assert np.array_equal(straight.predict_proba(x), copy.deepcopy(broken).predict_proba(x))
    assert clone(broken).get_params() == broken.get_params()
    assert not hasattr(clone(broken), "coefs_")


@pytest.mark.parametrize(
    "engine", [pytest.param("native", marks=needs_native), "direct", "autograd"]
)
def test_dropout_and_prelu_are_reproducible_and_touch_no_global_generator(engine):
    x, y = _digits()
    settings = {
        "dropout": 0.3,
        "activation": "prelu",
        "max_iter": 9,
        "learning_rate_init": 0.02,
        "engine": engine,
    }
    torch.manual_seed(1)
    fits = [FusedMLPClassifier(random_state=seed, **settings).fit(x, y) for seed in (0, 0, 1)]
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    assert np.array_equal(fits[0].coefs_[0], fits[1].coefs_[0])
    assert not np.array_equal(fits[0].coefs_[0], fits[2].coefs_[0])
    assert fits[0].slopes_[0].shape == (1,) and fits[0].slopes_[0] != 0.25
    plain = FusedMLPClassifier(random_state=0, **settings | {"dropout": 0.0}).fit(x, y)
    assert plain.loss_ < fits[0].loss_  # what is dropped is missed
    assert fits[0].score(x, y) > 0.8


@needs_native
def test_engines_agree_with_dropout():
    x, y = _digits()
    settings = {"dropout": 0.3, "random_state": 0, "max_iter": 4}
    a, b = (FusedMLPClassifier(engine=e, **settings).fit(x, y) for e in ("native", "autograd"))
    assert (a.engine_, b.engine_) == ("native", "autograd")
    assert (a.coefs_[0].dtype, b.coefs_[0].dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(a.coefs_[0], b.coefs_[0], atol=1e-4)
    c = FusedMLPClassifier(**settings).fit(x, y)
    assert c.engine_ == "direct"
    np.testing.assert_allclose(c.coefs_[0], b.coefs_[0], atol=1e-12)


@needs_native
@pytest.mark.parametrize("call", ["fit", "early_stopping", "warm_start", "partial_fit"])
@pytest.mark.parametrize("data", [lambda: _digits(570), _cancer], ids=["classes", "binary"])
def test_adam_in_one_call_is_adam_step_by_step(data, call):
    """With a last batch that is smaller, and going over from one to the other; what differs is
    rounding, in fp32 and in fp64."""
    x, y = data()
    found, ways = [], (("native",) * 3, ("autograd",) * 3, ("native", "autograd", "direct"))
    for engines in ways:
        estimator = FusedMLPClassifier(
            random_state=0,
            max_iter=4,
            early_stopping=call == "early_stopping",
            warm_start=call == "warm_start",
        )
        for engine in engines:
            estimator.set_params(engine=engine)
            if call == "partial_fit":
                estimator.partial_fit(x, y, classes=np.unique(y))
            else:
                estimator.fit(x, y)
            assert estimator.engine_ == engine
        found.append(estimator)
    for other in found[1:]:
        np.testing.assert_allclose(found[0].loss_curve_, other.loss_curve_, rtol=1e-4)
        for name in ("coefs_", "intercepts_"):
            for a, b in zip(getattr(found[0], name), getattr(other, name), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)


def test_sparse_rows_are_the_same_as_dense_ones():
    x, y = _digits()
    settings = {"random_state": 0, "max_iter": 3, "engine": "autograd"}
    dense = FusedMLPClassifier(**settings).fit(x, y)
    for form in (sparse.csr_matrix, sparse.csc_matrix):
        found = FusedMLPClassifier(**settings).fit(form(x), y)
        np.testing.assert_allclose(found.coefs_[0], dense.coefs_[0], atol=1e-12)
        np.testing.assert_allclose(found.predict_proba(form(x)), dense.predict_proba(x), 1e-9)


def test_a_batch_without_weight_is_left_out():
    x, y = _digits(400)
    weights = np.r_[np.zeros(200), np.ones(200)]
    settings = {"random_state": 0, "max_iter": 3, "shuffle": False}
    with_zeros = FusedMLPClassifier(**settings).fit(x, y, sample_weight=weights)
    without = FusedMLPClassifier(**settings, engine="autograd").fit(x[200:], y[200:])
    np.testing.assert_allclose(with_zeros.coefs_[0], without.coefs_[0], atol=1e-9)


def test_pipelines_and_searches():
    x, y = _digits()
    pipeline = make_pipeline(
        StandardScaler(), FusedMLPClassifier(max_iter=10, learning_rate_init=0.01, random_state=0)
    )
    grid = {"fusedmlpclassifier__alpha": [1e-4, 1.0], "fusedmlpclassifier__dropout": [0.0, 0.2]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(x, y)
    assert search.best_score_ > 0.85 and len(search.cv_results_["params"]) == 4
    assert not np.isnan(search.cv_results_["mean_test_score"]).any()


def test_an_edited_coefficient_is_what_predicts():
    x, y = _digits()
    estimator = FusedMLPClassifier(random_state=0, max_iter=3).fit(x, y)
    estimator.coefs_[-1][:] = 0
    estimator.intercepts_[-1][:] = np.eye(10)[7]
    assert set(estimator.predict(x)) == {7}


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"solver": "lbfg"}, "solver must be one of adam, sgd, lbfgs, got 'lbfg'"),
        ({"solver": "lbfgs", "dropout": 0.1}, "dropout must be 0 with solver 'lbfgs'"),
        ({"solver": "lbfgs", "engine": "autograd"}, "must have engine auto, native or direct"),
        ({"engine": "direct", "backend": "triton"}, "engine 'direct' must run on a CPU"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"alpha": -1}, "alpha must be a number in"),
        ({"max_iter": 0}, "max_iter must be an integer"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"shuffle": "no"}, "shuffle must be a bool"),
        ({"hidden_layer_sizes": (5, 0)}, "hidden_layer_sizes must be > 0"),
        ({"dropout": (0.1, 0.2)}, "one for each of the 1"),
        ({"dropout": 1.5}, "dropout must be"),
        ({"engine": "native", "backend": "reference"}, "engine 'native' was asked for"),
        ({"learning_rate_init": 1e30, "solver": "sgd"}, "non-finite"),
        ({"early_stopping": True, "validation_fraction": 0.001}, "validation set is too small"),
    ],
)
def test_settings_that_cannot_be_are_named_at_fit(settings, said):
    x, y = _digits()
    with pytest.raises(ValueError, match=said):
        FusedMLPClassifier(random_state=0, max_iter=settings.pop("max_iter", 3), **settings).fit(
            x, y
        )


def test_misuse_of_partial_fit_and_warm_start_is_named():
    x, y = _digits()
    assert not hasattr(FusedMLPClassifier(solver="lbfgs"), "partial_fit")
    with pytest.raises(ValueError, match="classes must be passed"):
        FusedMLPClassifier().partial_fit(x, y)
    begun = FusedMLPClassifier().partial_fit(x, y, classes=range(10))
    with pytest.raises(ValueError, match="is not the same as"):
        begun.partial_fit(x, y, classes=range(9))
    with pytest.raises(ValueError, match="not in `self.classes_`"):
        begun.partial_fit(x, y + 5)
    with pytest.raises(ValueError, match="early_stopping"):
        FusedMLPClassifier(early_stopping=True).partial_fit(x, y, classes=range(10))
    warm = FusedMLPClassifier(warm_start=True, max_iter=1).fit(x, y)
    with pytest.raises(ValueError, match="same classes"):
        warm.fit(x, y + 1)
    with pytest.raises(ValueError, match="wide as before"):
        warm.set_params(hidden_layer_sizes=(7,)).fit(x, y)
    with pytest.raises(ValueError, match="at least 0"):
        FusedMLPRegressor("poisson").fit(x, -y)


def test_it_says_when_it_has_not_converged(capsys):
    x, y = _digits()
    with pytest.warns(ConvergenceWarning, match=r"\(2\) reached"):
        FusedMLPClassifier(max_iter=2, verbose=True, random_state=0).fit(x, y)
    assert "Iteration 2, loss = " in capsys.readouterr().out
