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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import get_scorer
from sklearn.utils.multiclass import check_classification_targets
from threadpoolctl import ThreadpoolController

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


@cache
def _pools() -> ThreadpoolController:
    """Return the thread pools of this process; searching for them takes 10 ms or more."""
    return ThreadpoolController()


@contextmanager
def our_settings(threads: int) -> Iterator[None]:
    """Use `threads` threads, no warnings and scikit-learn's defaults, whatever the caller has set.

    A learner's warning, such as missing convergence, is ignored, because the loss shows the effect.
    """
    before = torch.get_num_threads()
    defaults = {"assume_finite": False, "transform_output": "default", "enable_metadata_routing": False}
    try:
        with (
            warnings.catch_warnings(),
            np.errstate(all="ignore"),
            sklearn.config_context(**defaults),
            _pools().limit(limits=threads),
        ):
            warnings.simplefilter("ignore")
            torch.set_num_threads(threads)
            yield
    finally:
        torch.set_num_threads(before)


def predictions_of(model: Any, X: Array, classes: Array | None) -> Array:
    """Return probabilities of `classes`, shape (n, classes), or predicted numbers, shape (n,)."""
    if classes is None:
        numbers: Array = np.asarray(model.predict(X), dtype=float).reshape(len(X))
        return numbers
    probabilities = np.zeros((len(X), len(classes)))
    probabilities[:, np.searchsorted(classes, model.classes_)] = model.predict_proba(X)
    return probabilities


def loss_of(scoring: Any, classes: Array | None) -> Loss:
    """Return log loss, squared error, or the negative of a scikit-learn score (a name or a scorer).

    A score that needs all classes gets one further row for each class that has none, predicted perfectly.
    """
    if scoring is None:
        return squared_error if classes is None else lambda p, y: log_loss(p, np.searchsorted(classes, y))
    scorer = get_scorer(scoring)
    if classes is None:
        return lambda p, y: -float(scorer(Given(), p, y))

    def loss(probabilities: Array, target: Array) -> float:
        absent = np.setdiff1d(np.arange(len(classes)), np.searchsorted(classes, target))
        try:
            score = float(scorer(GivenClassifier(classes), probabilities, target))
        except ValueError:
            if not len(absent):
                raise
            score = math.nan
        if math.isnan(score) and len(absent):
            padded = np.vstack([probabilities, np.eye(len(classes))[absent]])
            score = float(scorer(GivenClassifier(classes), padded, np.append(target, classes[absent])))
        return -score

    return loss


def log_loss(probabilities: Array, target: Array) -> float:
    """Return the mean of -log p of the true class; p is clipped at float32's epsilon."""
    true = probabilities[np.arange(len(target)), target]
    return float(-np.log(np.clip(true, np.finfo(np.float32).eps, None)).mean())


def squared_error(numbers: Array, target: Array) -> float:
    """Return the mean of the squared differences."""
    return float(np.square(numbers - target).mean())


class Given(RegressorMixin, BaseEstimator):
    """A regressor that returns its inputs as predictions, so that a scorer can score predictions."""

    def predict(self, X: Array) -> Array:
        return X


class Classifies(ClassifierMixin):
    """Predict the most probable class; a subclass defines `predict_proba`."""

    classes_: Array

    def _codes(self, y: Array) -> Array:
        """Store the sorted classes of y; return the position of each label among them, shape (n,)."""
        check_classification_targets(y)
        codes: Array
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least two classes, but got one class, {self.classes_[0]}.")
        return codes

    def predict(self, X: Any) -> Array:
        """Return the most probable class, shape (n,)."""
        most_probable: Array = self.predict_proba(X).argmax(1)
        return self.classes_[most_probable]


class GivenClassifier(Classifies, BaseEstimator):
    """A classifier that returns its inputs as probabilities."""

    def __init__(self, classes: Array) -> None:
        self.classes_ = classes

    def predict_proba(self, X: Array) -> Array:
        return X
