"""solver="lbfgs" minimises scikit-learn's objective: its gradient, its minima, its warnings."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from scipy import sparse
from scipy.optimize import check_grad
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import scale

from fusedmlp.sklearn import FusedMLPClassifier, FusedMLPRegressor
from fusedmlp.sklearn.lbfgs import Objective
from fusedmlp.sklearn.loop import Problem
from fusedmlp.sklearn.weights import glorot

from ..native import needs_native

CLASSES, NUMBERS = (FusedMLPClassifier, MLPClassifier), (FusedMLPRegressor, MLPRegressor)


def _iris():
    x, y = load_iris(return_X_y=True)
    return scale(x), y


def _cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return scale(x), y


def _labels():
    x, y = _cancer()
    return x, np.stack([y, x[:, 0] > 0], axis=1).astype(int)


def _diabetes():
    x, y = load_diabetes(return_X_y=True)
    return scale(x), scale(y)


def _counts():
    x, y = load_diabetes(return_X_y=True)
    return scale(x), y // 30


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("out", ["softmax", "logistic", "identity", "exp"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "prelu", "gelu"])
def test_its_gradient_is_that_of_its_loss(activation, out, weighted):
    random = np.random.RandomState(0)
    x, y = random.randn(7, 4), random.randint(0, 2, (7, 3)).astype(float)
    y = y.argmax(1) if out == "softmax" else y
    weights = random.rand(7) if weighted else None
    given = Problem(x, y, weights, out, 0.3)
    start = glorot([4, 5, 3], activation, random)
    found = Objective(start, activation, given, torch.device("cpu"), torch.float64, "reference")
    at = found.passes.flat.numpy().copy()
    # The error of a one-sided difference of step 1.5e-8 in fp64.
    assert check_grad(lambda w: found(w)[0], lambda w: found(w)[1], at) < 1e-5


# name -> (estimators, data, settings, whether rows have weights)
SAME = {
    "classes": (CLASSES, _iris, {}, False),
    "binary": (CLASSES, _cancer, {"alpha": 1.0}, True),
    "labels": (CLASSES, _labels, {"activation": "logistic"}, False),
    "squared": (NUMBERS, _diabetes, {"activation": "tanh"}, True),
    "poisson": (NUMBERS, _counts, {"loss": "poisson", "activation": "tanh"}, False),
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("case", SAME)
def test_it_takes_scikit_learns_steps(case):
    (ours, theirs), data, settings, weighted = SAME[case]
    x, y = data()
    fit = {"sample_weight": np.random.RandomState(0).rand(len(x))} if weighted else {}
    settings = {"solver": "lbfgs", "random_state": 0, "max_iter": 15, **settings}
    mine, wanted = ours(**settings).fit(x, y, **fit), theirs(**settings).fit(x, y, **fit)
    assert (mine.n_iter_, mine.t_, mine.engine_) == (wanted.n_iter_, wanted.t_, "direct")
    assert mine.loss_ == pytest.approx(wanted.loss_, rel=1e-6)
    for name in ("coefs_", "intercepts_"):
        for a, b in zip(getattr(mine, name), getattr(wanted, name), strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert hasattr(mine, "loss_curve_") == hasattr(wanted, "loss_curve_")
    # Blocks of rows and sparse ones are the same sum.
    other = ours(**settings).fit(sparse.csr_array(x), y, **fit)
    np.testing.assert_allclose(other.coefs_[0], mine.coefs_[0], atol=1e-8)
    small = ours(**settings).fit(x.astype(np.float32), y, **fit)
    assert small.coefs_[0].dtype == np.float32
    assert small.loss_ == pytest.approx(mine.loss_, rel=1e-2)


def test_blocks_of_rows_make_one_sum(monkeypatch):
    x, y = _cancer()
    weights = np.random.RandomState(0).rand(len(x))
    settings = {"solver": "lbfgs", "random_state": 0, "max_iter": 500}
    whole = FusedMLPClassifier(**settings).fit(x, y, sample_weight=weights)
    monkeypatch.setattr("fusedmlp.sklearn.lbfgs.ROWS", 100)
    blocks = FusedMLPClassifier(**settings).fit(x, y, sample_weight=weights)
    assert blocks.loss_ == pytest.approx(whole.loss_, rel=1e-2)


def test_several_outputs_have_scikit_learns_loss():
    x, y = _diabetes()
    y = np.stack([y, y**2], axis=1)
    settings = {"solver": "lbfgs", "random_state": 0, "max_iter": 3000, "max_fun": 10**6}
    settings |= {"activation": "identity", "hidden_layer_sizes": 3, "tol": 1e-6, "alpha": 0.0}
    mine = FusedMLPRegressor(**settings).fit(x, y)
    assert mine.loss_ == pytest.approx(0.5 * ((mine.predict(x) - y) ** 2).mean(), rel=1e-9)
    least = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[1].sum()
    assert ((mine.predict(x) - y) ** 2).sum() == pytest.approx(least, rel=1e-3)


@needs_native
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_in_fp32_it_runs_in_cpp():
    x, y = _iris()
    settings = {"solver": "lbfgs", "random_state": 0, "max_iter": 15}
    mine = FusedMLPClassifier(engine="native", **settings).fit(x, y)
    assert mine.engine_ == "native" and mine.coefs_[0].dtype == np.float64
    assert mine.loss_ == pytest.approx(FusedMLPClassifier(**settings).fit(x, y).loss_, rel=0.1)


def test_it_says_where_it_stopped(capsys):
    x, y = _iris()
    with pytest.warns(ConvergenceWarning, match="lbfgs failed to converge after 2 iteration"):
        FusedMLPClassifier(solver="lbfgs", max_iter=2, verbose=True, random_state=0).fit(x, y)
    assert "Iteration 2, loss = " in capsys.readouterr().out
