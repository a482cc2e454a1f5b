"""When to take a hyper-step: at every k-th training step, or as often as a share of the time allows."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean, median
from typing import Any, Protocol


class Pace(Protocol):
    """Asked after each call of `backward`."""

    def next_is_hyper(self, calls: int, hyper: bool) -> bool:
        """Whether the coming call takes a hyper-step.

        Args:
            calls: of `backward` so far.
            hyper: whether the last of them took one.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Every:
    """At each k-th call."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"every >= 1 must hold, but every={k}.")
        self.k = k

    def next_is_hyper(self, calls: int, hyper: bool) -> bool:
        return (calls + 1) % self.k == 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Budget:
    """As often as tuning stays below a share of the time that training takes without it.

    From the end of one `backward` to the end of the next is one training step of the user's loop, whatever is
    in it. What a step with a hyper-step takes over the mean of the plain ones before it is the
    cost of tuning. The next hyper-step comes when share x (time of the plain part so far) pays for
    all hyper-steps so far and one more.

    Args:
        share: of the training time, in (0, 1]; 0.05 allows 5 %.
        clock: seconds.
    """

    WARM_UP = 5
    """The first steps are slow for reasons of their own and are not counted."""
    AROUND = 101
    """Plain steps whose mean is the time of a plain step now."""
    PAUSE = 5.0
    """A plain step counts for at most so many medians; the rest is a pause, such as an evaluation."""

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"0 < budget <= 1 must hold, but budget={share}.")
        self.share = share
        self._clock = clock
        self._last: float | None = None
        self._plain: deque[float] = deque(maxlen=self.AROUND)
        self._hyper: deque[float] = deque(maxlen=5)
        self._trained = 0.0
        self._tuned = 0.0

    @property
    def spent(self) -> float:
        """Time of tuning so far over that of training without it."""
        return self._tuned / self._trained if self._trained else 0.0

    def next_is_hyper(self, calls: int, hyper: bool) -> bool:
        now = self._clock()
        took, self._last = None if self._last is None else now - self._last, now
        if took is None or calls <= self.WARM_UP:
            return False
        if not hyper:
            self._plain.append(min(took, self.PAUSE * median(self._plain)) if self._plain else took)
        usual = fmean(self._plain) if self._plain else took
        self._trained += usual if hyper else self._plain[-1]
        if hyper:
            self._hyper.append(max(0.0, took - usual))
            self._tuned += self._hyper[-1]
        expected = median(self._hyper) if self._hyper else 0.0
        return bool(self._plain) and self._tuned + expected <= self.share * self._trained

    def state_dict(self) -> dict[str, Any]:
        return {
            "plain": list(self._plain),
            "hyper": list(self._hyper),
            "trained": self._trained,
            "tuned": self._tuned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = None  # what lay between is not training
        self._plain.extend(state["plain"])
        self._hyper.extend(state["hyper"])
        self._trained, self._tuned = state["trained"], state["tuned"]
