"""Multilayer perceptrons with the interface of scikit-learn's own.

from fusedmlp.sklearn import FusedMLPClassifier as MLPClassifier

is the only change that a script needs. Importing this needs scikit-learn 1.6 or newer.
"""

from .estimators import FusedMLPClassifier, FusedMLPRegressor

__all__ = ["FusedMLPClassifier", "FusedMLPRegressor"]
