"""Multilayer perceptrons with the interface of scikit-learn: its own by another import, and two for
tables.

from fusedmlp.sklearn import FusedMLPClassifier as MLPClassifier

is the only change that a script needs. Importing this needs scikit-learn 1.6 or newer.
"""

from .estimators import FusedMLPClassifier, FusedMLPRegressor
from .tables import FusedTableClassifier, FusedTableRegressor

__all__ = [
    "FusedMLPClassifier",
    "FusedMLPRegressor",
    "FusedTableClassifier",
    "FusedTableRegressor",
]
