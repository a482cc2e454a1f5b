"""Choose a learner and its hyperparameters together (Thornton et al. 2013), within a time limit.

An engine of `midflight.search` proposes a family of learners and its hyperparameters. `midflight.Tuner`
tunes the regularisation of networks during training. The best configuration is then fitted on all rows, with
other members of an ensemble if that is better.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import assert_all_finite, check_array, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from midflight.automl.columns import columns_of, is_frame
from midflight.automl.ensemble import choose_members
from midflight.automl.families import FAMILIES, Task, default_of, space_of
from midflight.automl.judge import Judge, Problem, TimeIsUp
from midflight.automl.network import warm_up
from midflight.automl.validation import Array, folds_of, loss_of, predictions_of
from midflight.errors import UnknownName, warn
from midflight.search.errors import SearchError
from midflight.search.search import run

MIN_ROWS = 4


class _Auto(BaseEstimator):
    """The common part of classifier and regressor."""

    def __init__(
        self,
        seconds: float | None = 60.0,
        trials: int | None = None,
        families: Sequence[str] | None = None,
        engine: str = "tpe",
        scoring: Any = None,
        ensemble: int = 8,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.seconds = seconds
        self.trials = trials
        self.families = families
        self.engine = engine
        self.scoring = scoring
        self.ensemble = ensemble
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _search(self, X: Any, y: Array, task: Task, classes: Array | None, began: float) -> None:
        """Search and fit the ensemble; `began` is the time when `fit` was called."""
        names = self._names()
        if len(y) < MIN_ROWS:
            raise ValueError(f"X must have at least {MIN_ROWS} rows, but n_samples = {len(y)}.")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        seconds = math.inf if self.seconds is None else self.seconds
        problem = Problem(
            X=X, y=y, task=task, classes=classes, columns=columns_of(X), folds=folds_of(y, seed, seconds),
            loss=loss_of(self.scoring, classes), seed=seed,
        )  # fmt: skip
        warm_up()
        judge = Judge(problem, deadline=began + seconds)
        interrupted = False
        try:
            run(
                judge, space_of(names), engine=self.engine, trials=self.trials, seconds=self.seconds,
                epochs=1, seed=seed, first=[default_of(name) for name in names],
            )  # fmt: skip
        except TimeIsUp:
            pass
        except KeyboardInterrupt:
            if judge.best is None:
                raise
            interrupted = True
            warn(
                f"interrupted after {len(judge.rows)} configurations; the best one so far is fitted.",
            )
        if judge.best is None:
            reason = judge.rows[-1].message if judge.rows else "there was no trial"
            raise SearchError(f"at least one configuration must train, but none did; the last: {reason}.")
        self._finish(judge, alone=interrupted)

    def _names(self) -> list[str]:
        """Check the arguments and return the families to search."""
        if self.ensemble < 1:
            raise SearchError(f"ensemble >= 1 must hold, but ensemble={self.ensemble}; pass 1 for one model.")
        names = list(FAMILIES) if self.families is None else list(self.families)
        for name in names:
            if name not in FAMILIES:
                raise UnknownName("a family", name, FAMILIES)
        if not names:
            raise SearchError(f"families must name at least one of {', '.join(FAMILIES)}, but is empty.")
        return names

    def _finish(self, judge: Judge, alone: bool) -> None:
        """Fit the best configuration on all rows, then the other members while time is left."""
        assert judge.best is not None
        chosen = [judge.best] if alone else choose_members(judge, self.ensemble)
        self.best_params_ = judge.best.config
        self.best_estimator_ = judge.refit(judge.best)
        self.members_ = []
        weights = Counter(map(id, chosen))
        for row in {id(row): row for row in chosen}.values():
            if row is judge.best:
                self.members_.append((weights[id(row)], self.best_estimator_))
            elif judge.refit_seconds(row) <= judge.seconds_to_deadline:
                self.members_.append((weights[id(row)], judge.refit(row)))
            else:
                del weights[id(row)]
        self.leaderboard_ = [{**row.as_dict(), "weight": weights[id(row)]} for row in judge.ranked()]

    def _predictions(self, X: Any) -> Array:
        """Return the weighted mean of the members' predictions, see `predictions_of`."""
        check_is_fitted(self)
        X = self._table(X)
        weights, models = zip(*self.members_, strict=True)
        predictions = [predictions_of(model, X, getattr(self, "classes_", None)) for model in models]
        mean: Array = np.average(predictions, axis=0, weights=weights)
        return mean

    def _checked(self, X: Any, y: Any) -> tuple[Any, Array]:
        """Validate X as in `_table`, and y, shape (n,), without missing values."""
        self._columns = columns_of(X) if is_frame(X) else None
        if not self._has_categories:
            X, y = validate_data(self, X, y, dtype=np.float64, ensure_all_finite="allow-nan")
            return X, y
        validate_data(self, X, y, skip_check_array=True)
        y = column_or_1d(y, warn=True)
        check_consistent_length(X, y)
        assert_all_finite(y, input_name="y")
        return self._with_floats(X), y

    def _table(self, X: Any) -> Any:
        """Return X as floats that may be NaN, or as a frame if `fit` saw categories."""
        if not self._has_categories:
            return validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan", reset=False)
        if not is_frame(X):
            raise TypeError(
                f"X must be a pandas frame with the columns seen in fit, but got a {type(X).__name__}."
            )
        validate_data(self, X, skip_check_array=True, reset=False)
        return self._with_floats(X)

    @property
    def _has_categories(self) -> bool:
        return self._columns is not None and bool(self._columns.categories)

    def _with_floats(self, X: Any) -> Any:
        """Return the frame with its numbers as floats, finite or NaN."""
        numbers = list(self._columns.numbers) if self._columns else []
        X = X.copy()
        if numbers:
            values = check_array(X.iloc[:, numbers], dtype=np.float64, ensure_all_finite="allow-nan")
            for column, floats in zip(numbers, values.T, strict=True):
                X.isetitem(column, floats)
        return X


class AutoClassifier(ClassifierMixin, _Auto):
    """Find a classifier for a table: its family and its hyperparameters, within a time limit.

    Each family is tried with its defaults, then an engine searches all families together. Validation uses
    five stratified folds below 5,000 rows (the limit is lower for a short search), else one held-out fifth.
    Ctrl-C during `fit` ends the search and fits the best configuration so far.

    Args:
        seconds: time limit of `fit`, including the final fits; None: only `trials` limits it. The first trial
            and the final fit of the best configuration may exceed it; docs/automl.md shows measured times.
        trials: maximal number of configurations. `seconds=None` with an int `random_state` makes fits repeat.
        families: names from `midflight.automl.FAMILIES`; None: all.
        engine: engine of `midflight.search`: "tpe", "smac" or "random".
        scoring: scikit-learn score to maximise, as a name or scorer; None: negative log loss.
        ensemble: maximal number of members, which are chosen greedily with repetition and averaged. The
            ensemble is used only if it is better on validation data that did not choose it. 1: no ensemble.
        random_state: seed of folds, engine and learners.

    X is an array of numbers, or a pandas frame with numbers and categories (strings, categoricals). Both may
    have missing values. y has at least two classes.

    Attributes:
        classes_: the classes, sorted, shape (classes,).
        best_estimator_: fitted pipeline of the best configuration.
        best_params_: the best configuration.
        members_: (weight, fitted pipeline) of each member, the best configuration first.
        leaderboard_: one dict per configuration, the best first; `pandas.DataFrame` accepts the list.

    Raises:
        SearchError: neither seconds nor trials is given, or no configuration could be trained.
        UnknownName: a family or the engine does not exist.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Search, then fit on all rows: X, shape (n, features), and y, shape (n,)."""
        began = time.monotonic()
        X, y = self._checked(X, y)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least two classes, but got one class, {self.classes_[0]}.")
        self._search(X, y, "classification", self.classes_, began)
        return self

    def predict_proba(self, X: Any) -> Array:
        """Return the probability of each class, shape (n, classes)."""
        return self._predictions(X)

    def predict(self, X: Any) -> Array:
        """Return the most probable class, shape (n,)."""
        most_probable = self._predictions(X).argmax(1)
        predicted: Array = self.classes_[most_probable]
        return predicted


class AutoRegressor(RegressorMixin, _Auto):
    """Find a regressor for a table: its family and its hyperparameters, within a time limit.

    Like `AutoClassifier`, with squared error in place of log loss, and folds stratified by the sorted target.

    Args:
        seconds, trials, families, engine, scoring, ensemble, random_state: as for `AutoClassifier`.

    Attributes:
        best_estimator_, best_params_, members_, leaderboard_: as for `AutoClassifier`.

    Raises:
        SearchError, UnknownName: as for `AutoClassifier`.
        TypeError: y does not hold numbers.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Search, then fit on all rows: X, shape (n, features), and y, shape (n,)."""
        began = time.monotonic()
        X, y = self._checked(X, y)
        try:
            y = y.astype(np.float64)
        except (TypeError, ValueError):
            raise TypeError(
                f"y must hold numbers for AutoRegressor, but its first value is {y[0]!r}; use AutoClassifier."
            ) from None
        self._search(X, y, "regression", None, began)
        return self

    def predict(self, X: Any) -> Array:
        """Return the expected target, shape (n,)."""
        return self._predictions(X)
