"""FusedTableClassifier and FusedTableRegressor: DataFrames with words and missing cells, as they
are, to an average of networks. Columns, preset and training are those of train.fit_table."""

from dataclasses import replace
from numbers import Integral

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_array, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets

# Private by name; estimators outside scikit-learn use them, as there is no public one.
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from ..train import Scaling, TrainConfig, TrainError, UsageError, fit_table
from ..train.data.frames import is_frame

_LEAST_ROWS = 2
# What messages of the trainer call an argument -> the argument.
_FLAGS = {
    "--networks": "n_estimators",
    "--hidden": "hidden_layer_sizes",
    "--lr": "learning_rate_init",
    "--batch-size": "batch_size",
    "--preset": "preset",
    "--dropout": "dropout",
    "--epochs": "epochs",
    "--device": "device",
}


class BaseFusedTable(BaseEstimator):
    """Not for use by itself."""

    def __init__(
        self,
        preset=None,
        n_estimators=None,
        *,
        hidden_layer_sizes=None,
        dropout=None,
        learning_rate_init=None,
        batch_size=None,
        epochs=None,
        device="auto",
        random_state=None,
    ):
        self.preset = preset
        self.n_estimators = n_estimators
        self.hidden_layer_sizes = hidden_layer_sizes
        self.dropout = dropout
        self.learning_rate_init = learning_rate_init
        self.batch_size = batch_size
        self.epochs = epochs
        self.device = device
        self.random_state = random_state

    def _train(self, X, y, sample_weight, loss: str) -> None:
        """Fit network_ to targets y (n,) of the rows of a DataFrame.

        raises  ValueError with the message of fit_table
        """
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
            weights = torch.from_numpy(np.array(weights, dtype=np.float64))
        target = "target"
        while target in X.columns:
            target += "_"
        sizes = self.hidden_layer_sizes
        try:
            config = TrainConfig(
                target=target,
                loss=loss,
                preset=self.preset,
                networks=self.n_estimators,
                hidden=(sizes,) if isinstance(sizes, Integral) else sizes,
                dropout=self.dropout,
                lr=self.learning_rate_init,
                batch_size=self.batch_size,
                epochs=self.epochs,
                device=self.device,
                seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            )
            found = fit_table(X.assign(**{target: y}), config, weights=weights)
        except (TrainError, UsageError) as error:
            said = str(error)
            for flag, name in _FLAGS.items():
                said = said.replace(flag, name)
            raise ValueError(f"{type(self).__name__}: {said}") from error
        # In fp64 a row's prediction does not depend on the rows beside it, as scikit-learn asks.
        model = found.model.cpu().double()
        self.network_ = replace(found, model=model, scaling=Scaling(dtype=torch.float64))
        self.n_estimators_ = self.network_.config.networks

    def _frame(self, X, reset: bool):
        """X as a DataFrame whose columns are named by text: a frame as it is, an array
        (n, features) with columns x0, x1, ..."""
        import pandas as pd

        if is_frame(X):
            X = X if hasattr(X, "iloc") else X.to_pandas()
            validate_data(self, X, reset=reset, skip_check_array=True)
            if reset and len(X) < _LEAST_ROWS:
                raise ValueError(
                    f"{type(self).__name__}: X must have at least {_LEAST_ROWS} rows, got "
                    f"{len(X)} sample(s)"
                )
            names = [str(name) for name in X.columns]
            return X.set_axis(names, axis=1).reset_index(drop=True)
        X = validate_data(
            self,
            X,
            reset=reset,
            dtype=None,
            ensure_all_finite="allow-nan",
            ensure_min_samples=_LEAST_ROWS if reset else 1,
        )
        return pd.DataFrame(X, columns=[f"x{i}" for i in range(X.shape[1])]).infer_objects()

    def _targets(self, y, X, dtype):
        y = column_or_1d(y, warn=True)
        y = check_array(y, ensure_2d=False, dtype=dtype, input_name="y", estimator=self)
        check_consistent_length(X, y)
        return y

    def _predicted(self, X, proba: bool):
        """The DataFrame of Trained.predict."""
        check_is_fitted(self)
        X = self._frame(X, reset=False)
        try:
            return self.network_.predict(X, proba)
        except TrainError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        tags.non_deterministic = self.random_state is None
        return tags


class FusedTableClassifier(ClassifierMixin, BaseFusedTable):
    """Classes from any ordinary table: `FusedTableClassifier().fit(frame, y).predict(frame)`.

    X is a DataFrame of pandas or polars, or an array: numbers, words, truth values and dates, with
    missing cells. Nothing needs to be scaled, filled or encoded before. Columns that tell nothing
    (indices, identifiers, constants) are left out. Other arguments than these are those of
    `fusedmlp train`, and None leaves each to the preset.

    preset              'plain', 'table', 'ensemble', or None: by the number of rows
    n_estimators        networks, whose predictions are averaged; each has other rows held out,
                        which tell its best epoch
    hidden_layer_sizes  widths of the hidden layers, or one width
    dropout             after each hidden layer, or one for each
    learning_rate_init  the highest learning rate
    batch_size          rows a step
    epochs              passes over the rows, at most
    class_weight        'balanced', {class: weight} or None: multiplies sample_weight
    device              'auto' (cuda where there is one), 'cpu' or 'cuda'
    random_state        the same seed, or None for another one at each fit

    Attributes: classes_, n_features_in_, feature_names_in_, n_estimators_, and network_, the
    fusedmlp.train.Trained that predicts, in fp64 on the CPU.
    """

    def __init__(
        self,
        preset=None,
        n_estimators=None,
        *,
        hidden_layer_sizes=None,
        dropout=None,
        learning_rate_init=None,
        batch_size=None,
        epochs=None,
        class_weight=None,
        device="auto",
        random_state=None,
    ):
        super().__init__(
            preset,
            n_estimators,
            hidden_layer_sizes=hidden_layer_sizes,
            dropout=dropout,
            learning_rate_init=learning_rate_init,
            batch_size=batch_size,
            epochs=epochs,
            device=device,
            random_state=random_state,
        )
        self.class_weight = class_weight

    def fit(self, X, y, sample_weight=None):
        """Train on all rows.

        X              (n, features) DataFrame or array
        y              (n,) classes
        sample_weight  (n,) or None
        returns        self
        raises         ValueError for wrong settings or data
        """
        frame = self._frame(X, reset=True)
        y = self._targets(y, frame, None)
        check_classification_targets(y)
        self.classes_, places = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__}: y must hold at least two classes, got one class, "
                f"{self.classes_.tolist()[0]!r}"
            )
        if self.class_weight is not None:
            by_class = compute_sample_weight(self.class_weight, y)
            if sample_weight is not None:
                by_class = by_class * _check_sample_weight(sample_weight, frame)
            sample_weight = by_class
        self._train(frame, places, sample_weight, "cross_entropy")
        return self

    def predict_proba(self, X):
        """(n, classes) probabilities of rows X, in the order of classes_."""
        return self._predicted(X, True).iloc[:, 1:].to_numpy()

    def predict(self, X):
        """(n,) classes of rows X (n, features)."""
        found = self.predict_proba(X)  # first, as classes_ is there only after fit
        return self.classes_[found.argmax(1)]


class FusedTableRegressor(RegressorMixin, BaseFusedTable):
    """Numbers from any ordinary table: `FusedTableRegressor().fit(frame, y).predict(frame)`.

    Arguments and attributes are those of FusedTableClassifier without class_weight and classes_.
    """

    def fit(self, X, y, sample_weight=None):
        """Train on all rows; as FusedTableClassifier.fit with numbers y (n,)."""
        frame = self._frame(X, reset=True)
        self._train(frame, self._targets(y, frame, np.float64), sample_weight, "mse")
        return self

    def predict(self, X):
        """(n,) fp64 of rows X (n, features)."""
        return self._predicted(X, False)["prediction"].to_numpy(np.float64)
