"""FusedMLPClassifier and FusedMLPRegressor: how targets become numbers and back. The rest is in
base.py."""

import numpy as np
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import column_or_1d
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import type_of_target, unique_labels
from sklearn.utils.validation import validate_data

from .base import BaseFusedMLP, offers_partial_fit

_ROWS = {"accept_sparse": ["csr", "csc"], "dtype": (np.float64, np.float32)}


def _one_column(y):
    return column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y


class FusedMLPClassifier(ClassifierMixin, BaseFusedMLP):
    """scikit-learn's MLPClassifier, run by fused kernels: `FusedMLPClassifier().fit(X, y)`.

    The arguments and their defaults are those of sklearn.neural_network.MLPClassifier of
    scikit-learn 1.9, and mean the same; the same random_state gives the same first weights and
    batches, so without dropout the same training up to rounding. Except:

    activation  also every name of fusedmlp.spec.activations.NAMES, such as 'prelu' or 'gelu'
    solver      'adam' is Adam with the penalty in the gradient (not AdamW). 'lbfgs' minimises the
                sum of the squared errors over several outputs, where scikit-learn pairs the
                gradient of that sum with their mean
    alpha       L2 penalty: alpha / (2 B) times the sum of squared weights for a batch of B rows
                (scikit-learn's _backprop; loop.py derives the weight_decay from it)
    dropout     probability of dropping after each hidden layer, or one for each of them
    device      'auto' (cuda where there is one), 'cpu' or 'cuda'
    backend     of the fused kernels: 'auto', 'native', 'triton', 'reference'
    engine      'native': C++ on a CPU in fp32, whole epochs in one call; 'direct': step by step on
                a CPU, in the dtype of X; 'autograd': as PyTorch does, in the dtype of X, in fp32 on
                a GPU; 'auto': for fp32 rows native where it can (not with sparse rows or loss
                'poisson'), else direct, and autograd on a GPU. To train fp64 rows in fp32, which is
                some times faster, ask for 'native' or hand in fp32 rows. lbfgs computes in fp64,
                with 'native' in fp32

    Attributes are also those of MLPClassifier: classes_, loss_, best_loss_, loss_curve_,
    validation_scores_, best_validation_score_, t_, n_iter_, n_layers_, n_outputs_,
    out_activation_, n_features_in_, feature_names_in_, and coefs_ (fan_in, fan_out), intercepts_
    (fan_out,), in the dtype of the computation (of lbfgs that of X). Besides, slopes_ (1,) of each
    hidden layer with prelu, and engine_, what ran. The penalty in loss_ is that of the weights
    halfway through an epoch.
    """

    _stratifies = True

    @property
    def loss(self):
        """'log_loss', the only one."""
        return "log_loss"

    @available_if(offers_partial_fit)
    def partial_fit(self, X, y, sample_weight=None, classes=None):
        """One pass over these rows, from where the last one ended.

        classes  all that will come, in the first call; may be left out in later ones
        returns  self
        raises   ValueError as fit; for classes that are missing or not those of before
        """
        if not hasattr(self, "classes_"):
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit.")
            is_multilabel = type_of_target(y).startswith("multilabel")
            self._binarizer = LabelBinarizer().fit(y if is_multilabel else unique_labels(classes))
            self.classes_ = self._binarizer.classes_
        elif classes is not None and not np.array_equal(self.classes_, unique_labels(classes)):
            raise ValueError(
                f"`classes={classes!r}` is not the same as on last call to partial_fit, was: "
                f"{self.classes_!r}"
            )
        return self._fit(X, y, sample_weight, True)

    def _validated(self, X, y, incremental: bool, reset: bool):
        X, y = validate_data(self, X, y, multi_output=True, reset=reset, **_ROWS)
        y = _one_column(y)
        if not hasattr(self, "classes_") or (not self.warm_start and not incremental):
            self._binarizer = LabelBinarizer().fit(y)
            self.classes_ = self._binarizer.classes_
        elif self.warm_start and set(found := unique_labels(y)) != set(self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous "
                f"call to fit. Previously got {self.classes_}, `y` has {found}"
            )
        elif len(np.setdiff1d(unique_labels(y), self.classes_)):
            raise ValueError(
                "`y` has classes not in `self.classes_`. "
                f"`self.classes_` has {self.classes_}. 'y' has {unique_labels(y)}."
            )
        y = self._binarizer.transform(y).astype(bool)
        return X, y.reshape(len(y), -1)

    def _validated_rows(self, X):
        return validate_data(self, X, reset=False, **_ROWS)

    def _out_activation(self) -> str:
        return "softmax" if self._binarizer.y_type_ == "multiclass" else "logistic"

    def _targets(self, y) -> np.ndarray:
        if self.out_activation_ == "softmax":
            return y.argmax(1)
        return y.astype(np.float32)

    def _decoded_targets(self, y):
        return self._binarizer.inverse_transform(y)

    def _probabilities(self, z: np.ndarray) -> np.ndarray:
        return softmax(z, axis=1) if self.out_activation_ == "softmax" else expit(z)

    def _labels(self, z: np.ndarray):
        found = self._probabilities(z)
        return self._binarizer.inverse_transform(found.ravel() if self.n_outputs_ == 1 else found)

    def _score_of(self, y, z: np.ndarray, weight) -> float:
        return accuracy_score(y, self._labels(z), sample_weight=weight)

    def predict(self, X):
        """(n,) classes, or (n, labels) 0 and 1, of rows X (n, features)."""
        return self._labels(self._raw(X))

    def predict_proba(self, X):
        """(n, classes) probabilities in the order of classes_; of several labels each its
        own."""
        z = self._raw(X)
        # Not 1 - p, which would have no digits left where p is nearly 1.
        return np.hstack([expit(-z), expit(z)]) if self.n_outputs_ == 1 else self._probabilities(z)

    def predict_log_proba(self, X):
        """(n, classes) logarithms of predict_proba, finite also where that is rounded to 0."""
        z = self._raw(X)
        if self.out_activation_ == "softmax":
            return log_softmax(z, axis=1)
        z = np.hstack([-z, z]) if self.n_outputs_ == 1 else z
        p = expit(z)
        # The logarithm of p itself where it is near 1: equal probabilities have equal logarithms.
        return np.where(p > 0.5, np.log(np.maximum(p, 0.5)), log_expit(z))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class FusedMLPRegressor(RegressorMixin, BaseFusedMLP):
    """scikit-learn's MLPRegressor, run by fused kernels: `FusedMLPRegressor().fit(X, y)`.

    Arguments, defaults and attributes are those of sklearn.neural_network.MLPRegressor of
    scikit-learn 1.9, with the exceptions and additions that FusedMLPClassifier lists. loss is
    'squared_error' (the C++ engine runs it) or 'poisson'; y may have several outputs a row.
    """

    def __init__(
        self,
        loss="squared_error",
        hidden_layer_sizes=(100,),
        activation="relu",
        *,
        solver="adam",
        alpha=0.0001,
        batch_size="auto",
        learning_rate="constant",
        learning_rate_init=0.001,
        power_t=0.5,
        max_iter=200,
        shuffle=True,
        random_state=None,
        tol=1e-4,
        verbose=False,
        warm_start=False,
        momentum=0.9,
        nesterovs_momentum=True,
        early_stopping=False,
        validation_fraction=0.1,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        n_iter_no_change=10,
        max_fun=15000,
        dropout=0.0,
        device="auto",
        backend="auto",
        engine="auto",
    ):
        self._keep_arguments(locals())

    @available_if(offers_partial_fit)
    def partial_fit(self, X, y, sample_weight=None):
        """One pass over these rows, from where the last one ended; returns self."""
        return self._fit(X, y, sample_weight, True)

    def _validated(self, X, y, incremental: bool, reset: bool):
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, reset=reset, **_ROWS)
        y = _one_column(y)
        if self.loss == "poisson" and (y < 0).any():
            raise ValueError(f"loss 'poisson' needs targets of at least 0, got {y.min()}")
        return X, y.reshape(len(y), -1)

    def _validated_rows(self, X):
        return validate_data(self, X, reset=False, **_ROWS)

    def _out_activation(self) -> str:
        return "exp" if self.loss == "poisson" else "identity"

    def _targets(self, y) -> np.ndarray:
        return np.ascontiguousarray(y)

    def _decoded_targets(self, y):
        return y

    def _values(self, z: np.ndarray) -> np.ndarray:
        found = np.exp(z) if self.out_activation_ == "exp" else z
        return found.ravel() if found.shape[1] == 1 else found

    def _score_of(self, y, z: np.ndarray, weight) -> float:
        return r2_score(y, self._values(z), sample_weight=weight)

    def predict(self, X):
        """(n,) or (n, outputs) of rows X (n, features)."""
        return self._values(self._raw(X))
