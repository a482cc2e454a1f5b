"""The objective's view of the search: a configuration, a training length, and `report`."""

import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from midflight.search import checkpoint
from midflight.search.checkpoint import Checkpoint, Point
from midflight.search.errors import StorageLost
from midflight.search.space import Config, Space
from midflight.space import Space as TunedSpace

Objective: TypeAlias = Callable[["Trial"], float | None]
"""Trains a trial and reports or returns its validation loss."""

Send: TypeAlias = Callable[[list[Point]], bool]
"""Sends reports to the search; returns whether the trial continues."""


class Stop(Exception):
    """The search ends this trial; an objective must not catch it."""


@dataclass(frozen=True)
class Job:
    """A trial to start, or to continue from its checkpoint."""

    number: int
    config: Config
    starts: Config
    epochs: int
    seed: int
    space: Space
    checkpoint: Path


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        how: "complete", "stopped" (by the search), "failed" (by an exception) or "lost" (the disk, the
            storage or a callback failed, so the trial stays unfinished).
        message: text of the exception, or reason of the stop.
        error: the exception; None outside the process that raised it.
    """

    how: Literal["complete", "stopped", "failed", "lost"]
    message: str = ""
    error: Exception | None = None


class Trial:
    """One training of a configuration, passed to the objective.

    Attributes:
        number: number of the trial in its study, from 0.
        epochs: epochs of a full training. `report` may end the trial earlier; it may continue later.
        seed: seed of the search, equal for all trials; torch, numpy and random are already seeded with it.
    """

    def __init__(self, job: Job, send: Send) -> None:
        self.number = job.number
        self.epochs = job.epochs
        self.seed = job.seed
        self._job = job
        self._send = send
        self._points: list[Point] = []
        self._before: Config = {}  # other values that the loaded state was trained with
        # the error of the disk, the storage or a callback; stored because an objective may catch it
        self._lost: Exception | None = None

    @property
    def params(self) -> Config:
        """A new dict, name -> value of the active hyperparameters; the initial value of a tuned one."""
        return {**self._job.config, **self._job.starts}

    def online(self) -> TunedSpace | None:
        """Return the hyperparameters to tune in this trial, at their initial values, or None."""
        return self._job.space.tuned(self._job.starts)

    def load(self) -> Any:
        """Return the last reported state of this configuration; None if there is none.

        Also restores the global random generators of torch, numpy and random. If population-based training
        copied the state from another trial, this trial's lr, momentum, ... replace the other's in every
        `state_dict` of an optimiser.

        Raises:
            Stop: the search needs no further epoch of this trial.
        """
        saved = checkpoint.load_or_drop(self._job.checkpoint)
        if saved is None:
            return None
        self._points = saved.points
        self._send_points(saved.points)
        config = self._job.config
        self._before = {n: v for n, v in saved.config.items() if type(v) is float and config.get(n) != v}
        for group in _groups(saved.state):
            for name, before in self._before.items():
                for key in {name, f"initial_{name}"} & group.keys():
                    scaled = group[key] * config[name] / before if before else config[name]
                    group[key] = config[name] if group[key] == before else scaled
        checkpoint.set_random_state(saved.random_state)
        return saved.state

    def report(
        self, epoch: int, loss: float, state: Any = None, space: TunedSpace | None = None, **extra: float
    ) -> None:
        """Report the training to the search.

        Args:
            epoch: epochs done, in [1, `epochs`]; larger than in the last report.
            loss: validation loss, which the search minimises. A loss that is not finite ends the trial.
            state: what `load` returns when the trial continues, or a function that returns it: tensors,
                plain values, and lists and dicts of them. None: an interrupted trial starts again.
            space: the tuned hyperparameters; their current values are stored.
            extra: other numbers to store, such as test_error=0.02; the search ignores them.

        Raises:
            Stop: the search ends this trial.
            ValueError: the epoch is out of range, or an optimiser in the state trains with a value that is
                not this trial's.
            StorageLost: the checkpoint cannot be written, so the search ends.
        """
        last = self._points[-1].epoch if self._points else 0
        if not last < epoch <= self.epochs or epoch != int(epoch):
            raise ValueError(
                f"{last} < epoch <= {self.epochs} must hold after a report of epoch {last}, but got "
                f"epoch={epoch}; continue from the epoch in `trial.load()`."
            )
        online = {} if space is None else space.as_dict()
        point = Point(int(epoch), float(loss), online, {name: float(x) for name, x in extra.items()})
        self._points = [*self._points, point]
        if state is not None and math.isfinite(point.loss):
            self._save(state() if callable(state) else state)
        self._send_points([point])

    def _save(self, state: Any) -> None:
        for group in _groups(state):
            for name, before in self._before.items():
                if group.get(name) == before:
                    raise ValueError(
                        f"this trial must train with {name}={self._job.config[name]}, but its optimiser has "
                        f"the {before} of the trial that it was copied from; set the optimiser's options "
                        "from trial.params after loading its state."
                    )
        try:
            Checkpoint(self._points, state, checkpoint.random_state(), self._job.config).save(
                self._job.checkpoint
            )
        except StorageLost as error:
            self._lost = error
            raise

    def _send_points(self, points: list[Point]) -> None:
        try:
            goes_on = self._send(points)
        except Exception as error:
            self._lost = error
            raise
        if not goes_on:
            raise Stop


def run_job(job: Job, objective: Objective, send: Send) -> Outcome:
    """Run the objective on a job; an exception ends only this trial."""
    checkpoint.seed_all(job.seed)
    trial = Trial(job, send)
    try:
        loss = objective(trial)
        if trial._lost is None and loss is not None:
            trial.report(job.epochs, float(loss))
        elif not trial._points:
            raise ValueError("the objective must report or return a loss, but it did neither.")
    except Exception as error:
        if trial._lost is None:
            if isinstance(error, Stop):
                return Outcome("stopped")
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            return Outcome("failed", text, error)
    if trial._lost is not None:
        return Outcome("lost", str(trial._lost), trial._lost)
    return Outcome("complete")


def _groups(state: Any) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups of all optimisers' states in a nested state."""
    if isinstance(state, dict):
        groups = state.get("param_groups")
        if isinstance(groups, list):
            yield from (group for group in groups if isinstance(group, dict))
        for value in state.values():
            yield from _groups(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _groups(value)
