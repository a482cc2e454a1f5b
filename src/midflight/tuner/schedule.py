"""When hyper-steps come: early more often, at every n-th optimiser step, or within a share of the time.

A hyperparameter far from its best spoils the weights for as long as it stays there, so most hyper-steps are
best spent early.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Protocol

PER = 20
"""Optimiser steps per hyper-step, over the whole run."""


class Schedule(Protocol):
    """When hyper-steps come; asked after each optimiser step."""

    @property
    def step_scale(self) -> float:
        """How far a hyper-step goes, in its usual lengths."""

    def next_is_hyper(self, steps: int, hyper: bool, busy: bool = False) -> bool:
        """Whether the coming optimiser step has a hyper-step.

        Args:
            steps: of the optimiser so far.
            hyper: whether the last of them had one.
            busy: whether the tuner did something else for itself since the step before.
        """

    def begin(self, total_steps: int | None) -> None:
        """The run begins; it has so many optimiser steps, if that is known."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Every:
    """At each n-th optimiser step.

    Args:
        n: n >= 1.
    """

    step_scale = 1.0

    def __init__(self, n: int) -> None:
        self.n = whole("n", n)

    def begin(self, total_steps: int | None) -> None:
        pass

    def next_is_hyper(self, steps: int, hyper: bool, busy: bool = False) -> bool:
        return (steps + 1) % self.n == 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class FrontLoaded:
    """One hyper-step for `per` optimiser steps, most of them early: the n-th of N after (n / N)^2 of the run.

    Where the length of the run is not known, at each `per`-th step.

    Args:
        per: optimiser steps per hyper-step, over the whole run.
    """

    step_scale = 1.0

    def __init__(self, per: int = PER) -> None:
        self.per = whole("per", per)
        self._total: int | None = None
        self._taken = 0

    def begin(self, total_steps: int | None) -> None:
        self._total = total_steps

    def next_is_hyper(self, steps: int, hyper: bool, busy: bool = False) -> bool:
        self._taken += hyper
        if self._total is None:
            return (steps + 1) % self.per == 0
        planned = max(1, self._total // self.per)
        return steps > 0 and (steps + 1) * planned**2 >= self._total * (self._taken + 1) ** 2

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._taken = state["taken"]


class TimeBudget:
    """As often as tuning stays below a share of the time that training takes without it.

    From the end of one optimiser step to the end of the next is one training step of the user's loop,
    whatever is in it. Plain steps are those in which the tuner did nothing, nor just before. What the others
    take over the mean of the plain ones is the cost of tuning. The next hyper-step comes when share x (time
    that training takes so far) pays for all of tuning so far and one hyper-step more. If the number of steps
    is known, part of what the rest of the run will pay is spent early: share x time x sqrt(steps in the run /
    steps so far). The first hyper-step is slow for reasons of its own: it comes at once, soon followed by a
    second that shows what one costs, and what the first took beyond that is paid over the whole run.

    Args:
        share: of the training time, in (0, 1]; 0.05 allows 5 %.
        clock: seconds.
    """

    WARM_UP = 5
    """The first steps are slow for reasons of their own and are not counted."""
    AROUND = 100
    """Steps whose mean is the time that such a step takes now."""
    PAUSE = 5.0
    """A step that takes so many plain ones more than is usual holds a pause, such as an evaluation, and
    counts as a usual one."""
    AHEAD = 4.0
    """At most so many times the share is spent early."""
    STEP_SCALES = 0.5, 4.0
    """The shortest and the longest step scale."""
    REACH = 0.75
    """Strides grow by this power of the steps to a hyper-step: with 1/2, fewer ones would wander as far,
    with 1, go as far in one direction."""
    AFTERMATH = 1
    """So many steps after a hyper-step find caches that it has emptied, and are not plain."""

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
        """Time of tuning so far over that of training without it."""
        return self._tuned / self._trained if self._trained else 0.0

    @property
    def step_scale(self) -> float:
        """(steps to a hyper-step / PER) ^ REACH"""
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

    def state_dict(self) -> dict[str, Any]:
        return {
            "plain": astuple(self._plain),
            "hyper": astuple(self._hyper),
            "first": self._first,
            "trained": self._trained,
            "tuned": self._tuned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = None  # what lay between is not training
        self._plain, self._hyper = _Mean(*state["plain"]), _Mean(*state["hyper"])
        self._first, self._trained, self._tuned = state["first"], state["trained"], state["tuned"]


@dataclass
class _Mean:
    """Of about the last so many values."""

    value: float = 0.0
    count: int = 0

    def add(self, x: float, around: int) -> None:
        self.count = min(self.count + 1, around)
        self.value += (x - self.value) / self.count


def whole(name: str, value: Any) -> int:
    """`value` if it is a whole number of at least 1; raises `ValueError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, but {name}={value!r}.")
    return value


def schedule_for(schedule: Schedule | int | None) -> Schedule:
    """The schedule that an argument asks for.

    Raises:
        TypeError: it is neither a schedule nor a number.
        ValueError: it is a number that is not whole, or below 1.
    """
    if schedule is None:
        return FrontLoaded()
    if isinstance(schedule, int | float):
        return Every(schedule)
    if not hasattr(schedule, "next_is_hyper"):
        raise TypeError(
            f"schedule must be a whole number or a schedule such as mf.Every(20), but got {schedule!r}."
        )
    return schedule
