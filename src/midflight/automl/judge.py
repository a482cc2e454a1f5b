"""The judge of a search over pipelines: fits each configuration on the folds, and keeps to the time.

A configuration that falls behind the best one is given up early, as SMAC's intensification does
(Hutter et al. 2011). Its loss is then the best one's plus the mean difference on the folds that both saw.
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
"""Rows on which a family is timed before its first fold, if a fold has more than twice as many."""
MARGIN = 0.1
"""Share of the time that is kept for the last fits if there are several."""
MOST_LAST = 0.3
"""The same for that of the best one, if it takes so long."""
KEPT = 5
"""So many of the best configurations, and the best of each family, keep their predictions for an ensemble."""


class Enough(BaseException):
    """The time is up; passes through a search as Ctrl-C does."""


@dataclass(frozen=True)
class Problem:
    """What is to be learned.

    Attributes:
        X: an array or a frame of n rows.
        y: shape (n,).
        task: "classification" or "regression".
        classes: sorted; None for a regression.
        columns: which of X are numbers, which categories.
        folds: rows that train and rows that validate.
        loss: (predictions, targets) -> what is to be made small.
        seed: of the learners.
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
        """The unfitted pipeline of a configuration."""
        return pipeline(self.task, config, self.columns, self.seed)

    def fit(self, config: Params, rows: Array) -> Any:
        """The pipeline of a configuration, fitted on these rows."""
        return fitted(self.pipeline(config), rows_of(self.X, rows), self.y[rows])

    @property
    def parts(self) -> Parts:
        """The folds as they lie one after the other in `Row.predictions`; a single one is cut in five."""
        sizes = [len(validating) for _, validating in self.folds]
        count = sum(sizes)
        if len(sizes) == 1:
            places = [np.arange(k, count, FOLDS) for k in range(FOLDS)]
        else:
            places = np.split(np.arange(count), np.cumsum(sizes)[:-1])
        target = self.y[np.concatenate([validating for _, validating in self.folds])]
        return [(place, target[place]) for place in places]


@dataclass
class Row:
    """What is known of one configuration.

    Attributes:
        number: from 0, in the order of time.
        config: `family`, and `family.name` for each hyperparameter.
        state: "complete", "behind" if it was given up, "skipped" for want of time, or "failed".
        loss: mean over the folds; estimated if it was given up; infinite without any.
        fold_losses: on the folds it saw.
        fit_seconds: of one fold, on average.
        seconds: in all.
        message: why it was skipped or failed.
        predictions: of the rows of all folds, in their order; None if not complete, or no longer kept.
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

    def shown(self) -> dict[str, Any]:
        """As plain values, for a leaderboard."""
        names = ("number", "family", "loss", "state", "config", "fold_losses", "seconds", "message")
        return {name: getattr(self, name) for name in names}


class Judge:
    """An objective for `midflight.search.run`.

    Args:
        problem: what is to be learned.
        deadline: on the clock, last fits included; infinite if only trials limit the search.

    Attributes:
        rows: one for each configuration, in the order of time.
        best: the complete one of least loss; None before the first.
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
        """The validation loss of a configuration; infinite if it has none. Raises `Enough`."""
        known = next((row for row in self.rows if row.config == trial.params), None)
        if known is not None:
            return known.loss
        if self.best is not None and self.seconds_left <= 0:
            raise Enough
        row, began = Row(len(self.rows), dict(trial.params)), self._clock()
        try:
            self._judge(row)
        except OutOfTime as error:
            row.state, row.message = "skipped", str(error)
        except Exception as error:  # whatever a learner raises is its own loss, not the search's end
            row.state, row.message = "failed", f"{type(error).__name__}: {error}"
        if math.isnan(row.loss):
            row.loss = math.inf
        row.seconds = self._clock() - began
        self.rows.append(row)
        self._forget()
        return row.loss

    @property
    def seconds_left(self) -> float:
        """For the search; time for the last fits is put aside."""
        return self._deadline - self._last_fits() - self._clock()

    @property
    def seconds_left_in_all(self) -> float:
        """Until the deadline."""
        return self._deadline - self._clock()

    def refit_seconds(self, row: Row) -> float:
        """What fitting on all rows will take, about."""
        return self._on_all_rows(row.fit_seconds, row.family)

    def _on_all_rows(self, seconds: float, family: str) -> float:
        """What a fit of so many seconds in the search takes on all rows, about."""
        more = len(self.problem.y) / len(self.problem.folds[0][0])
        longer: float = seconds * more ** FAMILIES[family].growth
        return longer

    def last_fit(self, row: Row) -> Any:
        """The pipeline of a row, fitted on all rows; on fewer if the time left is not enough for them.

        They are never fewer than in the search.
        """
        p = self.problem
        rows, searched = np.arange(len(p.y)), len(p.folds[0][0])
        left, needed = self._deadline - self._clock(), self.refit_seconds(row)
        if needed > left:
            share = max(left, 0.0) / needed
            most = max(searched, len(rows) * share ** (1 / FAMILIES[row.family].growth))
            rows = thinned(spread(p.y, p.seed), most)
        return p.fit(row.config, rows)

    def leaders(self) -> list[Row]:
        """Complete rows whose predictions are kept, the best first."""
        complete = sorted((r for r in self.rows if r.predictions is not None), key=lambda r: r.loss)
        best_of_each = {row.family: id(row) for row in reversed(complete)}.values()
        return [row for n, row in enumerate(complete) if n < KEPT or id(row) in best_of_each]

    def ranked(self) -> list[Row]:
        """All rows: the complete ones, those given up, and the others; each by loss."""
        order = ["complete", "behind", "skipped", "failed"]
        return sorted(self.rows, key=lambda row: (order.index(row.state), row.loss))

    def _last_fits(self) -> float:
        """Seconds for the best configuration, and for others as far as the margin goes."""
        if self.best is None:
            return 0.0
        of_all = sum(map(self.refit_seconds, self.leaders()))
        of_best = self.refit_seconds(self.best)
        return max(min(of_best, MOST_LAST * self._seconds), min(of_all, MARGIN * self._seconds))

    def _forget(self) -> None:
        """Drop the predictions of all but the leaders."""
        leaders = {id(row) for row in self.leaders()}
        for row in self.rows:
            if id(row) not in leaders:
                row.predictions = None

    def _judge(self, row: Row) -> None:
        seen = self._fold_seconds.setdefault(row.family, [])
        first = not seen
        if self.best is None:
            allowed = math.inf  # a model there must be
        else:
            needed = self._expected(row, first)
            # it may become the best one, and be fitted on all rows
            last_fit = min(self._on_all_rows(needed, row.family), MOST_LAST * self._seconds)
            left = min(self.seconds_left, self.seconds_left_in_all - last_fit)
            # no single trial may eat up the search, but the last one may have what is left
            allowed = max(left / 2, min(left, 2 * needed))
            if needed > allowed:
                if all(fmean(s) > self.seconds_left for s in self._fold_seconds.values() if s):
                    raise Enough
                raise OutOfTime(f"a fold would take about {needed:.3g} s, of {allowed:.3g} s left for it")
        predictions = []
        until = self._clock() + allowed
        for fold in self.problem.folds:
            predictions.append(self._fold(row, fold, until - self._clock(), seen))
            if not math.isfinite(row.loss):
                raise ValueError("the loss was not finite")
            if not first and self._is_behind(row):
                row.state = "behind"
                return
        row.predictions = np.concatenate(predictions)
        if self.best is None or row.loss < self.best.loss:
            self.best = row

    def _fold(self, row: Row, fold: Fold, allowed: float, seen: list[float]) -> Array:
        """Predictions of what a fold validates by a model of what it trains; their loss joins the row."""
        p, began = self.problem, self._clock()
        training, validating = fold
        try:
            with limit(allowed):
                predictions = predictions_of(p.fit(row.config, training), rows_of(p.X, validating), p.classes)
        finally:
            seen.append(self._clock() - began)
        row.fold_losses.append(p.loss(predictions, p.y[validating]))
        n = len(row.fold_losses)
        row.fit_seconds = fmean(seen[-n:])
        row.loss = fmean(row.fold_losses)
        if self.best is not None and n < len(p.folds):
            row.loss += self.best.loss - fmean(self.best.fold_losses[:n])
        return predictions

    def _is_behind(self, row: Row) -> bool:
        """Worse on its first fold than the best one on any, or worse on each of two folds or more."""
        n = len(row.fold_losses)
        if self.best is None or n == len(self.problem.folds):
            return False
        if n == 1:
            return row.fold_losses[0] > max(self.best.fold_losses)
        return all(own > best for own, best in zip(row.fold_losses, self.best.fold_losses, strict=False))

    def _expected(self, row: Row, first: bool) -> float:
        """Seconds of a fold: as before, or from a fit on fewer rows if there are many; 0 if not known."""
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
