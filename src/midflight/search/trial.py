"""What an objective sees of the search: a configuration, a length, and where to report."""

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from midflight.search import checkpoint
from midflight.search.checkpoint import Checkpoint, Point
from midflight.search.space import Config, Space
from midflight.space import Space as TunedSpace

Objective: TypeAlias = Callable[["Trial"], float | None]
"""Trains a trial's configuration, and reports or returns its validation loss."""

Send: TypeAlias = Callable[[list[Point]], bool]
"""Tells the search what was reported; whether to go on."""


class Stop(Exception):
    """The search ends this trial here; let it pass through the objective."""


@dataclass(frozen=True)
class Job:
    """A trial to be run, or to be continued from its checkpoint."""

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
        how: "complete", "stopped" by the search, or "failed" by an exception.
        message: of the exception.
        error: the exception, in the process in which it was raised.
    """

    how: Literal["complete", "stopped", "failed"]
    message: str = ""
    error: Exception | None = None


class Trial:
    """One training of a configuration, in the hands of an objective.

    Attributes:
        number: of the trial in its study, from 0.
        params: name -> value of what is active in this configuration; for what is tuned inside,
            where it starts.
        epochs: length of the whole training. A trial may be ended before, by `report`, and continued later.
        seed: the same for every trial of a search; torch, numpy and random are seeded by it already.
    """

    def __init__(self, job: Job, send: Send) -> None:
        self.number = job.number
        self.params: Config = {**job.config, **job.starts}
        self.epochs = job.epochs
        self.seed = job.seed
        self._job = job
        self._send = send
        self._points: list[Point] = []

    def online(self) -> TunedSpace | None:
        """The hyperparameters to be tuned inside this trial, each at its start; None if there are none."""
        return self._job.space.tuned(self._job.starts)

    def load(self) -> Any:
        """The state with which this configuration was last reported, None if it never was.

        Also puts the global random generators of torch, numpy and random where they were.

        Raises:
            Stop: it was trained for long enough already.
        """
        saved = checkpoint.load(self._job.checkpoint)
        if saved is None:
            return None
        self._points = saved.points
        self._tell(saved.points)
        checkpoint.set_random_state(saved.random_state)
        return saved.state

    def report(
        self, epoch: int, loss: float, state: Any = None, space: TunedSpace | None = None, **extra: float
    ) -> None:
        """Tell the search how the training stands.

        Args:
            epoch: epochs done, from 1 to `epochs`; larger than in the last report.
            loss: validation loss now, to be minimised; one that is not finite ends the trial.
            state: whatever `load` shall return when the trial goes on: tensors, plain values, and lists
                and dicts of them; or a function that returns it. None keeps nothing: then a trial that was
                cut off begins anew.
            space: the hyperparameters that are tuned inside, for their values now.
            extra: further numbers to be stored beside, such as test_error=0.02; used for nothing.

        Raises:
            Stop: the search ends this trial here.
            ValueError: the epoch does not fit.
        """
        last = self._points[-1].epoch if self._points else 0
        if not last < epoch <= self.epochs:
            raise ValueError(
                f"{last} < epoch <= {self.epochs} must hold in a report that follows one of epoch {last}, "
                f"but epoch={epoch}; go on from the epoch after that of `trial.load()`."
            )
        online = {} if space is None else space.as_dict()
        point = Point(epoch, float(loss), online, {name: float(x) for name, x in extra.items()})
        self._points = [*self._points, point]
        if state is not None and math.isfinite(point.loss):
            self._save(state() if callable(state) else state)
        self._tell([point])

    def _save(self, state: Any) -> None:
        Checkpoint(self._points, state, checkpoint.random_state()).save(self._job.checkpoint)
        if len(self._points) == 1:
            checkpoint.load(self._job.checkpoint)  # what cannot be read back is better known now than later

    def _tell(self, points: list[Point]) -> None:
        if not self._send(points):
            raise Stop


def run_job(job: Job, objective: Objective, send: Send) -> Outcome:
    """Run the objective on a job; whatever it raises, but for KeyboardInterrupt, ends the trial only."""
    checkpoint.seed_all(job.seed)
    trial = Trial(job, send)
    try:
        loss = objective(trial)
        if loss is not None:
            trial.report(job.epochs, float(loss))
        elif not trial._points:
            raise ValueError("an objective must report or return a loss, but did neither.")
    except Stop:
        return Outcome("stopped")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(
            "failed", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})", error
        )
    return Outcome("complete")
