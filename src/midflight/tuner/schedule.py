"""Decide when hyper-steps come: mostly early, at each n-th optimiser step, or within a share of the time.

A hyperparameter far from its best value harms the weights for as long as it stays there. So most hyper-steps
should come early.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from midflight.tuner.saved import Saved

PER = 20
"""Optimiser steps per hyper-step, over the whole run."""
PER_OF_SHARES = 25
"""Optimiser steps between hyper-steps if nothing but mixtures is tuned. They come evenly, because a source
that is memorised shows it late. With 25, tuning costs 10 % of a run of 600 steps, and 15 % where most weights
are embeddings (`benchmarks/mixture_cost.py`)."""


class Schedule(Saved, ABC):
    """Decides when hyper-steps come; a subclass inherits hyper-steps of the usual length, and no state."""

    @property
    def step_scale(self) -> float:
        """The factor on how far a hyper-step moves the hyperparameters; read at each hyper-step.

        1 is the usual length. A schedule with rarer hyper-steps than usual may return more.
        """
        return 1.0

    @abstractmethod
    def next_is_hyper(self, steps: int, hyper: bool, busy: bool = False) -> bool:
        """Return whether the coming optimiser step has a hyper-step.

        It is called once before the first optimiser step and once after each. `Tuner` also calls it after
        loading a state.

        Args:
            steps: number of optimiser steps already taken, so the coming one has number steps + 1.
            hyper: whether the last optimiser step had a hyper-step; False after loading a state.
            busy: whether the tuner did other work after that step, such as averaging weights.
        """

    def begin(self, total_steps: int | None) -> None:
        """Start a run of this many optimiser steps; None if the number is not known."""
        return


class Every(Schedule):
    """Takes a hyper-step at each n-th optimiser step.

    Args:
        n: optimiser steps per hyper-step, n >= 1.
    """

    def __init__(self, n: int) -> None:
        self.n = whole("n", n)

    def planned(self, steps: int) -> int:
        """Return the number of hyper-steps in a run of this many optimiser steps."""
        return steps // self.n

    def next_is_hyper(self, steps: int, hyper: bool, busy: bool = False) -> bool:
        return (steps + 1) % self.n == 0


class FrontLoaded(Schedule):
    """Takes most hyper-steps early: the n-th of N comes after the share (n / N)^2 of the run.

    By default N is T / PER for a run of T optimiser steps. Beyond ENOUGH hyper-steps it grows as the square
    root of T, because a long run needs more of them for precision only. If the length of the run is not
    known, the n-th hyper-step comes as soon as N of the steps so far is n.

    Args:
        per: optimiser steps per hyper-step, over a whole run of any length. None follows the rule above.
    """

    SAVED = ("_taken",)

    ENOUGH = 150
    """The number of hyper-steps that comes at the full rate."""

    def __init__(self, per: int | None = None) -> None:
        self.per = None if per is None else whole("per", per)
        self._total: int | None = None
        self._taken = 0

    def begin(self, total_steps: int | None) -> None:
        self._total = total_steps

    def planned(self, steps: int) -> int:
        """Return N for a run of this many optimiser steps."""
        at_full_rate = steps / (self.per or PER)
        if self.per is None and at_full_rate > self.ENOUGH:
            return int(math.sqrt(self.ENOUGH * at_full_rate))
        return int(at_full_rate)

    def next_is_hyper(self, steps: int, hyper: bool, busy: bool = False) -> bool:
        self._taken += hyper
        if self._total is None:
            return self.planned(steps + 1) > self._taken
        planned = max(1, self.planned(self._total))
        return steps > 0 and (steps + 1) * planned**2 >= self._total * (self._taken + 1) ** 2


class TimeBudget(Schedule):
    """Takes hyper-steps so rarely that tuning costs at most a share of the time of training without it.

    A training step lasts from the end of one optimiser step to the end of the next, whatever the user's loop
    does in between. A step is plain if the tuner did nothing in it or just before it. The cost of tuning is
    the time that the other steps take beyond the mean plain step. What the tuner's hooks add to each plain
    step is not counted: it can exceed the share where a step takes under a few milliseconds.

    The next hyper-step comes when share x (time of training without tuning so far) covers all tuning so far
    and one more hyper-step. If the number of steps is known, part of the budget of the coming steps is spent
    early: the allowance is share x time x sqrt(steps in the run / steps so far).

    The first hyper-step comes at once and is slower than later ones. A second one soon after shows the usual
    cost. The excess of the first is spread over the run.

    Args:
        share: of the training time, in (0, 1]; 0.05 allows 5 %.
        clock: returns the time in seconds.
    """

    SAVED = ("_plain", "_hyper", "_first", "_trained", "_tuned")

    WARM_UP = 5
    """How many steps at the beginning are not counted, because they are unusually slow."""
    AROUND = 100
    """The mean time of plain steps, and of hyper-steps, is over about this many of the last ones."""
    PAUSE = 5.0
    """A step contains a pause, such as an evaluation, if it takes this many plain steps longer than usual.
    It is counted with the usual time."""
    AHEAD = 4.0
    """The largest factor on the share early in the run."""
    STEP_SCALES = 0.5, 4.0
    """The least and the greatest step scale."""
    REACH = 0.75
    """The power of the number of optimiser steps between hyper-steps by which their length grows. With 1/2,
    fewer hyper-steps would go as far in a random walk; with 1, as far in one direction."""
    AFTERMATH = 1
    """How many steps after a hyper-step are not plain, because it has emptied the caches."""

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        if isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"0 < share <= 1 must hold, but share={share}.")
        self.share = share
        self._total: int | None = None
        self._clock = clock
        self._last: float | None = None
        self._plain, self._hyper = _Mean(), _Mean()
        self._first: float | None = None
        self._since = self.AFTERMATH
        self._trained = 0.0
        self._tuned = 0.0

    def begin(self, total_steps: int | None) -> None:
        self._total = total_steps

    @property
    def spent(self) -> float:
        """The time of tuning so far, divided by that of training without it."""
        return self._tuned / self._trained if self._trained else 0.0

    @property
    def step_scale(self) -> float:
        """(optimiser steps between hyper-steps / PER) ^ REACH, within STEP_SCALES; 1 until known."""
        plain = self._plain.value
        if not self._hyper.count or not plain:
            return 1.0
        shortest, longest = self.STEP_SCALES
        steps = (self._hyper.value - plain) / (self.share * plain)
        return min(longest, max(shortest, math.pow(max(0.0, steps) / PER, self.REACH)))

    def next_is_hyper(self, steps: int, hyper: bool, busy: bool = False) -> bool:
        now = self._clock()
        took, self._last = None if self._last is None else now - self._last, now
        if took is None or steps <= self.WARM_UP:
            return False
        self._since = 0 if hyper else self._since + 1
        alike = self._hyper if hyper else self._plain
        if alike.count and took > alike.value + self.PAUSE * self._plain.value:
            took = alike.value
        plain = self._since > self.AFTERMATH and not busy
        if plain or not self._plain.count:
            self._plain.add(took, self.AROUND)
        if hyper and self._first is None:
            self._first = took
        elif hyper:
            self._hyper.add(took, self.AROUND)
        usual = took if plain else self._plain.value
        self._trained += usual
        self._tuned += took - usual
        return self._can_pay(steps)

    def _can_pay(self, steps: int) -> bool:
        if self._first is None:
            return True
        if not self._hyper.count:
            return self._since > self.AFTERMATH
        early = math.sqrt(max(1.0, self._total / steps)) if self._total else 1.0
        once = max(0.0, self._first - self._hyper.value)
        due = self._tuned - once * (1 - 1 / early) + self._hyper.value - self._plain.value
        return due <= self.share * self._trained * min(self.AHEAD, early)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._last = None  # the time between saving and loading is not training


@dataclass
class _Mean(Saved):
    """A running mean of about the last `around` values."""

    SAVED = ("value", "count")

    value: float = 0.0
    count: int = 0

    def add(self, x: float, around: int) -> None:
        self.count = min(self.count + 1, around)
        self.value += (x - self.value) / self.count


def whole(name: str, value: Any) -> int:
    """Return `value` if it is a whole number of at least 1; raise `ValueError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, but {name}={value!r}.")
    return value


def schedule_for(schedule: Schedule | int | None, only_shares: bool = False) -> Schedule:
    """Return the schedule for the argument `schedule` of `Tuner`.

    Args:
        only_shares: whether nothing but mixtures is tuned.

    Raises:
        TypeError: `schedule` is neither a schedule nor a number.
        ValueError: it is a number that is not whole, or below 1.
    """
    if schedule is None:
        return Every(PER_OF_SHARES) if only_shares else FrontLoaded()
    if isinstance(schedule, int | float):
        return Every(whole("schedule", schedule))
    if not hasattr(schedule, "next_is_hyper"):
        raise TypeError(
            f"schedule must be a whole number or a schedule such as mf.Every(20), but got {schedule!r}."
        )
    return schedule
