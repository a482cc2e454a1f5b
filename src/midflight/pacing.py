"""When to take a hyper-step: early more often, at every k-th call, or as often as a share of the time allows.

A hyperparameter far from its best spoils the weights for as long as it stays there, so most hyper-steps are
best spent early.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Protocol

PER = 20
"""Calls to a hyper-step, on the whole."""


class Pace(Protocol):
    """Asked after each call of `backward`."""

    @property
    def stride(self) -> float:
        """How far a hyper-step goes, in its usual lengths."""

    def next_is_hyper(self, calls: int, hyper: bool, busy: bool = False) -> bool:
        """Whether the coming call takes a hyper-step.

        Args:
            calls: of `backward` so far.
            hyper: whether the last of them took one.
            busy: whether the tuner did something else for itself since the call before.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Every:
    """At each k-th call."""

    stride = 1.0

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"every >= 1 must hold, but every={k}.")
        self.k = k

    def next_is_hyper(self, calls: int, hyper: bool, busy: bool = False) -> bool:
        return (calls + 1) % self.k == 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Early:
    """One hyper-step for `per` calls of a run, most of them early: the n-th of N after (n / N)^2 of the run.

    Args:
        total: calls in the whole run.
        per: calls to a hyper-step, on the whole.
    """

    stride = 1.0

    def __init__(self, total: int, per: int = PER) -> None:
        self._total, self._planned, self._taken = total, max(1, total // per), 0

    def next_is_hyper(self, calls: int, hyper: bool, busy: bool = False) -> bool:
        self._taken += hyper
        due = (calls + 1) * self._planned**2 >= self._total * (self._taken + 1) ** 2
        return due and calls > 0  # the first call shows how many there are to a step

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._taken = state["taken"]


class Budget:
    """As often as tuning stays below a share of the time that training takes without it.

    From the end of one `backward` to the end of the next is one training step of the user's loop, whatever is
    in it. Plain steps are those in which the tuner did nothing, nor just before. What the others take
    over the mean of the plain ones is the cost of tuning. The next hyper-step comes when share x (time
    that training takes so far) pays for all of tuning so far and one hyper-step more. If the number of calls
    is known, part of what the rest of the run will pay is spent early: share x time x sqrt(calls in the run /
    calls so far). The first hyper-step is slow for reasons of its own: it comes at once, soon followed by a
    second that shows what one costs, and what the first took beyond that is paid over the whole run.

    Args:
        share: of the training time, in (0, 1]; 0.05 allows 5 %.
        total: calls in the whole run; None if not known.
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
    STRIDES = 0.5, 4.0
    """The shortest and the longest stride."""
    REACH = 0.75
    """Strides grow by this power of the calls to a hyper-step: with 1/2, fewer ones would wander as far,
    with 1, go as far in one direction."""
    AFTERMATH = 1
    """So many steps after a hyper-step find caches that it has emptied, and are not plain."""

    def __init__(
        self, share: float, total: int | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"0 < budget <= 1 must hold, but budget={share}.")
        self.share = share
        self._total = total
        self._clock = clock
        self._last: float | None = None
        self._plain, self._hyper = _Mean(), _Mean()
        self._first: float | None = None
        self._since = self.AFTERMATH
        self._trained = 0.0
        self._tuned = 0.0

    @property
    def spent(self) -> float:
        """Time of tuning so far over that of training without it."""
        return self._tuned / self._trained if self._trained else 0.0

    @property
    def stride(self) -> float:
        """(calls to a hyper-step / PER) ^ REACH"""
        plain = self._plain.value
        if not self._hyper.count or not plain:
            return 1.0
        shortest, longest = self.STRIDES
        calls = (self._hyper.value - plain) / (self.share * plain)
        return min(longest, max(shortest, math.pow(max(0.0, calls) / PER, self.REACH)))

    def next_is_hyper(self, calls: int, hyper: bool, busy: bool = False) -> bool:
        now = self._clock()
        took, self._last = None if self._last is None else now - self._last, now
        if took is None or calls <= self.WARM_UP:
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
        return self._can_pay(calls)

    def _can_pay(self, calls: int) -> bool:
        if self._first is None:
            return True
        if not self._hyper.count:
            return self._since > self.AFTERMATH
        early = math.sqrt(max(1.0, self._total / calls)) if self._total else 1.0
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


def pace_for(every: int | None, budget: float | None, total_steps: int | None) -> Pace:
    """What the arguments of these names of `Tuner` ask for."""
    if budget is not None:
        return Budget(budget, total_steps)
    if every is None and total_steps is not None:
        return Early(total_steps)
    return Every(PER if every is None else every)
