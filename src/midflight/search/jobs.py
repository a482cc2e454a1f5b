"""Hand out the trials of a search as jobs, and store what they report.

If the process or worker of a trial dies, another one continues the trial from its checkpoint, under the same
number.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from midflight.search import checkpoint
from midflight.search.checkpoint import Point
from midflight.search.engine import Engine
from midflight.search.errors import ObjectiveFailed
from midflight.search.ledger import HEARTBEAT, Ledger, Record, best
from midflight.search.space import Config, Space
from midflight.search.trial import Job, Outcome
from midflight.space import Categorical, Int

MAX_DEATHS = 3  # a trial fails when its worker has died this often
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
        saved = self.best and checkpoint.load(self.ledger.checkpoint(self.best.root))
        return saved.state if saved else None


class Search:
    """Hands out trials as jobs and stores their reports; `run_job` runs a job in any process."""

    def __init__(
        self,
        ledger: Ledger,
        space: Space,
        engine: Engine,
        epochs: int,
        trials: int | None,
        seconds: float | None,
        seed: int,
        warm_start: bool,
        first: Sequence[Config],
        callbacks: Sequence[Callback],
    ) -> None:
        self.ledger = ledger
        self.space = space
        self.epochs = epochs
        self.trials = trials
        self._study = ledger.study
        self._engine = engine
        self._seed = seed
        self._warm_start = warm_start
        self._first = deque(first)
        self._callbacks = callbacks
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds
        self._last_take_over = time.monotonic()
        self._running: dict[int, _Running] = {}
        self._to_continue: deque[optuna.Trial] = deque()
        self._first_failures: int | None = 0  # None once a trial has succeeded

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._deadline

    @property
    def seconds_left(self) -> float:
        """Seconds until the time is up."""
        return max(0.0, self._deadline - time.monotonic())

    def take_over(self) -> None:
        """Queue the unfinished trials of dead processes."""
        self._last_take_over = time.monotonic()
        for orphan in self.ledger.claim_orphans():
            self._to_continue.append(optuna.Trial(self._study, orphan._trial_id))

    def next_job(self) -> Job | None:
        """Return an interrupted trial or a new one; None if there is none now."""
        if time.monotonic() - self._last_take_over > HEARTBEAT:
            self.take_over()
        if self.is_over:
            return None
        if self._to_continue:
            return self._start(self._to_continue.popleft())
        if self.trials is not None and len(self._study.get_trials(deepcopy=False)) >= self.trials:
            return None
        if self._first:
            self._study.enqueue_trial(self._first.popleft())
        elif not self._engine.prepare(self._study):
            return None
        return self._start(self._study.ask())

    def on_report(self, number: int, points: list[Point]) -> bool:
        """Store the reports of a trial; return whether it continues."""
        running = self._running[number]
        trial = running.trial
        try:
            self._store(running, [point for point in points if point.epoch > running.epoch])
        except optuna.exceptions.UpdateFinishedTrialError:  # another process took it over and finished it
            running.interrupted = True
            return False
        self._call_callbacks(number)
        if not math.isfinite(running.loss):
            running.stop_reason = "the loss was not finite"
        elif running.epoch >= self.epochs:
            return True
        elif trial.should_prune():
            running.stop_reason = f"stopped by the engine after epoch {running.epoch}"
        elif self.is_over:
            running.interrupted = True
        return not (running.stop_reason or running.interrupted)

    def _store(self, running: "_Running", points: list[Point]) -> None:
        for point in points:
            running.trial.report(point.loss if math.isfinite(point.loss) else math.inf, point.epoch)
            running.epoch, running.loss = point.epoch, point.loss
            if point.online:
                running.trajectory.append((point.epoch, point.online))
        if points and points[-1].online:
            running.trial.set_user_attr("trajectory", running.trajectory)
        if points and points[-1].extra:
            running.trial.set_user_attr("extra", points[-1].extra)

    def on_new_config(self, number: int, config: Config) -> None:
        """Store a new configuration of a running trial; population-based training changes it."""
        self._running[number].trial.set_user_attr("config", config)

    def on_end(self, number: int, outcome: Outcome) -> None:
        """Store how a job ended."""
        running = self._running.pop(number)
        trial = running.trial
        if running.interrupted or self.ledger.record(number).state != "unfinished":
            return
        message = running.stop_reason or outcome.message
        if message:
            trial.set_user_attr("message", message)
        if running.stop_reason or outcome.how == "stopped":
            self._study.tell(trial, state=TrialState.PRUNED)
        elif outcome.how == "failed":
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, running.loss)
        self._call_callbacks(number)
        self._check_first_failures(outcome)
        if not self._engine.promotes:
            self.ledger.clear_checkpoints()

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
        config = suggest(trial, self.space)
        if "starts" not in trial.user_attrs:
            self._initialise(trial, config)
        attrs = trial.user_attrs
        stored = self.ledger.record(trial.number)
        self._running[trial.number] = _Running(trial, stored.epoch, stored.loss, stored.trajectory)
        self._call_callbacks(trial.number)
        return Job(
            number=trial.number, config=config, starts=attrs["starts"], epochs=self.epochs, seed=self._seed,
            space=self.space, checkpoint=self.ledger.checkpoint(attrs["root"]),
        )  # fmt: skip

    def _initialise(self, trial: optuna.Trial, config: Config) -> None:
        """Store which trial this one continues, and where its tuned hyperparameters start."""
        records = [r for r in self.ledger.records() if r.number < trial.number]
        earlier = [r for r in records if r.config == config] if self._engine.promotes else []
        trial.set_user_attr("engine", self._engine.name)
        trial.set_user_attr("root", earlier[0].root if earlier else trial.number)
        saved = checkpoint.load(self.ledger.checkpoint(earlier[0].root)) if earlier else None
        trial.set_user_attr("from_epoch", saved.points[-1].epoch if saved else 0)
        starts = self.space.starts(config)
        if earlier:
            starts = earlier[0].starts
        elif self._warm_start and starts:
            starts |= nearest_values(self.space, config, records)
        trial.set_user_attr("starts", {name: starts[name] for name in self.space.starts(config)})

    def _check_first_failures(self, outcome: Outcome) -> None:
        if outcome.how != "failed":
            self._first_failures = None
        elif self._first_failures is not None:
            self._first_failures += 1
            if self._first_failures >= MAX_FAILURES:
                raise ObjectiveFailed(
                    f"the first {MAX_FAILURES} trials all failed, the last with {outcome.message}"
                ) from outcome.error

    def _call_callbacks(self, number: int) -> None:
        if self._callbacks:
            stored = self.ledger.record(number)
            for callback in self._callbacks:
                callback(stored)


@dataclass
class _Running:
    """A trial in progress.

    Attributes:
        epoch, loss: of the last report.
        stop_reason: why the search ends it early; "" if it does not.
        interrupted: whether it stays unfinished, because the time is up or another process has it.
    """

    trial: optuna.Trial
    epoch: int
    loss: float
    trajectory: list[tuple[int, Config]]
    stop_reason: str = ""
    interrupted: bool = False


def nearest_values(space: Space, config: Config, records: Sequence[Record]) -> Config:
    """Return the tuned values of the nearest configuration among the better half of complete trials."""
    tuned = sorted(
        (r for r in records if r.state == "complete" and r.trajectory and math.isfinite(r.loss)),
        key=lambda r: r.loss,
    )
    good = tuned[: len(tuned) // 2]  # empty for a single trial, which cannot be compared
    nearest = min(good, key=lambda r: (space.distance(config, r.config), r.loss), default=None)
    return dict(nearest.online) if nearest else {}


def suggest(trial: optuna.Trial, space: Space) -> Config:
    """Let the engine choose the active hyperparameters of a configuration, parents first.

    A `Float` with a logit scale is searched on a linear scale, because Optuna has no logit scale.
    """
    config: Config = {}
    for name, spec in space.searched.items():
        if not space.is_active(name, config):
            continue
        if isinstance(spec, Categorical):
            config[name] = trial.suggest_categorical(name, spec.choices)
        elif isinstance(spec, Int):
            config[name] = trial.suggest_int(name, spec.low, spec.high, log=spec.log)
        else:
            config[name] = trial.suggest_float(name, spec.low, spec.high, log=spec.log)
    return config
