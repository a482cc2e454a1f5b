"""Choose the algorithm and its configuration together (Thornton et al. 2013), within a time.

An engine of `midflight.search` proposes a family of learners and what belongs to it; what is continuous
in a network is tuned by `midflight.Tuner` while it trains. The best configuration is then fitted on all
rows, and a few others with it where they are better together.
"""

import math
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import assert_all_finite, check_array, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from midflight.automl.columns import columns_of, is_frame
from midflight.automl.ensemble import together
from midflight.automl.families import FAMILIES, Task, default_of, space_of
from midflight.automl.judge import Enough, Judge, Problem
from midflight.automl.network import warm_up
from midflight.automl.validation import Array, folds_of, loss_of, predictions_of
from midflight.errors import UnknownName
from midflight.search.errors import SearchError
from midflight.search.search import run

FEWEST = 4
"""Rows without which there is nothing to compare."""


class _Auto(BaseEstimator):
    """What the two have in common: all but the target."""

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
        """Find the members; `began` is when `fit` was called."""
        names = self._names()
        if len(y) < FEWEST:
            raise ValueError(f"X must have at least {FEWEST} rows, but n_samples = {len(y)}.")
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
        except Enough:
            pass
        except KeyboardInterrupt:
            if judge.best is None:
                raise
            interrupted = True
            warnings.warn(
                f"interrupted after {len(judge.rows)} configurations; the best one so far is fitted.",
                stacklevel=3,
            )
        if judge.best is None:
            said = judge.rows[-1].message if judge.rows else "there was no trial"
            raise SearchError(f"at least one configuration must train, but none did; the last: {said}.")
        self._finish(judge, alone=interrupted)

    def _names(self) -> list[str]:
        """The families to be searched; raises for arguments that do not fit."""
        if self.seconds is None and self.trials is None:
            raise SearchError("one of seconds and trials must be given, or the search would never end.")
        if self.ensemble < 1:
            raise SearchError(f"ensemble >= 1 must hold, but ensemble={self.ensemble}; 1 is one model alone.")
        names = list(FAMILIES) if self.families is None else list(self.families)
        for name in names:
            if name not in FAMILIES:
                raise UnknownName("a family", name, FAMILIES)
        if not names:
            raise SearchError(f"families must name one of {', '.join(FAMILIES)} at least, but is empty.")
        return names

    def _finish(self, judge: Judge, alone: bool) -> None:
        """Fit the best configuration on all rows, and others that help it while the time allows."""
        assert judge.best is not None
        chosen = [judge.best] if alone else together(judge, self.ensemble)
        self.best_params_ = judge.best.config
        self.best_estimator_ = judge.last_fit(judge.best)
        self.members_ = []
        weights = Counter(map(id, chosen))
        for row in {id(row): row for row in chosen}.values():
            if row is judge.best:
                self.members_.append((weights[id(row)], self.best_estimator_))
            elif judge.refit_seconds(row) <= judge.seconds_left_in_all:
                self.members_.append((weights[id(row)], judge.last_fit(row)))
            else:
                del weights[id(row)]
        self.leaderboard_ = [{**row.shown(), "weight": weights[id(row)]} for row in judge.ranked()]

    def _predictions(self, X: Any) -> Array:
        """Of the members, on average; as of `predictions_of`."""
        check_is_fitted(self)
        X = self._table(X)
        weights, models = zip(*self.members_, strict=True)
        predictions = [predictions_of(model, X, getattr(self, "classes_", None)) for model in models]
        mean: Array = np.average(predictions, axis=0, weights=weights)
        return mean

    def _checked(self, X: Any, y: Any) -> tuple[Any, Array]:
        """X as `_table` gives it, and y, shape (n,), without gaps."""
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
        """Floats that may have gaps; or, where `fit` saw categories, a frame."""
        if not self._has_categories:
            return validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan", reset=False)
        if not is_frame(X):
            raise TypeError(
                f"X must be a pandas frame with the columns seen in fit, but is a {type(X).__name__}."
            )
        validate_data(self, X, skip_check_array=True, reset=False)
        return self._with_floats(X)

    @property
    def _has_categories(self) -> bool:
        return self._columns is not None and bool(self._columns.categories)

    def _with_floats(self, X: Any) -> Any:
        """The frame, its numbers as floats, finite or NaN."""
        numbers = list(self._columns.numbers) if self._columns else []
        X = X.copy()
        if numbers:
            values = check_array(X.iloc[:, numbers], dtype=np.float64, ensure_all_finite="allow-nan")
            for column, of_column in zip(numbers, values.T, strict=True):
                X.isetitem(column, of_column)
        return X


class AutoClassifier(ClassifierMixin, _Auto):
    """Finds a classifier for a table: which family, and how it is configured, within a time.

    Families are tried at their defaults first, then an engine searches them all together. Each configuration
    is judged by five stratified folds if there are fewer than 5,000 rows, else by a fifth that is held out.
    Ctrl-C in `fit` ends the search and fits the best one so far.

    Args:
        seconds: for `fit`, the last fits included; None if only trials limit it. Only the first trial and
            the fit of the best configuration take what they take; see docs/automl.md for what was measured.
        trials: configurations at most. With `seconds=None` and an int as `random_state` two fits are equal.
        families: names from `midflight.automl.FAMILIES`; all of them if None.
        engine: of `midflight.search`: "tpe", "smac" or "random".
        scoring: a score of scikit-learn to be made large, by name or as a scorer; log loss if None.
        ensemble: members at most, chosen greedily with repetition and averaged, and used only if they are
            better on validation data that did not choose them. 1 is the best configuration alone.
        random_state: seed of the folds, the engine and the learners.

    X may be an array of numbers or a pandas frame with categories (strings, categoricals); both may have
    gaps. y holds two classes or more.

    Attributes:
        classes_: shape (classes,).
        best_estimator_: the pipeline of the best configuration, fitted on all rows.
        best_params_: the configuration.
        members_: (weight, fitted pipeline) of each member, the best configuration first.
        leaderboard_: a dict for each configuration tried, the best first, as `pandas.DataFrame` takes them.

    Raises:
        SearchError: neither seconds nor trials is given, or no configuration could be trained.
        UnknownName: there is no such family or engine.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Search, then fit the best on X, shape (n, features), and y, shape (n,)."""
        began = time.monotonic()
        X, y = self._checked(X, y)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least two classes, but got one class, {self.classes_[0]}.")
        self._search(X, y, "classification", self.classes_, began)
        return self

    def predict_proba(self, X: Any) -> Array:
        """Probability of each class, shape (n, classes)."""
        return self._predictions(X)

    def predict(self, X: Any) -> Array:
        """The most probable class, shape (n,)."""
        most_probable = self._predictions(X).argmax(1)
        predicted: Array = self.classes_[most_probable]
        return predicted


class AutoRegressor(RegressorMixin, _Auto):
    """Finds a regressor for a table: which family, and how it is configured, within a time.

    As `AutoClassifier`, with the squared error in place of the log loss, and folds spread evenly over the
    sorted target.

    Args:
        seconds, trials, families, engine, scoring, ensemble, random_state: as for `AutoClassifier`.

    Attributes:
        best_estimator_, best_params_, members_, leaderboard_: as for `AutoClassifier`.

    Raises:
        SearchError, UnknownName: as for `AutoClassifier`.
        TypeError: y does not hold numbers.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Search, then fit the best on X, shape (n, features), and y, shape (n,)."""
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
        """The expected target, shape (n,)."""
        return self._predictions(X)
