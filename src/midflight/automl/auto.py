"""Choose a learner and its hyperparameters together (Thornton et al. 2013), within a time limit.

An engine of `midflight.search` proposes a family of learners and its hyperparameters. `midflight.Tuner`
tunes the regularisation of networks during training. The best configuration is then fitted on all rows, with
other members of an ensemble if that is better.
"""

import math
import time
from collections.abc import Iterable
from contextlib import suppress
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
from joblib import effective_n_jobs
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import Pipeline
from sklearn.utils import assert_all_finite, check_random_state, column_or_1d
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from midflight.automl.families import FAMILIES, default_of, space_of
from midflight.automl.judge import Judge, Problem, Row, SearchEnds
from midflight.automl.table import NUMBER, Table, is_frame, number, scaled
from midflight.automl.validation import (
    Array,
    Classifies,
    Loss,
    folds_of,
    loss_of,
    our_settings,
    predictions_of,
    spread,
    thinned,
)
from midflight.errors import UnknownName, warn
from midflight.search.errors import SearchError
from midflight.search.search import run

ENGINES = ("random", "smac", "tpe")
MIN_ROWS = 4
GAPS = ("NAType", "NaTType")
"""Types of pandas' gaps, by name, because pandas is optional."""
ARGUMENTS = {
    "seconds": (Real, "a number", "> 0"),
    "trials": (Integral, "a whole number", "> 0"),
    "ensemble": (Integral, "a whole number", ">= 1"),
    "n_jobs": (Integral, "a whole number", "!= 0"),
}
"""Name -> its type, the type in words, and its bound."""
STOPGAP_ROWS, STOPGAP_CELLS = 1000, 200_000
"""Maximal size of the table of nearest neighbours that is used if nothing could be trained in time."""


class _Auto(BaseEstimator):
    """The common part of classifier and regressor."""

    def __init__(
        self,
        seconds: float | None = 60.0,
        trials: int | None = None,
        families: Iterable[str] | None = None,
        engine: str = "tpe",
        scoring: Any = None,
        ensemble: int = 8,
        n_jobs: int | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.seconds = seconds
        self.trials = trials
        self.families = families
        self.engine = engine
        self.scoring = scoring
        self.ensemble = ensemble
        self.n_jobs = n_jobs
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _search(self, X: Array, y: Array, classes: Array | None, began: float) -> None:
        """Search and fit the ensemble; `began` is the time when `fit` was called."""
        names = self._names()
        if len(y) < MIN_ROWS:
            raise ValueError(f"X must have at least {MIN_ROWS} rows, but n_samples = {len(y)}.")
        try:
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        except ValueError as error:
            raise SearchError(
                f"random_state must be a seed, but random_state={self.random_state}: {error}."
            ) from None
        seconds = math.inf if self.seconds is None else float(self.seconds)
        problem = Problem(
            X=X, y=y, classes=classes, categories=list(self._reader.codes_),
            folds=folds_of(y, seed, seconds), loss=self._loss(y, classes), seed=seed,
            threads=effective_n_jobs(self.n_jobs),
        )  # fmt: skip
        judge = Judge(problem, began + seconds)
        try:
            with suppress(SearchEnds):
                run(
                    judge, space_of(names), engine=self.engine, trials=self.trials, seconds=self.seconds,
                    epochs=1, seed=seed, first=[default_of(name) for name in names],
                )  # fmt: skip
            members = judge.final(self.ensemble)
        except KeyboardInterrupt:
            if not judge.kept:
                raise KeyboardInterrupt(
                    "fit was interrupted before a configuration was trained; it must be called again."
                ) from None
            warn(f"interrupted after {len(judge.rows)} configurations; the best model so far is used.")
            members = judge.kept
        if not members and judge.rows and all(row.state == "failed" for row in judge.rows):
            raise SearchError(
                f"at least one configuration must train, but none did; the last: {judge.rows[-1].message}."
            )
        if judge.best is None:
            warn(
                f"no configuration was validated within seconds={self.seconds}, so the model is poor; "
                "raise seconds."
            )
        members = members or [(Row(-1, {}), 1, self._stopgap(problem))]
        weights = {row.number: weight for row, weight, _ in members}
        models = [Pipeline([("table", self._reader), *model.steps]) for _, _, model in members]
        self.__dict__.update(  # at once, so that Ctrl-C leaves all or nothing
            members_=[(weight, model) for (_, weight, _), model in zip(members, models, strict=True)],
            best_estimator_=models[0],
            best_params_=members[0][0].config,
            leaderboard_=[{**r.as_dict(), "weight": weights.get(r.number, 0)} for r in judge.leaderboard()],
        )

    def _names(self) -> list[str]:
        """Check the arguments and return the families to search."""
        for name, (kind, words, bound) in ARGUMENTS.items():
            value = getattr(self, name)
            if value is None and name != "ensemble":
                continue
            if not isinstance(value, kind) or isinstance(value, bool) or math.isnan(value):
                raise SearchError(f"{name} must be {words}, but {name}={value!r}.")
            if value == 0 or (value < 0 and name != "n_jobs"):
                raise SearchError(f"{name} {bound} must hold, but {name}={value}.")
        if self.engine not in ENGINES:
            raise UnknownName("engine", self.engine, ENGINES)
        names = FAMILIES if self.families is None else self.families
        if (
            isinstance(names, str)
            or not isinstance(names, Iterable)
            or not all(isinstance(n, str) for n in names)
        ):
            raise SearchError(f"families must be a list of names, but families={self.families!r}.")
        names = list(dict.fromkeys(names))
        for name in names:
            if name not in FAMILIES:
                raise UnknownName("a family", name, FAMILIES)
        if not names:
            raise SearchError(f"families must name at least one of {', '.join(FAMILIES)}, but is empty.")
        return names

    def _loss(self, y: Array, classes: Array | None) -> Loss:
        """Return the loss, after a trial on uniform predictions."""
        some = y[thinned(np.arange(len(y)), STOPGAP_ROWS)]
        guess = (
            np.full(len(some), y.mean())
            if classes is None
            else np.full((len(some), len(classes)), 1 / len(classes))
        )
        try:
            with our_settings(1):
                loss = loss_of(self.scoring, classes)
                loss(guess, some)
        except Exception as error:
            raise SearchError(
                f"scoring must score predictions of this target, but scoring={self.scoring!r}: {error}"
            ) from error
        return loss

    def _stopgap(self, problem: Problem) -> Pipeline:
        """Return nearest neighbours of a few rows, which take no time to fit."""
        learner = KNeighborsRegressor() if problem.classes is None else KNeighborsClassifier()
        rows = min(STOPGAP_ROWS, max(MIN_ROWS, STOPGAP_CELLS // problem.X.shape[1]))
        few = thinned(spread(problem.y, problem.seed), rows)
        learner.set_params(n_neighbors=min(5, len(few)))
        model = Pipeline([("columns", scaled(problem.categories, "standard")), ("learner", learner)])
        return problem.fit(model, few)

    def _predictions(self, X: Any) -> Array:
        """Return the weighted mean of the members' predictions, see `predictions_of`."""
        check_is_fitted(self, "members_")
        X = self._read(X)
        with our_settings(effective_n_jobs(self.n_jobs)):
            predictions = [
                predictions_of(m[1:], X, getattr(self, "classes_", None)) for _, m in self.members_
            ]
        mean: Array = np.average(predictions, axis=0, weights=[weight for weight, _ in self.members_])
        return mean

    def _checked(self, X: Any, y: Any) -> tuple[Array, Array]:
        """Return X as floats, shape (n, features), and y, shape (n,), without gaps; decide the types of X."""
        self.__dict__.pop("members_", None)  # a fit that fails must not leave a model of other columns
        self._reader = Table().fit(X)
        floats = self._read(X, reset=True)
        validate_data(self, X, y, skip_check_array=True)
        y = column_or_1d(_labels(y), warn=True)
        check_consistent_length(floats, y)
        assert_all_finite(y, input_name="y")
        return floats, y

    def _read(self, X: Any, reset: bool = False) -> Array:
        """Return X as floats by the types seen in `fit`, after scikit-learn's checks of names and numbers."""
        if is_frame(X):
            validate_data(self, X, skip_check_array=True, reset=reset)
        floats = self._reader.transform(X)
        if not is_frame(X):
            validate_data(self, X, skip_check_array=True, reset=reset)
        return floats


def _labels(y: Any) -> Array:
    """Return y as an array of one type."""
    values = np.asarray(y, dtype=object if isinstance(y, list | tuple) else None)  # no text from NaN or 1
    if values.dtype.kind in "mMcV":
        raise TypeError(f"y must hold numbers or labels, but its type is {values.dtype}; convert it.")
    if values.dtype.kind not in "OT":
        return values
    flat = values.ravel().tolist()
    gaps = [v for v in flat if v is None or type(v).__name__ in GAPS or (isinstance(v, Real) and v != v)]
    if gaps:
        raise ValueError(
            f"y must not have gaps, but contains {gaps[0]!r} (NaN, None or NA); drop these rows."
        )
    if all(isinstance(v, NUMBER) for v in flat):
        numbers = np.array(flat).reshape(values.shape)
        if numbers.dtype == object and None not in (floats := [number(v) for v in flat]):
            numbers = np.array(floats).reshape(values.shape)
        return numbers
    others = [v for v in flat if not isinstance(v, str)]
    if others:
        raise TypeError(
            f"y must hold only text or only numbers, but holds {flat[0]!r} and {others[0]!r}, a "
            f"{type(others[0]).__name__}; convert it."
        )
    return values.astype(object)


class AutoClassifier(Classifies, _Auto):
    """Find a classifier for a table: its family and its hyperparameters, within a time limit.

    Each family is tried with its defaults, then an engine searches all families together. Validation uses
    five stratified folds below 5,000 rows (the limit is lower for a short search), else one held-out fifth.
    Ctrl-C during `fit` ends the search and keeps the best model so far.

    Args:
        seconds: time limit of `fit`, final fits included. On Linux each fit runs in a fork of this process,
            which is killed when its time is over. None: fits run here, only `trials` limits them, and fits
            with one int as `random_state` are equal.
        trials: maximal number of configurations.
        families: names from `midflight.automl.FAMILIES`; None: all.
        engine: engine of `midflight.search`: "tpe", "smac" or "random".
        scoring: scikit-learn score to maximise, as a name or scorer; None: negative log loss.
        ensemble: maximal number of members, which are chosen greedily with repetition and averaged. The
            ensemble is used only if it is better on validation data that did not choose it. 1: no ensemble.
        n_jobs: threads of each fit; None: one, -1: all.
        random_state: seed of folds, engine and learners.

    X is an array of numbers, or a pandas frame with numbers and categories (strings, categoricals). Both may
    have missing values. `fit` decides the types, see `midflight.automl.table`. y has at least two classes.

    Attributes:
        classes_: the classes, sorted, shape (classes,).
        best_estimator_: fitted pipeline of the best configuration.
        best_params_: the best configuration; empty if none was trained in time.
        members_: (weight, fitted pipeline) of each member, the best configuration first.
        leaderboard_: one dict per configuration, the best first; `pandas.DataFrame` accepts the list.

    Raises:
        SearchError: an argument is invalid, or no configuration could be trained.
        UnknownName: a family or the engine does not exist.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Search, then fit on all rows: X, shape (n, features), and y, shape (n,)."""
        began = time.monotonic()
        X, y = self._checked(X, y)
        self._codes(y)
        self._search(X, y, self.classes_, began)
        return self

    def predict_proba(self, X: Any) -> Array:
        """Return the probability of each class, shape (n, classes)."""
        return self._predictions(X)


class AutoRegressor(RegressorMixin, _Auto):
    """Find a regressor for a table: its family and its hyperparameters, within a time limit.

    Like `AutoClassifier`, with squared error in place of log loss, and folds stratified by the sorted target.

    Args:
        seconds, trials, families, engine, scoring, ensemble, n_jobs, random_state: as for `AutoClassifier`.

    Attributes:
        best_estimator_, best_params_, members_, leaderboard_: as for `AutoClassifier`.

    Raises:
        SearchError, UnknownName: as for `AutoClassifier`.
        TypeError: y does not hold numbers.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Search, then fit on all rows: X, shape (n, features), and y, shape (n,), which must vary."""
        began = time.monotonic()
        X, y = self._checked(X, y)
        try:
            y = y.astype(np.float64)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(
                f"y must hold numbers for AutoRegressor, but its first value is {y[0]!r}; use AutoClassifier."
            ) from None
        assert_all_finite(y, input_name="y")
        if np.ptp(y) == 0 and len(y) > 1:
            raise ValueError(f"y must vary, but each value is {y[0]}.")
        self._search(X, y, None, began)
        return self

    def predict(self, X: Any) -> Array:
        """Return the expected target, shape (n,)."""
        return self._predictions(X)
