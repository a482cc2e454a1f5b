"""Split rows into folds, predict, and compute losses.

============================ ==========================================================
rows n, search of s seconds  validation
============================ ==========================================================
n < min(5000, max(500, 50s)) five folds
otherwise                    a held-out fifth, at most 10,000 rows;
                             training on a sample of at most max(2000, 200s) rows
============================ ==========================================================

Folds and samples are stratified by the class or by the sorted target.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import get_scorer

from midflight.automl.columns import is_frame

Array = np.ndarray[Any, Any]
Loss = Callable[[Array, Array], float]
"""(predictions, targets) -> loss to minimise; predictions as from `predictions_of`."""
Parts = Sequence[tuple[Array, Array]]
"""(indices into the predictions, their targets) of each part over which a loss is averaged."""
Fold = tuple[Array, Array]
"""(training rows, validation rows)"""
FOLDS = 5
FOLDS_BELOW, FOLDS_BELOW_PER_SECOND, FOLDS_BELOW_AT_LEAST = 5000, 50, 500
"""Number of rows below which there are five folds; see the table above."""
TRAIN_PER_SECOND, TRAIN_AT_LEAST = 200, 2000
"""Rows of a training sample, per second of the search and at least."""
MAX_VALID = 10_000
"""Maximal number of held-out rows."""


def folds_of(y: Array, seed: int, seconds: float = math.inf) -> list[Fold]:
    """Return the folds for a search of `seconds`; see the table above."""
    order = spread(y, seed)
    if len(y) < min(FOLDS_BELOW, max(FOLDS_BELOW_AT_LEAST, FOLDS_BELOW_PER_SECOND * seconds)):
        validate = [np.sort(order[k::FOLDS]) for k in range(min(FOLDS, len(y)))]
        return [(np.setdiff1d(order, rows), rows) for rows in validate]
    held_out = np.arange(len(y)) % FOLDS == FOLDS // 2
    most = max(TRAIN_AT_LEAST, TRAIN_PER_SECOND * seconds)
    return [(np.sort(thinned(order[~held_out], most)), np.sort(thinned(order[held_out], MAX_VALID)))]


def thinned(rows: Array, most: float) -> Array:
    """Return at most `most` of the rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    chosen: Array = rows[np.linspace(0, len(rows) - 1, int(most)).round().astype(int)]
    return chosen


def spread(y: Array, seed: int) -> Array:
    """Return row indices sorted by target, shuffled among ties; every k-th is a stratified sample."""
    order = np.random.default_rng(seed).permutation(len(y))
    sorted_: Array = order[np.argsort(y[order], kind="stable")]
    return sorted_


def held_out(y: Array, share: float, seed: int, classes: bool) -> Array:
    """Hold out a stratified share of the rows, at most 10,000; each class keeps at least one row.

    Returns:
        True for held-out rows, shape (n,); with fewer than 10 rows, none is held out.
    """
    chosen = np.zeros(len(y), dtype=bool)
    if len(y) < 10:
        return chosen
    order, every = spread(y, seed), max(2, round(1 / share), math.ceil(len(y) / MAX_VALID))
    chosen[order[every // 2 :: every]] = True
    if classes:
        chosen[order[np.unique(y[order], return_index=True)[1]]] = False
    return chosen


def rows_of(X: Any, rows: Array) -> Any:
    """Return some rows of an array or a frame."""
    return X.iloc[rows] if is_frame(X) else X[rows]


def fitted(model: Any, X: Any, y: Array) -> Any:
    """Fit a model; ignore its warnings, such as missing convergence, because the loss shows the effect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(X, y)


def predictions_of(model: Any, X: Any, classes: Array | None) -> Array:
    """Return probabilities of `classes`, shape (n, classes), or predicted numbers, shape (n,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if classes is None:
            numbers: Array = np.asarray(model.predict(X), dtype=float).reshape(len(X))
            return numbers
        probabilities = np.zeros((len(X), len(classes)))
        probabilities[:, np.searchsorted(classes, model.classes_)] = model.predict_proba(X)
        return probabilities


def loss_of(scoring: Any, classes: Array | None) -> Loss:
    """Return log loss, squared error, or the negative of a scikit-learn score (a name or a scorer)."""
    if scoring is None:
        return squared_error if classes is None else lambda p, y: log_loss(p, np.searchsorted(classes, y))
    scorer = get_scorer(scoring)
    identity = GivenNumbers() if classes is None else GivenProbabilities(classes)
    return lambda p, y: -float(scorer(identity, p, y))


def log_loss(probabilities: Array, target: Array) -> float:
    """Return the mean of -log p of the true class; p is clipped at float32's epsilon."""
    true = probabilities[np.arange(len(target)), target]
    return float(-np.log(np.clip(true, np.finfo(np.float32).eps, None)).mean())


def squared_error(numbers: Array, target: Array) -> float:
    """Return the mean of the squared differences."""
    return float(np.square(numbers - target).mean())


class GivenProbabilities(ClassifierMixin, BaseEstimator):
    """A classifier that returns its inputs as probabilities, so that a scorer can score predictions."""

    def __init__(self, classes: Array) -> None:
        self.classes = classes
        self.classes_ = classes

    def predict_proba(self, X: Array) -> Array:
        return X

    def predict(self, X: Array) -> Array:
        predicted: Array = self.classes_[X.argmax(1)]
        return predicted


class GivenNumbers(RegressorMixin, BaseEstimator):
    """A regressor that returns its inputs as predictions."""

    def predict(self, X: Array) -> Array:
        return X
