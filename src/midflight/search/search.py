"""Run a search: an engine proposes configurations, and each trial trains one and tunes during training.

One process talks to the engine. Trials run in this process or in workers. If the process or worker of a trial
dies, another one continues the trial from its checkpoint, under the same number.
"""

import math
import shutil
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from midflight._reporting.machine import machine
from midflight.search import checkpoint
from midflight.search.checkpoint import Point
from midflight.search.engines import Engine, Task, build
from midflight.search.engines.optuna import suggest
from midflight.search.errors import Interrupted, ObjectiveFailed, SearchError
from midflight.search.ledger import (
    HEARTBEAT,
    Declaration,
    Ledger,
    Record,
    best,
    default_folder,
    open_study,
)
from midflight.search.space import Config, Space
from midflight.search.trial import Job, Objective, Outcome, run_job

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


def run(
    objective: Objective,
    space: Space,
    *,
    engine: str = "bohb",
    trials: int | None = None,
    seconds: float | None = None,
    epochs: int = 27,
    workers: int = 1,
    storage: str | None = None,
    name: str = "search",
    seed: int = 0,
    folder: Path | None = None,
    warm_start: bool = True,
    first: Sequence[Config] = (),
    callbacks: Sequence[Callback] = (),
    label: str = "",
    **options: Any,
) -> Result:
    """Search `space` for the lowest validation loss; tune its online hyperparameters during each trial.

    Args:
        objective: trains a `Trial` and reports its validation loss.
        space: searched hyperparameters and hyperparameters tuned online.
        engine: name of the engine:
            "random": random search;
            "tpe": tree-structured Parzen estimator;
            "bohb": TPE with Hyperband;
            "smac": SMAC3's random forest with Hyperband;
            "ray": Ray Tune, on several machines.
        trials: number of trials in the study, including earlier calls. A configuration that SMAC promotes
            counts again. Each process that shares the study may exceed the number by one.
        seconds: duration of this call. The next call continues interrupted trials.
        epochs: epochs of a full training. Hyperband compares trials after 1, 3, 9, ... epochs.
        workers: number of parallel trials, one process each; 1 runs them in this process.
        storage: storage of the study, see `open_storage`; None: memory. A stored study of the same `name` is
            resumed.
        seed: seed of the engine and of every trial.
        folder: folder of the checkpoints; default: beside the storage, or temporary. Machines that share it
            continue each other's trials.
        warm_start: whether tuned hyperparameters start at the final values of the nearest good trial.
        first: configurations to try before the engine proposes any; unsupported for "smac" with epochs > 1.
        callbacks: called with the `Record` of a trial when it starts, reports or ends.
        label: name of the objective; a study cannot be resumed with another name.
        options: options of the engine; "ray" has `address` and `scheduler`.

    Raises:
        SearchError: an argument is invalid, the storage cannot be reached, or it holds another search.
        MissingExtra: a package of the engine is not installed.
        ObjectiveFailed: the first trials all failed.
        StorageLost: the storage failed during the search.
        Interrupted: Ctrl-C was pressed; `result` holds the trials so far. A `KeyboardInterrupt`.
    """
    _check(space, trials, seconds, epochs, workers)
    built = build(engine, Task(space, epochs, trials, seed), options)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    temporary = folder is None and storage is None
    if temporary:
        folder = Path(tempfile.mkdtemp())
    elif folder is None:
        folder = default_folder(storage, name) / "checkpoints"
    declaration = Declaration(space, epochs, seed, label, machine())
    with open_study(storage, name, declaration, folder, sampler=built.sampler, pruner=built.pruner) as ledger:
        if temporary:
            weakref.finalize(ledger, shutil.rmtree, folder, ignore_errors=True)
        search = Search(ledger, space, built, epochs, trials, seconds, seed, warm_start, first, callbacks)
        try:
            with ledger.heartbeats():
                search.take_over()
                if built.drive is not None:
                    built.drive(search, objective, workers)
                elif workers == 1:
                    _run_here(search, objective)
                else:
                    from midflight.search.workers import run_in_workers

                    run_in_workers(search, objective, workers)
        except KeyboardInterrupt:
            raise Interrupted(search.result()) from None
        return search.result()


def _check(space: Space, trials: int | None, seconds: float | None, epochs: int, workers: int) -> None:
    if trials is None and seconds is None:
        raise SearchError("one of seconds and trials must be given, because the search would never end.")
    for argument, value in (
        ("trials", trials),
        ("seconds", seconds),
        ("epochs", epochs),
        ("workers", workers),
    ):
        if value is not None and value <= 0:
            raise SearchError(f"{argument} > 0 must hold, but {argument}={value}.")
    if not space.searched:
        raise SearchError(
            "a search needs a hyperparameter that is not online, but the whole space is; use midflight.Tuner."
        )


def _run_here(search: "Search", objective: Objective) -> None:
    before = checkpoint.random_state()
    try:
        while (job := search.next_job()) is not None:
            search.on_end(job.number, run_job(job, objective, partial(search.on_report, job.number)))
    finally:
        checkpoint.set_random_state(before)


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
