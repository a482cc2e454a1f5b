"""Evaluate pipelines on the folds within the time limit; the objective of the search.

A configuration that is behind the best one stops early, as in SMAC's intensification (Hutter et al. 2011).
Its estimated loss is the best one's plus the mean difference on the folds that both have.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

import numpy as np
from sklearn.compose import TransformedTargetRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from midflight.automl.ensemble import greedy, helps
from midflight.automl.families import FAMILIES, Params
from midflight.automl.table import coded, scaled
from midflight.automl.validation import (
    FOLDS,
    Array,
    Fold,
    Loss,
    Parts,
    our_settings,
    predictions_of,
    spread,
    thinned,
)
from midflight.automl.worker import CallFailed, OutOfTime, limited
from midflight.search.trial import Trial

REFIT_SHARE = 0.1
"""Share of the time reserved for the final fits of all leaders."""
BEST_REFIT_SHARE = 0.3
"""Maximal share of the time reserved for the final fit of the best configuration."""
LEADERS = 5
"""Best configurations that keep their predictions for an ensemble, besides the best of each family."""
MAX_FAILURES = 20
"""The search ends when this many configurations failed and none is complete."""
STATES = ("complete", "behind", "skipped", "failed")
"""States of a configuration in the order of the leaderboard; see `Row`."""


class SearchEnds(BaseException):
    """The time is up, or nothing trains; a BaseException, to pass through the search like Ctrl-C."""


@dataclass(frozen=True)
class Problem:
    """A learning problem.

    Attributes:
        X: table read by `Table`, shape (n, features).
        y: target, shape (n,).
        classes: sorted classes; None for regression.
        categories: positions of the categories in X.
        folds: training and validation rows of each fold.
        loss: (predictions, targets) -> loss to minimise.
        seed: seed of the learners.
        threads: threads of a fit.
    """

    X: Array
    y: Array
    classes: Array | None
    categories: list[int]
    folds: list[Fold]
    loss: Loss
    seed: int
    threads: int

    def pipeline(self, config: Params) -> Pipeline:
        """Return the unfitted pipeline of a configuration, from the floats of `Table` to predictions."""
        name = config["family"]
        family = FAMILIES[name]
        params = {key.removeprefix(f"{name}."): value for key, value in config.items() if key != "family"}
        scaling = params.pop("scaling", None)
        learner = (family.regressor if self.classes is None else family.classifier)(params, self.seed)
        known = learner.get_params()
        if "n_estimators" in known:  # forests use their own threads, the others the limited pools
            learner.set_params(n_jobs=self.threads)
        if "categorical_features" in known:
            learner.set_params(categorical_features=range(len(self.categories)))
        if family.needs_scale and self.classes is None:
            learner = TransformedTargetRegressor(learner, transformer=StandardScaler())
        columns = scaled(self.categories, scaling) if family.needs_scale else coded(self.categories)
        return Pipeline([("columns", columns), ("learner", learner)])

    def fit(self, model: Any, rows: Array) -> Any:
        """Return a model, fitted on `rows`."""
        with our_settings(self.threads):
            return model.fit(self.X[rows], self.y[rows])

    def validate(self, model: Any, fold: Fold, losses: list[float], best: float) -> tuple[Array, float, Any]:
        """Return predictions, their loss, and the model if the mean loss with `losses` is under `best`."""
        training, validating = fold
        self.fit(model, training)
        with our_settings(self.threads):
            predictions = predictions_of(model, self.X[validating], self.classes)
            loss = self.loss(predictions, self.y[validating])
        return predictions, loss, model if fmean([*losses, loss]) < best else None

    def ensemble(self, predictions: list[Array], size: int) -> list[int]:
        """Return candidates, repeated by weight; [0], the best one, if no ensemble beats it."""
        parts, loss = self.parts, self.loss
        with our_settings(self.threads):
            alone = size == 1 or len(predictions) == 1 or not helps(predictions, parts, loss, size)
            return [0] if alone else greedy(predictions, parts, loss, size)

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


@dataclass(eq=False)
class Row:
    """The evaluation of one configuration.

    Attributes:
        number: number in order of evaluation, from 0.
        config: `family`, and FAMILY.HYPERPARAMETER for each hyperparameter.
        state: "complete", "behind" (stopped early), "skipped" (too slow) or "failed".
        loss: mean over the folds; estimated if behind; infinite if skipped or failed.
        fold_losses: loss of each evaluated fold.
        fit_seconds: mean seconds per fold; before the first, the mean of its family.
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


Member = tuple[Row, int, Any]
"""(row, weight, fitted pipeline)"""


class Judge:
    """An objective for `midflight.search.run`.

    Args:
        problem: the learning problem.
        deadline: time of `clock` at which the final fits must be done; infinite: no time limit.
        clock: returns the time in seconds.

    Attributes:
        rows: one row per configuration, in order of evaluation.
        best: the complete row with the lowest loss; None before the first.
        kept: the member to use if the search ends now; empty before the first fit.
    """

    def __init__(
        self, problem: Problem, deadline: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.problem = problem
        self.rows: list[Row] = []
        self.best: Row | None = None
        self.kept: list[Member] = []
        self._clock = clock
        self._deadline = deadline
        self._seconds = deadline - clock() if math.isfinite(deadline) else 0.0
        self._fold_seconds: dict[str, list[float]] = {}

    def __call__(self, trial: Trial) -> float:
        """Return the validation loss of a configuration; infinity if it has none. Raises `SearchEnds`."""
        known = next((row for row in self.rows if row.config == trial.params), None)
        if known is not None:
            return known.loss
        failed = sum(row.state == "failed" for row in self.rows)
        if self.seconds_left <= 0 or (self.best is None and failed >= MAX_FAILURES):
            raise SearchEnds
        row, began = Row(len(self.rows), dict(trial.params)), self._clock()
        try:
            self._evaluate(row)
        except Exception as error:  # a learner may raise anything; the search continues
            row.state, row.loss = "skipped" if isinstance(error, OutOfTime) else "failed", math.inf
            ours = isinstance(error, OutOfTime | CallFailed)
            row.message = str(error) if ours else f"{type(error).__name__}: {error}"
        row.seconds = self._clock() - began
        self.rows.append(row)
        for other in set(self.rows).difference(self.leaders()):
            other.predictions = None
        return row.loss

    def _call(self, seconds: float, method: Callable[..., Any], *args: Any) -> Any:
        """Call a method of the problem, in a child process if there is a time limit."""
        return limited(seconds, method, *args) if math.isfinite(self._deadline) else method(*args)

    @property
    def seconds_left(self) -> float:
        """Seconds left for the search, without the time reserved for the final fits."""
        left = self._deadline - self._clock()
        if self.best is None:
            return left
        all_refits = sum(map(self._refit_seconds, self.leaders()))
        best_refit = min(self._refit_seconds(self.best), BEST_REFIT_SHARE * self._seconds)
        return left - max(best_refit, min(all_refits, REFIT_SHARE * self._seconds))

    def leaders(self) -> list[Row]:
        """Return the rows that keep their predictions, the best first."""
        complete = sorted((r for r in self.rows if r.predictions is not None), key=lambda r: r.loss)
        best_of_each = {row.family: row for row in reversed(complete)}.values()
        return [row for n, row in enumerate(complete) if n < LEADERS or row in best_of_each]

    def leaderboard(self) -> list[Row]:
        """Return all rows sorted by state, then by loss."""
        return sorted(self.rows, key=lambda row: (STATES.index(row.state), row.loss))

    def final(self, size: int) -> list[Member]:
        """Fit the best configuration on all rows, then other members of an ensemble while time is left."""
        if self.best is None:
            return self.kept
        leaders = self.leaders()  # the first is the best
        try:
            self.kept = [(self.best, 1, self._refit(self.best))]
            predictions = [row.predictions for row in leaders]
            chosen = self._call(self._deadline - self._clock(), self.problem.ensemble, predictions, size)
        except (OutOfTime, CallFailed):
            return self.kept
        members = []
        for n in sorted(set(chosen)):
            row, weight = leaders[n], chosen.count(n)
            if n == 0:
                members.append((row, weight, self.kept[0][2]))
            elif self._refit_seconds(row) <= self._deadline - self._clock():
                with suppress(OutOfTime, CallFailed):
                    members.append((row, weight, self._refit(row)))
        return members or self.kept

    def _refit(self, row: Row) -> Any:
        """Return the pipeline of a row, fitted on all rows.

        If the time is too short, fit on fewer rows, but at least on as many as in the search.
        """
        p, left, needed = self.problem, self._deadline - self._clock(), self._refit_seconds(row)
        rows = np.arange(len(p.y))
        if needed > left:
            most = len(rows) * (max(left, 0.0) / needed) ** (1 / FAMILIES[row.family].growth)
            rows = thinned(spread(p.y, p.seed), max(len(p.folds[0][0]), most))
        return self._call(left, p.fit, p.pipeline(row.config), rows)

    def _refit_seconds(self, row: Row) -> float:
        """Estimate the seconds of a fit on all rows from those of a fit on a fold."""
        ratio = len(self.problem.y) / len(self.problem.folds[0][0])
        return float(row.fit_seconds * ratio ** FAMILIES[row.family].growth)

    def _evaluate(self, row: Row) -> None:
        """Fit and validate on each fold, unless the row falls behind the best one."""
        seconds = self._fold_seconds.setdefault(row.family, [])
        first, folds, losses = not seconds, self.problem.folds, row.fold_losses
        until, predictions = self._clock() + self._allowed_seconds(row), []
        for n, fold in enumerate(folds, 1):
            last, began = n == len(folds), self._clock()
            left, more = until - began, len(folds) - n + 1
            if n > 1 and (needed := more * row.fit_seconds) > left:
                raise OutOfTime(
                    f"{more} more folds would take about {needed:.3g} s, but only {left:.3g} s are left"
                )
            bar = math.inf if self.best is None else self.best.loss if last else -math.inf
            try:
                model = self.problem.pipeline(row.config)
                of_fold, loss, model = self._call(left, self.problem.validate, model, fold, losses, bar)
            finally:
                seconds.append(self._clock() - began)
            predictions.append(of_fold)
            losses.append(loss)
            row.fit_seconds, row.loss = fmean(seconds[-n:]), fmean(losses)
            if self.best is not None and not last:
                row.loss += self.best.loss - fmean(self.best.fold_losses[:n])
            if model is not None:
                self.kept = [(row, 1, model)]
            if not math.isfinite(row.loss):
                raise ValueError("the loss was not finite")
            if not first and self._is_behind(row):
                row.state = "behind"
                return
        row.predictions = np.concatenate(predictions)
        if self.best is None or row.loss < self.best.loss:
            self.best = row

    def _allowed_seconds(self, row: Row) -> float:
        """Return the time limit of a configuration.

        Raises:
            OutOfTime: a fold would take longer.
            SearchEnds: a fold of every timed family would take longer than the search has left.
        """
        timed = self._fold_seconds[row.family]
        needed = row.fit_seconds = fmean(timed) if timed else 0.0
        # it may become the best one and need a final fit
        refit = min(self._refit_seconds(row), BEST_REFIT_SHARE * self._seconds)
        left = min(self.seconds_left, self._deadline - self._clock() - refit)
        # half the time left, so that one trial cannot use up the search; all of it for a last trial
        allowed = max(left / 2, min(left, 2 * needed))
        if needed > allowed:
            if all(fmean(s) > self.seconds_left for s in self._fold_seconds.values() if s):
                raise SearchEnds
            raise OutOfTime(f"a fold would take about {needed:.3g} s, but only {allowed:.3g} s are left")
        return allowed

    def _is_behind(self, row: Row) -> bool:
        """Whether its only fold is worse than all of the best row's, or each of several folds is worse."""
        n = len(row.fold_losses)
        if self.best is None or n == len(self.problem.folds):
            return False
        if n == 1:
            return row.fold_losses[0] > max(self.best.fold_losses)
        return all(own > best for own, best in zip(row.fold_losses, self.best.fold_losses, strict=False))
