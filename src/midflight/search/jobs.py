"""Hand out the trials of a search as jobs, and store what they report.

If the process or worker of a trial dies, another one continues the trial from its checkpoint, under the same
number.
"""

import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from midflight.search import checkpoint
from midflight.search.checkpoint import Point
from midflight.search.engine import Engine, Task
from midflight.search.errors import ObjectiveFailed, SearchError, StorageLost
from midflight.search.ledger import HEARTBEAT, Ledger, Record, best
from midflight.search.space import Config, Space, Spec
from midflight.search.trial import Job, Outcome
from midflight.space import Categorical, Int
from midflight.tuner.live import signals_wait

MAX_DEATHS = 3  # a trial fails when its worker has died this often
MOST_NEAR = 200  # trials whose distances are computed when a trial starts
MAX_FAILURES = 3  # the search stops if this many first trials all fail

Callback = Callable[[Record], None]


@dataclass
class Result:
    """The result of a search.

    Attributes:
        records: every trial.
        best: the trial with the lowest validation loss; None if no trial reported a finite loss.
        ledger: the Optuna study and the checkpoints.
    """

    records: list[Record]
    best: Record | None
    ledger: Ledger

    def load(self) -> Any:
        """Return the last state that the best trial reported; None if it reported none."""
        saved = self.best and checkpoint.load(self.ledger.checkpoint(self.best))
        return saved.state if saved else None


uninterrupted = partial(signals_wait, impatient=2)
"""Delays Ctrl-C, but not a second one; an open transaction would lock the storage for a minute."""


@dataclass
class Search:
    """Hands out trials as jobs and stores their reports; `run_job` runs a job in any process."""

    ledger: Ledger
    engine: Engine
    task: Task
    seconds: float | None
    warm_start: bool
    first: Sequence[Config]
    callbacks: Sequence[Callback]

    def __post_init__(self) -> None:
        self._study = self.ledger.study
        self._first = deque(self.first)
        self._deadline = math.inf if self.seconds is None else time.monotonic() + self.seconds
        self._last_take_over = -math.inf
        self._running: dict[int, _Running] = {}
        self._to_continue: deque[optuna.Trial] = deque()
        self._to_explore: deque[optuna.Trial] = deque()
        self._ends: list[str] = []  # how the trials ended

    @property
    def seconds_left(self) -> float:
        """Seconds until the time is up; 0 then."""
        return max(0.0, self._deadline - time.monotonic())

    @uninterrupted()
    def next_job(self) -> Job | None:
        """Return an interrupted trial or a new one; None if there is none now."""
        if time.monotonic() - self._last_take_over > HEARTBEAT:
            self._last_take_over = time.monotonic()
            for orphan in self.ledger.claim_orphans():
                self._to_continue.append(optuna.Trial(self._study, orphan._trial_id))
        if not self.seconds_left:
            return None
        if self._to_continue:
            return self._start(self._to_continue.popleft())
        trial = self._new_trial()
        if trial is None and self._to_explore:
            trial = self._to_explore.popleft()
            self._explore(trial)
        return None if trial is None else self._start(trial)

    def _new_trial(self) -> optuna.Trial | None:
        trials = self._study.get_trials(deepcopy=False)
        waiting = sum(trial.state == TrialState.WAITING for trial in trials)
        if self.task.trials is not None and len(trials) - waiting >= self.task.trials:
            return None
        while self._first and not waiting:
            self._study.enqueue_trial(self._first.popleft(), skip_if_exists=True)
            waiting = len(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        if not waiting and not self.engine.prepare(self._study):
            return None
        return self._study.ask()

    @uninterrupted()
    def on_report(self, number: int, points: list[Point]) -> bool:
        """Store the reports of a trial; return whether it continues."""
        running = self._running[number]
        before = self.ledger.record(running.trial)
        new = [point for point in points if point.epoch > before.epoch]
        try:
            self._store(running.trial, before.trajectory, new)
        except optuna.exceptions.UpdateFinishedTrialError:  # another process took it over and finished it
            running.interrupted = True
            return False
        self._call_callbacks(running.trial)
        epoch, loss = (new[-1].epoch, new[-1].loss) if new else (before.epoch, before.loss)
        if not math.isfinite(loss):
            running.stop_reason = "the loss was not finite"
        elif epoch >= self.task.epochs:
            return True
        elif running.trial.should_prune():
            running.stop_reason = f"stopped by the engine after epoch {epoch}"
        elif not self.seconds_left:
            running.interrupted = True
        elif self.engine.explore and new and epoch % self.engine.interval == 0:
            if not self.ledger.checkpoint(before).is_file():
                raise SearchError(
                    "population-based training copies the states of trials, so the objective must pass "
                    "state= to trial.report, but passed none."
                )
            running.interrupted = True
            self._to_explore.append(running.trial)
        return not (running.stop_reason or running.interrupted)

    def _store(self, trial: optuna.Trial, before: list[tuple[int, Config]], points: list[Point]) -> None:
        config = trial.user_attrs.get("config", {})  # stored if population-based training moved its floats
        moved = {name: value for name, value in config.items() if isinstance(value, float)}
        for point in points:
            trial.report(point.loss if math.isfinite(point.loss) else math.inf, point.epoch)
        trajectory = [(point.epoch, {**moved, **point.online}) for point in points if moved or point.online]
        if trajectory:
            trial.set_user_attr("trajectory", [*before, *trajectory])
        if points and points[-1].extra:
            trial.set_user_attr("extra", points[-1].extra)

    @uninterrupted()
    def on_end(self, number: int, outcome: Outcome) -> None:
        """Store how a job ended."""
        running = self._running.pop(number)
        trial = running.trial
        if outcome.how == "lost":
            raise outcome.error or StorageLost(outcome.message)
        stored = self.ledger.record(trial)
        if running.interrupted or stored.state != "unfinished":
            return
        message = running.stop_reason or outcome.message
        if message:
            trial.set_user_attr("message", message)
        if running.stop_reason or outcome.how == "stopped":
            self._study.tell(trial, state=TrialState.PRUNED)
        elif outcome.how == "failed":
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, stored.loss)
        self._call_callbacks(trial)
        self._ends.append(outcome.how)
        if self._ends == ["failed"] * MAX_FAILURES:
            raise ObjectiveFailed(
                f"the first {MAX_FAILURES} trials all failed, the last with {outcome.message}"
            ) from outcome.error
        if not (self.engine.promotes or self.engine.explore):
            self.ledger.clear_checkpoints()

    @uninterrupted()
    def on_death(self, number: int, counts: bool = True) -> None:
        """Queue the trial of a dead process again, at most `MAX_DEATHS - 1` times."""
        trial = self._running[number].trial
        deaths = trial.user_attrs.get("deaths", 0) + counts
        trial.set_user_attr("deaths", deaths)
        if deaths >= MAX_DEATHS:
            self.on_end(number, Outcome("failed", f"its worker process died {deaths} times"))
        else:
            del self._running[number]
            self._to_continue.appendleft(trial)

    def result(self) -> Result:
        """Return the result so far."""
        records = self.ledger.records()
        return Result(records, best(records), self.ledger)

    def _start(self, trial: optuna.Trial) -> Job:
        trial.set_user_attr("owner", self.ledger.owner)
        config = trial.user_attrs.get("config") or suggest(trial, self.task.space)
        if "start" not in trial.user_attrs:
            self._initialise(trial, config)
        stored = self.ledger.record(trial)
        self._running[trial.number] = _Running(trial)
        self._call_callbacks(trial)
        return Job(
            number=trial.number, config=config, starts=stored.starts, epochs=self.task.epochs,
            seed=self.task.seed, space=self.task.space, checkpoint=self.ledger.checkpoint(stored),
        )  # fmt: skip

    def _initialise(self, trial: optuna.Trial, config: Config) -> None:
        """Store which trial this one continues, and where its tuned hyperparameters start."""
        starts = self.task.space.starts(config)
        compares = self.engine.promotes or (self.warm_start and starts)
        records = self.ledger.records()[: trial.number] if compares else []
        earlier = self.engine.promotes and next((r for r in records if r.config == config), None)
        saved = checkpoint.load_or_drop(self.ledger.checkpoint(earlier)) if earlier else None
        if earlier:
            starts = earlier.starts
        elif self.warm_start and starts:
            nearest = nearest_values(self.task.space, config, records)
            starts |= {name: value for name, value in nearest.items() if name in starts}
        start = {
            "engine": self.engine.name,
            "root": earlier.root if earlier else trial.number,
            # no other study in this folder has this name, not even a deleted one
            "checkpoint": earlier.checkpoint if earlier else f"{trial.number}-{uuid.uuid4().hex[:12]}.pt",
            "from_epoch": saved.points[-1].epoch if saved else 0,
            "starts": starts,
        }
        trial.set_user_attr("start", start)

    def _explore(self, trial: optuna.Trial) -> None:
        """Copy a better trial's configuration and checkpoint to a bad one."""
        assert self.engine.explore is not None
        stored = self.ledger.record(trial)
        found = self.engine.explore(stored, self.ledger.records())
        saved = checkpoint.load_or_drop(self.ledger.checkpoint(found[0])) if found else None
        if found and saved and saved.points[-1].epoch < self.task.epochs:  # else nothing would train with it
            trial.set_user_attr("config", found[1])
            saved.save(self.ledger.checkpoint(stored))

    def _call_callbacks(self, trial: optuna.Trial) -> None:
        for callback in self.callbacks:
            callback(self.ledger.record(trial))


@dataclass
class _Running:
    """A trial in progress.

    Attributes:
        stop_reason: why the search ends it early; "" if it does not.
        interrupted: whether it stays unfinished: the time is up, another process has it, or it waits to be
            compared with its population.
    """

    trial: optuna.Trial
    stop_reason: str = ""
    interrupted: bool = False


def nearest_values(space: Space, config: Config, records: Sequence[Record]) -> Config:
    """Return the tuned values of the nearest configuration among good trials.

    Good are the better half of the complete trials, but at most the `MOST_NEAR` best.
    """
    tuned = sorted(
        (r for r in records if r.state == "complete" and r.trajectory and math.isfinite(r.loss)),
        key=lambda r: r.loss,
    )
    good = tuned[: min(len(tuned) // 2, MOST_NEAR)]  # empty for a single trial, which cannot be compared
    if not good:
        return {}
    distances = space.distances(config, [r.config for r in good])
    return dict(good[int(np.argmin(distances))].online)


def suggest(trial: optuna.Trial, space: Space) -> Config:
    """Let the engine choose the active hyperparameters of a configuration, parents first."""
    config: Config = {}
    for name, spec in space.searched.items():
        if space.is_active(name, config):
            config[name] = trial._suggest(name, distribution(spec))
    return config


def distribution(spec: Spec) -> BaseDistribution:
    """Return Optuna's distribution; a logit `Float` is linear, because Optuna has no logit scale."""
    if isinstance(spec, Categorical):
        return CategoricalDistribution(spec.choices)
    kind: Any = IntDistribution if isinstance(spec, Int) else FloatDistribution
    return cast(BaseDistribution, kind(spec.low, spec.high, log=spec.log))
