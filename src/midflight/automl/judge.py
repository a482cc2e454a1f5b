"""Evaluate pipelines on the folds within the time limit; the objective of the search.

A configuration that is behind the best one stops early, as in SMAC's intensification (Hutter et al. 2011).
Its estimated loss is the best one's plus the mean difference on the folds that both have.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

import numpy as np

from midflight.automl.columns import Columns
from midflight.automl.families import FAMILIES, Params, Task, pipeline
from midflight.automl.limit import OutOfTime, limit
from midflight.automl.validation import (
    FOLDS,
    Array,
    Fold,
    Loss,
    Parts,
    fitted,
    predictions_of,
    rows_of,
    spread,
    thinned,
)
from midflight.search.trial import Trial

PILOT = 1000
"""Rows of a first timing fit of a family, used if a fold has more than twice as many."""
REFIT_SHARE = 0.1
"""Share of the time reserved for the final fits of all leaders."""
BEST_REFIT_SHARE = 0.3
"""Maximal share of the time reserved for the final fit of the best configuration."""
LEADERS = 5
"""Best configurations that keep their predictions for an ensemble, besides the best of each family."""


class TimeIsUp(BaseException):
    """The time is up; a BaseException, so that it passes through the search like Ctrl-C."""


@dataclass(frozen=True)
class Problem:
    """A learning problem.

    Attributes:
        X: array or frame with n rows.
        y: target, shape (n,).
        task: "classification" or "regression".
        classes: sorted classes; None for regression.
        columns: kinds of the columns of X.
        folds: training and validation rows of each fold.
        loss: (predictions, targets) -> loss to minimise.
        seed: seed of the learners.
    """

    X: Any
    y: Array
    task: Task
    classes: Array | None
    columns: Columns
    folds: list[Fold]
    loss: Loss
    seed: int

    def pipeline(self, config: Params) -> Any:
        """Return the unfitted pipeline of a configuration."""
        return pipeline(self.task, config, self.columns, self.seed)

    def fit(self, config: Params, rows: Array) -> Any:
        """Return the pipeline of a configuration, fitted on `rows`."""
        return fitted(self.pipeline(config), rows_of(self.X, rows), self.y[rows])

    @property
    def parts(self) -> Parts:
        """The folds, or fifths of a single fold, as indices into `Row.predictions` with their targets."""
        sizes = [len(validating) for _, validating in self.folds]
        count = sum(sizes)
        if len(sizes) == 1:
            parts = [np.arange(k, count, FOLDS) for k in range(FOLDS)]
        else:
            parts = np.split(np.arange(count), np.cumsum(sizes)[:-1])
        target = self.y[np.concatenate([validating for _, validating in self.folds])]
        return [(part, target[part]) for part in parts]


@dataclass
class Row:
    """The evaluation of one configuration.

    Attributes:
        number: number in order of evaluation, from 0.
        config: `family`, and FAMILY.HYPERPARAMETER for each hyperparameter.
        state: "complete", "behind" (stopped early), "skipped" (too slow) or "failed".
        loss: mean over the folds; estimated if behind; infinite if skipped or failed.
        fold_losses: loss of each evaluated fold.
        fit_seconds: mean seconds per fold.
        seconds: total seconds.
        message: why it was skipped or failed.
        predictions: predictions for the validation rows of all folds; None if not complete or not kept.
    """

    number: int
    config: Params
    state: Literal["complete", "behind", "skipped", "failed"] = "complete"
    loss: float = math.inf
    fold_losses: list[float] = field(default_factory=list)
    fit_seconds: float = math.nan
    seconds: float = 0.0
    message: str = ""
    predictions: Array | None = None

    @property
    def family(self) -> str:
        return str(self.config["family"])

    def as_dict(self) -> dict[str, Any]:
        """Return the values for a leaderboard."""
        names = ("number", "family", "loss", "state", "config", "fold_losses", "seconds", "message")
        return {name: getattr(self, name) for name in names}


class Judge:
    """An objective for `midflight.search.run`.

    Args:
        problem: the learning problem.
        deadline: time of `clock` at which the final fits must be done; infinite: no time limit.
        clock: returns the time in seconds.

    Attributes:
        rows: one row per configuration, in order of evaluation.
        best: the complete row with the lowest loss; None before the first.
    """

    def __init__(
        self, problem: Problem, deadline: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.problem = problem
        self.rows: list[Row] = []
        self.best: Row | None = None
        self._clock = clock
        self._deadline = deadline
        self._seconds = deadline - clock() if math.isfinite(deadline) else 0.0
        self._fold_seconds: dict[str, list[float]] = {}

    def __call__(self, trial: Trial) -> float:
        """Return the validation loss of a configuration; infinity if it has none. Raises `TimeIsUp`."""
        known = next((row for row in self.rows if row.config == trial.params), None)
        if known is not None:
            return known.loss
        if self.best is not None and self.seconds_left <= 0:
            raise TimeIsUp
        row, began = Row(len(self.rows), dict(trial.params)), self._clock()
        try:
            self._evaluate(row)
        except OutOfTime as error:
            row.state, row.message = "skipped", str(error)
        except Exception as error:  # a learner may raise anything; the search continues
            row.state, row.message = "failed", f"{type(error).__name__}: {error}"
        if math.isnan(row.loss):
            row.loss = math.inf
        row.seconds = self._clock() - began
        self.rows.append(row)
        self._drop_predictions()
        return row.loss

    @property
    def seconds_left(self) -> float:
        """Seconds left for the search, without the time reserved for the final fits."""
        return self.seconds_to_deadline - self._reserved_seconds()

    @property
    def seconds_to_deadline(self) -> float:
        """Seconds left for the search and the final fits."""
        return self._deadline - self._clock()

    def refit_seconds(self, row: Row) -> float:
        """Estimate the seconds of a fit on all rows."""
        return self._on_all_rows(row.fit_seconds, row.family)

    def _on_all_rows(self, fold_seconds: float, family: str) -> float:
        """Extrapolate the seconds of a fit on a fold to all rows."""
        ratio = len(self.problem.y) / len(self.problem.folds[0][0])
        seconds: float = fold_seconds * ratio ** FAMILIES[family].growth
        return seconds

    def refit(self, row: Row) -> Any:
        """Return the pipeline of a row, fitted on all rows.

        If the time is too short, fit on fewer rows, but at least on as many as in the search.
        """
        p = self.problem
        rows, searched = np.arange(len(p.y)), len(p.folds[0][0])
        left, needed = self.seconds_to_deadline, self.refit_seconds(row)
        if needed > left:
            share = max(left, 0.0) / needed
            most = max(searched, len(rows) * share ** (1 / FAMILIES[row.family].growth))
            rows = thinned(spread(p.y, p.seed), most)
        return p.fit(row.config, rows)

    def leaders(self) -> list[Row]:
        """Return the rows that keep their predictions, the best first."""
        complete = sorted((r for r in self.rows if r.predictions is not None), key=lambda r: r.loss)
        best_of_each = {row.family: id(row) for row in reversed(complete)}.values()
        return [row for n, row in enumerate(complete) if n < LEADERS or id(row) in best_of_each]

    def ranked(self) -> list[Row]:
        """Return all rows sorted by state (complete, behind, skipped, failed), then by loss."""
        order = ["complete", "behind", "skipped", "failed"]
        return sorted(self.rows, key=lambda row: (order.index(row.state), row.loss))

    def _reserved_seconds(self) -> float:
        """Return the seconds reserved for the final fits."""
        if self.best is None:
            return 0.0
        all_refits = sum(map(self.refit_seconds, self.leaders()))
        best_refit = self.refit_seconds(self.best)
        return max(
            min(best_refit, BEST_REFIT_SHARE * self._seconds), min(all_refits, REFIT_SHARE * self._seconds)
        )

    def _drop_predictions(self) -> None:
        """Drop the predictions of all rows but the leaders."""
        leaders = {id(row) for row in self.leaders()}
        for row in self.rows:
            if id(row) not in leaders:
                row.predictions = None

    def _evaluate(self, row: Row) -> None:
        seconds = self._fold_seconds.setdefault(row.family, [])
        first = not seconds
        # the first model gets any time, because there must be one
        allowed = math.inf if self.best is None else self._allowed_seconds(row, first)
        predictions = []
        until = self._clock() + allowed
        for fold in self.problem.folds:
            predictions.append(self._fold(row, fold, until - self._clock(), seconds))
            if not math.isfinite(row.loss):
                raise ValueError("the loss was not finite")
            if not first and self._is_behind(row):
                row.state = "behind"
                return
        row.predictions = np.concatenate(predictions)
        if self.best is None or row.loss < self.best.loss:
            self.best = row

    def _allowed_seconds(self, row: Row, first: bool) -> float:
        """Return the time limit of a configuration.

        Raises:
            OutOfTime: a fold would take longer.
            TimeIsUp: a fold of every timed family would take longer than the search has left.
        """
        needed = self._expected_seconds(row, first)
        # it may become the best one and need a final fit
        refit = min(self._on_all_rows(needed, row.family), BEST_REFIT_SHARE * self._seconds)
        left = min(self.seconds_left, self.seconds_to_deadline - refit)
        # half the time left, so that one trial cannot use up the search; all of it for a last trial
        allowed = max(left / 2, min(left, 2 * needed))
        if needed > allowed:
            if all(fmean(s) > self.seconds_left for s in self._fold_seconds.values() if s):
                raise TimeIsUp
            raise OutOfTime(
                f"a fold would take about {needed:.3g} s, but only {allowed:.3g} s are left for it"
            )
        return allowed

    def _fold(self, row: Row, fold: Fold, allowed: float, seconds: list[float]) -> Array:
        """Fit and validate a fold; add its loss to the row and its time to `seconds`."""
        p, began = self.problem, self._clock()
        training, validating = fold
        try:
            with limit(allowed):
                predictions = predictions_of(p.fit(row.config, training), rows_of(p.X, validating), p.classes)
        finally:
            seconds.append(self._clock() - began)
        row.fold_losses.append(p.loss(predictions, p.y[validating]))
        n = len(row.fold_losses)
        row.fit_seconds = fmean(seconds[-n:])
        row.loss = fmean(row.fold_losses)
        if self.best is not None and n < len(p.folds):
            row.loss += self.best.loss - fmean(self.best.fold_losses[:n])
        return predictions

    def _is_behind(self, row: Row) -> bool:
        """Whether its only fold is worse than all of the best row's, or each of several folds is worse."""
        n = len(row.fold_losses)
        if self.best is None or n == len(self.problem.folds):
            return False
        if n == 1:
            return row.fold_losses[0] > max(self.best.fold_losses)
        return all(own > best for own, best in zip(row.fold_losses, self.best.fold_losses, strict=False))

    def _expected_seconds(self, row: Row, first: bool) -> float:
        """Estimate the seconds of a fold from earlier folds, or from a fit on `PILOT` rows; 0: unknown."""
        if not first:
            return fmean(self._fold_seconds[row.family])
        p = self.problem
        training, validating = p.folds[0]
        if not math.isfinite(self._deadline) or len(training) <= 2 * PILOT:
            return 0.0
        few, began = thinned(training, PILOT), self._clock()
        try:
            with limit(self.seconds_left / 4):
                predictions_of(p.fit(row.config, few), rows_of(p.X, thinned(validating, PILOT)), p.classes)
        finally:
            growth: float = (len(training) / len(few)) ** FAMILIES[row.family].growth
            expected = (self._clock() - began) * growth
            self._fold_seconds[row.family].append(expected)
        return expected
