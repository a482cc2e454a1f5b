"""How a configuration is judged: by folds of the rows that it was not trained on.

A few rows are cut into five folds, and each is predicted by a model of the other four. Of more, one fifth
is held out once, and of many the models see a sample. How many are few and many depends on the time. Folds
and samples are stratified by the target, a continuous one by its order.
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
"""(predictions, targets) -> what is to be made small; predictions as of `predictions_of`."""
Parts = Sequence[tuple[Array, Array]]
"""(places among the predictions, targets there) of each part over which a loss is averaged."""
Fold = tuple[Array, Array]
"""(rows that train, rows that validate)"""
FOLDS = 5
FEW, FEW_PER_SECOND, FEWEST = 5000, 50, 500
"""Rows below which there are five folds: so many, or fewer where a second must do for more than its share."""
TRAINED_PER_SECOND, TRAINED = 200, 2000
"""Rows of the sample that trains, for each second of the search, and at least."""
VALIDATED = 10_000
"""Rows held out, at most."""


def folds_of(y: Array, seed: int, seconds: float = math.inf) -> list[Fold]:
    """What trains and what validates, for a search that may take so many seconds."""
    order = spread(y, seed)
    if len(y) < min(FEW, max(FEWEST, FEW_PER_SECOND * seconds)):
        validate = [np.sort(order[k::FOLDS]) for k in range(min(FOLDS, len(y)))]
        return [(np.setdiff1d(order, rows), rows) for rows in validate]
    held_out = np.arange(len(y)) % FOLDS == FOLDS // 2
    most = max(TRAINED, TRAINED_PER_SECOND * seconds)
    return [(np.sort(thinned(order[~held_out], most)), np.sort(thinned(order[held_out], VALIDATED)))]


def thinned(rows: Array, most: float) -> Array:
    """At most so many of the rows, evenly spread."""
    if len(rows) <= most:
        return rows
    chosen: Array = rows[np.linspace(0, len(rows) - 1, int(most)).round().astype(int)]
    return chosen


def spread(y: Array, seed: int) -> Array:
    """Rows sorted by target and shuffled within equal ones: each k-th of them is a stratified sample."""
    order = np.random.default_rng(seed).permutation(len(y))
    sorted_: Array = order[np.argsort(y[order], kind="stable")]
    return sorted_


def held_out(y: Array, share: float, seed: int, classes: bool) -> Array:
    """About this share of the rows, at most 10,000, stratified; of each class one row at least is left.

    Returns:
        bool, shape (n,); nothing is held out from fewer than 10 rows.
    """
    chosen = np.zeros(len(y), dtype=bool)
    if len(y) < 10:
        return chosen
    order, every = spread(y, seed), max(2, round(1 / share), math.ceil(len(y) / VALIDATED))
    chosen[order[every // 2 :: every]] = True
    if classes:
        chosen[order[np.unique(y[order], return_index=True)[1]]] = False
    return chosen


def rows_of(X: Any, rows: Array) -> Any:
    """The rows of an array or a frame."""
    return X.iloc[rows] if is_frame(X) else X[rows]


def fitted(model: Any, X: Any, y: Array) -> Any:
    """The model, fitted; what learners warn of, such as no convergence, is judged by the loss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(X, y)


def predictions_of(model: Any, X: Any, classes: Array | None) -> Array:
    """Probabilities of `classes`, shape (n, classes), or without them the predicted numbers, shape (n,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if classes is None:
            numbers: Array = np.asarray(model.predict(X), dtype=float).reshape(len(X))
            return numbers
        probabilities = np.zeros((len(X), len(classes)))
        probabilities[:, np.searchsorted(classes, model.classes_)] = model.predict_proba(X)
        return probabilities


def loss_of(scoring: Any, classes: Array | None) -> Loss:
    """Log loss or squared error; or the negative of one of scikit-learn's scores, by name or as a scorer."""
    if scoring is None:
        return squared_error if classes is None else lambda p, y: log_loss(p, np.searchsorted(classes, y))
    scorer = get_scorer(scoring)
    given = GivenNumbers() if classes is None else GivenProbabilities(classes)
    return lambda p, y: -float(scorer(given, p, y))


def log_loss(probabilities: Array, target: Array) -> float:
    """Mean of -log of the probability of the true class, which is at least a float32 rounding."""
    true = probabilities[np.arange(len(target)), target]
    return float(-np.log(np.clip(true, np.finfo(np.float32).eps, None)).mean())


def squared_error(numbers: Array, target: Array) -> float:
    """Mean of the squared differences."""
    return float(np.square(numbers - target).mean())


class GivenProbabilities(ClassifierMixin, BaseEstimator):
    """A classifier whose inputs are its own probabilities, so that a scorer can judge them."""

    def __init__(self, classes: Array) -> None:
        self.classes = classes
        self.classes_ = classes

    def predict_proba(self, X: Array) -> Array:
        return X

    def predict(self, X: Array) -> Array:
        predicted: Array = self.classes_[X.argmax(1)]
        return predicted


class GivenNumbers(RegressorMixin, BaseEstimator):
    """The same for numbers."""

    def predict(self, X: Array) -> Array:
        return X
