"""The search: an engine proposes configurations, each is trained with the rest tuned inside it.

One process asks and tells, in any case; trials run in it or in worker processes. When the process or the
worker that runs a trial dies, another takes it over: same number, same checkpoint.
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
    BEAT,
    Declaration,
    Ledger,
    Record,
    best,
    default_folder,
    open_study,
)
from midflight.search.space import Config, Space
from midflight.search.trial import Job, Objective, Outcome, run_job

DEATHS = 3  # of its worker, after which a trial is given up
FAILURES = 3  # first trials that may fail before the search does

Callback = Callable[[Record], None]


@dataclass
class Result:
    """What a search found.

    Attributes:
        records: every trial.
        best: the one of least validation loss; None if none has any.
    """

    records: list[Record]
    best: Record | None
    ledger: Ledger

    def load(self) -> Any:
        """The state with which the best trial was last reported; None if it kept none."""
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
    """Search `space` for the configuration of least validation loss; what is `online` is tuned inside.

    Args:
        objective: trains a `Trial` and reports its validation loss.
        space: what is searched, and what is tuned inside each trial.
        engine: "random"; "tpe"; "bohb", which is TPE with Hyperband; "smac", which is SMAC3's random forest
            with Hyperband; "ray", which is Ray Tune on many machines.
        trials: trials in the whole study, those of earlier calls included. A configuration that SMAC
            promotes counts again. Each of several processes that share the study may add one too many.
        seconds: time for this call; what is cut off then is continued by the next one.
        epochs: of a whole training. Hyperband compares after 1, 3, 9, ... of them.
        workers: trials at once, each in a process of its own; with 1 they run in this process.
        storage: where the study is kept; None for memory, else see `open_storage`. A search of the same
            `name` is resumed.
        seed: of the engine and of every trial.
        folder: of the checkpoints; beside the storage, or temporary, if not given. Processes on several
            machines continue each other's trials if it is shared.
        warm_start: whether what is tuned inside starts where the nearest good configuration ended.
        first: configurations to be tried before the engine proposes any; not with Hyperband of SMAC.
        callbacks: called with the `Record` of a trial when it begins, reports or ends.
        label: the objective's name in the study; a study is not resumed under another.
        options: of the engine ray: `address`, `scheduler`.

    Raises:
        SearchError: an argument does not fit, the storage cannot be reached, or holds another search.
        MissingExtra: what the engine stands on is not installed.
        ObjectiveFailed: the first trials all failed.
        StorageLost: the storage could be reached, and then no longer.
        Interrupted: Ctrl-C; its `result` is what was found. A `KeyboardInterrupt`.
    """
    if trials is None and seconds is None:
        raise SearchError("one of trials and seconds must be given, or the search would never end.")
    for what, value in (("trials", trials), ("seconds", seconds), ("epochs", epochs), ("workers", workers)):
        if value is not None and value <= 0:
            raise SearchError(f"{what} > 0 must hold, but {what}={value}.")
    if not space.searched:
        raise SearchError(
            "a search needs something to search, but all of the space is tuned online; use midflight.Tuner."
        )
    built = build(engine, Task(space, epochs, trials, seed), options)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    temporary = folder is None and storage is None
    where = (
        Path(tempfile.mkdtemp()) if temporary else (folder or default_folder(storage, name) / "checkpoints")
    )
    declaration = Declaration(space, epochs, seed, label, machine())
    with open_study(storage, name, declaration, where, sampler=built.sampler, pruner=built.pruner) as ledger:
        if temporary:
            weakref.finalize(ledger, shutil.rmtree, where, ignore_errors=True)
        search = Search(ledger, space, built, epochs, trials, seconds, seed, warm_start, first, callbacks)
        try:
            with ledger.alive():
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


def _run_here(search: "Search", objective: Objective) -> None:
    before = checkpoint.random_state()
    try:
        while (job := search.next_job()) is not None:
            search.ended(job.number, run_job(job, objective, partial(search.heard, job.number)))
    finally:
        checkpoint.set_random_state(before)


class Search:
    """The one who asks and tells; `run_job` runs what it hands out, here or elsewhere."""

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
        self._beat = time.monotonic()
        self._running: dict[int, _Running] = {}
        self._to_continue: deque[optuna.Trial] = deque()
        self._failed_first = 0

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._deadline

    @property
    def seconds_left(self) -> float:
        """Until the time is up."""
        return max(0.0, self._deadline - time.monotonic())

    def take_over(self) -> None:
        """Queue the trials that another process left unfinished."""
        self._beat = time.monotonic()
        for orphan in self.ledger.orphans():
            self._to_continue.append(optuna.Trial(self._study, orphan._trial_id))

    def next_job(self) -> Job | None:
        """A trial to be continued, or a new one; None if there is none now."""
        if time.monotonic() - self._beat > BEAT:
            self.take_over()
        if self.is_over:
            return None
        if self._to_continue:
            return self._begin(self._to_continue.popleft())
        if self.trials is not None and len(self._study.get_trials(deepcopy=False)) >= self.trials:
            return None
        if self._first:
            self._study.enqueue_trial(self._first.popleft())
        elif not self._engine.prepare(self._study):
            return None
        return self._begin(self._study.ask())

    def heard(self, number: int, points: list[Point]) -> bool:
        """Store what a trial reported; whether it shall go on."""
        running = self._running[number]
        trial = running.trial
        try:
            self._store(running, [point for point in points if point.epoch > running.epoch])
        except optuna.exceptions.UpdateFinishedTrialError:  # taken for dead, and finished by another process
            running.cut = True
            return False
        self._tell_callbacks(number)
        if not math.isfinite(running.loss):
            running.stop = "the loss was not finite"
        elif running.epoch >= self.epochs:
            return True
        elif trial.should_prune():
            running.stop = f"stopped by the engine after epoch {running.epoch}"
        elif self.is_over:
            running.cut = True
        return not (running.stop or running.cut)

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

    def became(self, number: int, config: Config) -> None:
        """A trial has another configuration from here on; population-based training does that."""
        self._running[number].trial.set_user_attr("config", config)

    def ended(self, number: int, outcome: Outcome) -> None:
        """A job is over."""
        running = self._running.pop(number)
        trial = running.trial
        if running.cut or self.ledger.record(number).state != "unfinished":
            return
        message = running.stop or outcome.message
        if message:
            trial.set_user_attr("message", message)
        if running.stop or outcome.how == "stopped":
            self._study.tell(trial, state=TrialState.PRUNED)
        elif outcome.how == "failed":
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, running.loss)
        self._tell_callbacks(number)
        self._judge(outcome)
        if not self._engine.promotes:
            self.ledger.clear_checkpoints()

    def died(self, number: int, counts: bool = True) -> None:
        """The process that ran a job is gone: the trial goes on in another one, but not forever."""
        trial = self._running[number].trial
        deaths = trial.user_attrs.get("deaths", 0) + counts
        trial.set_user_attr("deaths", deaths)
        if deaths >= DEATHS:
            self.ended(number, Outcome("failed", f"its worker process died {deaths} times"))
        else:
            del self._running[number]
            self._to_continue.appendleft(trial)

    def result(self) -> Result:
        """What was found so far."""
        records = self.ledger.records()
        return Result(records, best(records), self.ledger)

    def _begin(self, trial: optuna.Trial) -> Job:
        trial.set_user_attr("owner", self.ledger.owner)
        config = suggest(trial, self.space)
        if "starts" not in trial.user_attrs:
            self._describe(trial, config)
        attrs = trial.user_attrs
        known = self.ledger.record(trial.number)
        self._running[trial.number] = _Running(
            trial, known.epoch, known.loss, [(e, v) for e, v in known.trajectory]
        )
        self._tell_callbacks(trial.number)
        return Job(
            number=trial.number, config=config, starts=attrs["starts"], epochs=self.epochs, seed=self._seed,
            space=self.space, checkpoint=self.ledger.checkpoint(attrs["root"]),
        )  # fmt: skip

    def _describe(self, trial: optuna.Trial, config: Config) -> None:
        """What the trial continues, or where its tuned hyperparameters start."""
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

    def _judge(self, outcome: Outcome) -> None:
        if outcome.how != "failed":
            self._failed_first = -1
        elif self._failed_first >= 0:
            self._failed_first += 1
            if self._failed_first >= FAILURES:
                raise ObjectiveFailed(
                    f"the first {FAILURES} trials all failed, the last one by {outcome.message}"
                ) from outcome.error

    def _tell_callbacks(self, number: int) -> None:
        if self._callbacks:
            known = self.ledger.record(number)
            for callback in self._callbacks:
                callback(known)


@dataclass
class _Running:
    """A trial in progress; `stop` says why it is to end, `cut` that the time was up."""

    trial: optuna.Trial
    epoch: int
    loss: float
    trajectory: list[tuple[int, Config]]
    stop: str = ""
    cut: bool = False


def nearest_values(space: Space, config: Config, records: Sequence[Record]) -> Config:
    """The tuned values of the nearest configuration among the better half of those trained to the end."""
    tuned = sorted(
        (r for r in records if r.state == "complete" and r.trajectory and math.isfinite(r.loss)),
        key=lambda r: r.loss,
    )
    good = tuned[: len(tuned) // 2]  # of a single one nobody knows whether it is good
    nearest = min(good, key=lambda r: (space.distance(config, r.config), r.loss), default=None)
    return dict(nearest.online) if nearest else {}
