"""Where the validation loss is judged, so that a one-step hypergradient serves the whole run.

    v = dC2/dtheta at   average + caution (theta - average),   average = of the recent weights

Judged at theta, the weights themselves (caution 1), the loss holds what the optimiser's own
wandering costs at this moment, and beyond (caution over 1) more of it. More regularisation always
lowers that cost, also where it harms the trained model. Judged at the average (caution 0) the cost is
gone, but a step sees the present only: while the network learns what generalises, less
regularisation looks better, and memorising comes later.

Which of the two errs shows in C1 / C2, training over validation loss at the average. Caution rises as it
falls below a line from 1 at the start to MEMORISED at the end of the run. The average moves slowly, so that
at caution 0 the hypergradients of the last few hyper-steps are averaged too, which saves data. Towards the
end of a run it is shortened: little is left to judge then, and as the weights that a run ends with, a long
average lags behind.

This is for what regularises. Options that say how a step is taken, such as the learning rate, pay or
cost at once and are judged at theta', the weights after the step.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from midflight.trees import Tensors

WINDOW = 0.1
"""The average reaches back over this share of the steps so far."""
LAST, LAST_WINDOW = 0.2, 0.03
"""Over this last share of a run that shrinks to this."""
SAMPLES = 10
"""The weights are counted into it so many times in that share,"""
SAMPLED = 5
"""but not more often than at every so many steps."""
STEADY = 0.8
"""What the mean hypergradient keeps of the earlier ones at caution 0."""
RECENT = 0.15
"""C1 and C2 are averaged over this share of the hyper-steps so far."""
MEMORISED = 0.35
"""C1 / C2 below this at the end of a run, and a model counts as memorising."""
OPEN_END = 0.5
"""The same where the length of the run is not known."""
GAIN = 10.0
"""Caution per unit of C1 / C2 below the line."""
MOST = 3.0
"""The most caution there is; the sign of a weak hypergradient needs more than 1 to come through."""

KEPT = {torch.float32: torch.float16}
"""The best weights are kept in half the memory; a model loses less by it than it differs by the batch."""


class Horizon(Protocol):
    """How far the validation loss looks ahead."""

    looks: bool
    """Whether `observe` wants the losses at `average` at each hyper-step."""

    @property
    def at_average(self) -> bool:
        """Whether `place` is the average now."""

    @property
    def calm(self) -> float:
        """1 where signs of hypergradients can be averaged, 0 where each counts."""

    def due(self, steps: int) -> bool:
        """Whether `follow` has something to do after this many optimiser steps."""

    def follow(self, params: Mapping[str, Tensor], steps: int, progress: float | None) -> bool:
        """See the weights after this many optimiser steps; returns whether that took time."""

    def place(self, params: Tensors, at: Callable[[], Tensors]) -> Tensors:
        """Where v is taken.

        Args:
            params: the weights now, before the step.
            at: computes the weights at which the estimator wants v.
        """

    def smoothed(self, hypergradients: Tensors) -> Tensors:
        """What becomes of the hypergradients that were found at `place`."""

    def average(self) -> Tensors:
        """Weights at which C1 and C2 are compared; not to be changed."""

    def observe(
        self, train_loss: float, valid_loss: float, progress: float | None, buffers: Mapping[str, Tensor]
    ) -> None:
        """C1 and C2 at the average."""

    def candidates(self) -> dict[str, Tensors]:
        """What the run could end with beside its last weights."""

    def forget(self) -> None:
        """The weights have jumped."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class NextStep:
    """Judge each step by the validation loss right after it.

    Exact for the moment, and blind to the rest of the run: it over-regularises where data are many and
    training is short.
    """

    looks = False
    at_average = False
    calm = 1.0

    def due(self, steps: int) -> bool:
        return False

    def follow(self, params: Mapping[str, Tensor], steps: int, progress: float | None) -> bool:
        return False

    def place(self, params: Tensors, at: Callable[[], Tensors]) -> Tensors:
        return at()

    def smoothed(self, hypergradients: Tensors) -> Tensors:
        return hypergradients

    def average(self) -> Tensors:
        return {}

    def observe(
        self, train_loss: float, valid_loss: float, progress: float | None, buffers: Mapping[str, Tensor]
    ) -> None:
        pass

    def candidates(self) -> dict[str, Tensors]:
        return {}

    def forget(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Averaged:
    """Judge each step for the run: at the averaged weights, leaning to the weights themselves with caution.

    Holds the average of the weights, and in half precision the best one.

    Attributes:
        caution: in [0, MOST]; 0 judges at the average, 1 at the weights.
        best: weights and buffers where the validation loss at the average was least; empty before.
    """

    looks = True

    def __init__(self) -> None:
        self.caution = 0.0
        self.best: Tensors = {}
        self._best_loss = math.inf
        self._looks = 0
        self._steps = 0
        self._progress: float | None = None
        self._average: Tensors = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._losses: deque[tuple[int, float, float]] = deque()
        self._mean: Tensors = {}
        self._weight = 0.0

    def due(self, steps: int) -> bool:
        """SAMPLES times in the window, but at most at every SAMPLED-th step; and at the first."""
        window = _window(self._progress) * steps
        return not self._average or steps >= self._steps + max(SAMPLED, window / SAMPLES)

    @torch.no_grad()
    def follow(self, params: Mapping[str, Tensor], steps: int, progress: float | None = None) -> bool:
        """Count the weights after this many steps into the average, if it is time or there is none yet.

        Args:
            params: the weights.
            steps: of the optimiser so far.
            progress: share of the run that is over, in [0, 1]; None if its length is not known.

        Returns:
            whether it did.
        """
        if not self.due(steps):
            return False
        share = min(1.0, (steps - self._steps) / (_window(progress) * steps)) if steps else 1.0
        self._steps, self._progress = steps, progress
        # halves would not add up
        now = {n: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for n, p in params.items()}
        self._dtypes = {name: p.dtype for name, p in params.items()}
        known = [name for name in now if name in self._average]
        if known:
            torch._foreach_lerp_(
                [self._average[name] for name in known], [now[name] for name in known], share
            )
        self._average |= {name: p.clone() for name, p in now.items() if name not in self._average}
        return True

    def average(self) -> Tensors:
        """The averaged weights, in the weights' own types; not to be changed."""
        return {name: a.to(self._dtypes.get(name, a.dtype)) for name, a in self._average.items()}

    def forget(self) -> None:
        """The weights have jumped: begin the average and the losses anew; the caution stays."""
        self._average, self._looks = {}, 0
        self._losses.clear()
        self._mean, self._weight = {}, 0.0

    @torch.no_grad()
    def observe(
        self,
        train_loss: float,
        valid_loss: float,
        progress: float | None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """C1 and C2 on one batch each, at the average; sets the caution, and keeps the best average.

        Args:
            train_loss: C1.
            valid_loss: C2.
            progress: share of the run that is over, in [0, 1]; None if its length is not known.
            buffers: of the model, kept with the weights.
        """
        self._looks += 1
        self._losses.append((self._looks, train_loss, valid_loss))
        while len(self._losses) > 1 and self._losses[0][0] <= (1 - RECENT) * self._looks:
            self._losses.popleft()
        c1, c2 = (sum(entry[i] for entry in self._losses) / len(self._losses) for i in (1, 2))
        if c2 > 0:
            self.caution = min(MOST, max(0.0, GAIN * (_line(progress) - c1 / c2)))
        if c2 <= self._best_loss:
            self._best_loss = c2
            self._keep({**self.average(), **(buffers or {})})

    def _keep(self, tensors: Tensors) -> None:
        """The best so far; finer numbers than these would not change a loss that is compared."""
        for name, t in tensors.items():
            kept = self.best.get(name)
            if kept is None:
                half = name in self._dtypes  # a weight; buffers are few
                self.best[name] = t.to(KEPT.get(t.dtype, t.dtype) if half else t.dtype, copy=True)
            else:
                kept.copy_(t)

    @property
    def at_average(self) -> bool:
        """Without caution the average itself is the place."""
        return self.caution == 0

    @property
    def calm(self) -> float:
        """1 without caution, 0 from a caution of 1 on."""
        return max(0.0, 1 - self.caution)

    @torch.no_grad()
    def place(self, params: Tensors, at: Callable[[], Tensors]) -> Tensors:
        """The average, or with caution between it and the weights now, or beyond them.

        Not the weights after the step: that step follows the noise of the gradient in which the
        hyperparameters are judged, and runs end 8 % worse (measured).
        """
        if self.caution == 0:
            return self.average()
        return params | {
            name: self._average[name].lerp(p.to(self._average[name]), self.caution).to(p)
            for name, p in params.items()
            if name in self._average
        }

    @torch.no_grad()
    def smoothed(self, hypergradients: Tensors) -> Tensors:
        """The mean with those of earlier hyper-steps, which count less the more caution there is."""
        self._weight *= STEADY * self.calm
        self._weight += 1
        share = 1 / self._weight
        self._mean = {
            name: self._mean[name].lerp(g, share) if name in self._mean else g.clone()
            for name, g in hypergradients.items()
        }
        return dict(self._mean)

    def candidates(self) -> dict[str, Tensors]:
        """The average now, and where the validation loss was least on the way."""
        if not self.best:
            return {}
        earlier = {name: t.to(self._dtypes.get(name, t.dtype)) for name, t in self.best.items()}
        return {"average": self.average(), "earlier": earlier}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume."""
        return {
            "caution": self.caution,
            "best": dict(self.best),
            "dtypes": dict(self._dtypes),
            "best_loss": self._best_loss,
            "looks": self._looks,
            "steps": self._steps,
            "progress": self._progress,
            "average": {name: a.clone() for name, a in self._average.items()},
            "losses": list(self._losses),
            "mean": {name: g.clone() for name, g in self._mean.items()},
            "weight": self._weight,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self.caution = state["caution"]
        self.best, self._best_loss = dict(state["best"]), state["best_loss"]
        self._dtypes = dict(state["dtypes"])
        self._looks, self._steps, self._progress = state["looks"], state["steps"], state["progress"]
        self._average = {name: a.clone() for name, a in state["average"].items()}
        self._losses = deque(tuple(entry) for entry in state["losses"])
        self._mean, self._weight = {n: g.clone() for n, g in state["mean"].items()}, state["weight"]


def _window(progress: float | None) -> float:
    left = 1.0 if progress is None else min(1.0, (1 - progress) / LAST)
    return LAST_WINDOW + (WINDOW - LAST_WINDOW) * left


def _line(progress: float | None) -> float:
    return OPEN_END if progress is None else 1 - (1 - MEMORISED) * math.sqrt(progress)
