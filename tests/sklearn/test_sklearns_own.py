"""scikit-learn's own test file for its MLP passes with ours in the place of theirs.

The tests are those of the installed version. They are collected from a second copy of their
module, which is loaded while sklearn.neural_network has our estimators under the names of theirs.
"""

import importlib.util

import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

import sklearn.neural_network

from fusedmlp.sklearn import FusedMLPClassifier, FusedMLPRegressor

# Tests that are left out -> why.
LEFT_OUT = {
    "test_gradient": "it calls _loss_grad_lbfgs with scikit-learn's work arrays; "
    "test_lbfgs.py has the same check of ours",
}


def _module():
    spec = importlib.util.find_spec("sklearn.neural_network.tests.test_mlp")
    if spec is None:
        pytest.skip("this scikit-learn came without its tests", allow_module_level=True)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.neural_network, "MLPClassifier", FusedMLPClassifier)
        patch.setattr(sklearn.neural_network, "MLPRegressor", FusedMLPRegressor)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def global_random_seed():
    """As in scikit-learn's conftest.py where no seed is asked for."""
    return 42


_TESTS = {name: test for name, test in vars(_module()).items() if name.startswith("test_")}
globals().update({name: test for name, test in _TESTS.items() if name not in LEFT_OUT})


def test_what_is_left_out_is_there_and_little():
    assert set(LEFT_OUT) <= set(_TESTS) and len(LEFT_OUT) <= 2
