"""Where the validation loss is judged, so that a one-step hypergradient serves the whole run.

    v = dC2/dtheta at   average + e (theta - average),   average = mean of the recent weights,
                                                         e = extrapolation

At e = 1, v is taken at the weights theta. There the fluctuation of the weights around their average raises
C2. At e > 1 it raises C2 more. More regularisation always reduces this part, even where it harms the trained
model.

At e = 0, v is taken at the average. The cost is gone there, but a hyper-step sees the present only. While
the network learns what generalises, less regularisation looks better, and memorising comes later.

C1 / C2, the training over the validation loss at the average, shows which of the two errs. The extrapolation
grows as this ratio falls below a threshold. The threshold falls with the square root of progress, from 1 to
MEMORISED.

The average moves slowly. So at e = 0, v is averaged over the last few hyper-steps, which saves data. The
hypergradients themselves must not be averaged: a sign step would follow their noise for many steps. Then 8 of
40 starts on mnist_55k ended 10 to 60 % worse (measured).

Near the end of a run the average covers fewer steps, because it may become the final model and must not lag
behind the weights.

All this is for hyperparameters that regularise. For options that set how a step is taken, v is taken between
the average and theta, nearer to theta the later in the run.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from midflight._tensors import Tensors, all_finite, detach, unalias
from midflight.errors import UnknownName
from midflight.tuner.saved import Saved

WINDOW = 0.1
"""The average covers this last share of the steps so far."""
LAST, LAST_WINDOW = 0.2, 0.03
"""Over the last LAST of a run, WINDOW shrinks to LAST_WINDOW."""
SAMPLES = 10
"""The number of times that the weights enter the average per window."""
SAMPLED = 5
"""The fewest optimiser steps between two entries."""
STEADY = 0.8
"""The decay of the mean of v per hyper-step, at extrapolation 0."""
RECENT = 0.15
"""C1 and C2 are averaged over this last share of the hyper-steps so far."""
MEMORISED = 0.35
"""A model counts as memorising if C1 / C2 is below this at the end of the run."""
OPEN_END = 0.5
"""The threshold on C1 / C2 if the length of the run is not known."""
UNKNOWN = 0.5
"""The share of the run that is taken to be over if its length is not known."""
GAIN = 10.0
"""Extrapolation per unit of C1 / C2 below the threshold."""
MOST = 3.0
"""The largest extrapolation; where a hypergradient is weak, 1 is not enough to reveal its sign."""

KEPT = {torch.float32: torch.float16}
"""The type in which the best weights are kept, to save memory. This changes the loss less than the choice of
the batch does."""


KEPT_MEAN = {torch.float32: torch.bfloat16}
"""The type in which the mean of v is kept. Gradients have a wider range than half precision."""


class Horizon(Saved):
    """Choose the weights at which the validation loss is judged.

    A subclass overrides what it needs. Without changes, a horizon judges as `NextStep` does.
    """

    needs_losses = False
    """Whether `observe` must get the losses at `average` at each hyper-step."""

    @property
    def at_average(self) -> bool:
        """Whether `valid_at` now returns the average."""
        return False

    @property
    def averaging(self) -> float:
        """How far a hyper-step averages signs of hypergradients: 1 as usual, 0 uses the last sign alone."""
        return 1.0

    def due(self, steps: int) -> bool:
        """Return whether `follow` has work to do after this many optimiser steps."""
        return False

    def follow(self, params: Mapping[str, Tensor], steps: int, progress: float | None) -> bool:
        """Take in the weights after this many optimiser steps; return whether there was work to do."""
        return False

    def valid_at(self, params: Tensors, at: Callable[[], Tensors]) -> Tensors:
        """Return the weights at which v is taken.

        Args:
            params: the weights before the optimiser step.
            at: computes the weights at which the estimator would take v.
        """
        return at()

    def ahead(self, params: Tensors) -> Tensors:
        """Return the weights at which v is taken for options that set how a step is taken, such as lr."""
        return params

    def drift(self, params: Tensors) -> Tensors:
        """Return the way from the average to the weights, name -> tensor."""
        return {}

    def smoothed(self, v: Tensors) -> Tensors:
        """Return the v to use, given v at the weights of `valid_at`, which is overwritten."""
        return v

    def average(self) -> Tensors:
        """Return the weights at which C1 and C2 are compared; they must not be changed."""
        return {}

    def observe(
        self,
        train_loss: float | None,
        valid_loss: float,
        progress: float | None,
        buffers: Mapping[str, Tensor],
    ) -> bool:
        """Take in C1 and C2 at the average; return whether it is the best so far."""
        return False

    def candidates(self) -> dict[str, Tensors]:
        """Return weights that the run could end with instead of its last ones, by name."""
        return {}

    def forget(self) -> None:
        """Restart what follows the weights, because the guard has restored earlier ones."""

    def log(self) -> dict[str, float]:
        """Return what a logger takes."""
        return {}


class NextStep(Horizon):
    """Judge each step by the validation loss right after it.

    This is exact for the next step and ignores the rest of the run. With many data and a short training, it
    regularises too much.
    """


class Averaged(Horizon):
    """Judge each step for the run: at the averaged weights, or extrapolated to the weights and beyond.

    Stores the average of the weights; in half precision, the best average and the mean of v.

    Attributes:
        extrapolation: in [0, MOST]; 0 judges at the average, 1 at the weights.
        best: the average and the buffers with the least validation loss so far; empty before the first.
        best_loss: that loss.
        recent_loss: the mean validation loss of the average over the recent hyper-steps.
    """

    SAVED = (
        "extrapolation", "best", "best_loss", "recent_loss", "_dtypes", "_count", "_steps", "_progress",
        "_average", "_losses", "_mean", "_weight",
    )  # fmt: skip

    needs_losses = True

    def __init__(self) -> None:
        self.extrapolation = 0.0
        self.best: Tensors = {}
        self.best_loss = math.inf
        self.recent_loss = math.nan
        self._count = 0
        self._steps = 0
        self._progress: float | None = None
        self._average: Tensors = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._losses: list[tuple[int, float, float]] = []
        self._mean: Tensors = {}
        self._weight = 0.0

    def due(self, steps: int) -> bool:
        """Return True at the first step, then SAMPLES times in a window, at most every SAMPLED-th step."""
        window = _window(self._progress) * steps
        return not self._average or steps >= self._steps + max(SAMPLED, window / SAMPLES)

    @torch.no_grad()
    def follow(self, params: Mapping[str, Tensor], steps: int, progress: float | None = None) -> bool:
        """Add the weights to the average if that is due.

        Args:
            params: the weights.
            steps: optimiser steps so far.
            progress: share of the run that is over, in [0, 1]; None if its length is not known.

        Returns:
            whether they were added.
        """
        if not self.due(steps):
            return False
        share = min(1.0, (steps - self._steps) / (_window(progress) * steps)) if steps else 1.0
        self._steps, self._progress = steps, progress
        # in half precision the small changes of an average would be rounded away
        now = {n: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for n, p in params.items()}
        self._dtypes = {name: p.dtype for name, p in params.items()}
        if any(name not in now or now[name].shape != a.shape for name, a in self._average.items()):
            self._average, self.best, self.best_loss = {}, {}, math.inf  # of other weights: pruned, grown
            self._mean, self._weight = {}, 0.0
        known = [name for name in now if name in self._average]
        if known:
            torch._foreach_lerp_(
                [self._average[name] for name in known], [now[name] for name in known], share
            )
        self._average |= {name: p.clone() for name, p in now.items() if name not in self._average}
        return True

    def average(self) -> Tensors:
        """Return the averaged weights, in the types of the weights; they must not be changed."""
        return {name: a.to(self._dtypes.get(name, a.dtype)) for name, a in self._average.items()}

    def forget(self) -> None:
        """Restart the average and the losses, because the guard has restored earlier weights.

        The extrapolation stays.
        """
        self._average, self._count = {}, 0
        self._losses.clear()
        self._mean, self._weight = {}, 0.0

    @torch.no_grad()
    def observe(
        self,
        train_loss: float | None,
        valid_loss: float,
        progress: float | None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> bool:
        """Set the extrapolation from C1 and C2 at the average, one batch each; keep the best average.

        Args:
            train_loss: C1; None if its ratio to C2 says nothing, because weights of losses change C1.
            valid_loss: C2.
            progress: share of the run that is over, in [0, 1]; None if its length is not known.
            buffers: of the model, stored with the best average.

        Returns:
            whether the average now is the best so far.
        """
        self._count += 1
        self._losses.append((self._count, valid_loss if train_loss is None else train_loss, valid_loss))
        while len(self._losses) > 1 and self._losses[0][0] <= (1 - RECENT) * self._count:
            del self._losses[0]
        c1, c2 = (sum(entry[i] for entry in self._losses) / len(self._losses) for i in (1, 2))
        self.recent_loss = c2
        if c2 > 0:
            self.extrapolation = min(MOST, max(0.0, GAIN * (_line(progress) - c1 / c2)))
        if best := c2 <= self.best_loss:
            self.best_loss = c2
            self._keep({**self.average(), **(buffers or {})})
        return best

    def keep(self, loss: float, params: Tensors, buffers: Tensors) -> None:
        """Store the initial weights, with their validation loss, as the best so far."""
        self.best_loss, self._dtypes = loss, {name: p.dtype for name, p in params.items()}
        self._keep({name: t.detach() for name, t in {**params, **buffers}.items()})

    def _keep(self, tensors: Tensors) -> None:
        """Store these as the best so far, weights in the types of KEPT."""
        for name, t in tensors.items():
            kept = self.best.get(name)
            if kept is None or kept.shape != t.shape:
                half = name in self._dtypes  # weights only; buffers take little memory
                self.best[name] = t.to(KEPT.get(t.dtype, t.dtype) if half else t.dtype, copy=True)
            else:
                kept.copy_(t)
        smaller = {n: t for n, t in tensors.items() if t.dtype != self.best[n].dtype}
        if not all_finite(self.best[name] for name in smaller):  # some are too large for half precision
            self.best |= {n: t.clone() for n, t in smaller.items() if not all_finite([self.best[n]])}

    @property
    def at_average(self) -> bool:
        """Whether v is taken at the average itself, which is so at extrapolation 0."""
        return self.extrapolation == 0

    @property
    def averaging(self) -> float:
        """1 - extrapolation, but at least 0."""
        return max(0.0, 1 - self.extrapolation)

    @torch.no_grad()
    def valid_at(self, params: Tensors, at: Callable[[], Tensors]) -> Tensors:
        """Return average + extrapolation (theta - average).

        theta are the weights before the step. With those after the step, runs end 8 % worse (measured),
        because the step follows the noise of the same gradient by which the hyperparameters are judged.
        """
        if self.extrapolation == 0:
            return self.average()
        return params | {
            name: self._average[name].lerp(p.to(self._average[name]), self.extrapolation).to(p)
            for name, p in self._known(params).items()
        }

    @torch.no_grad()
    def ahead(self, params: Tensors) -> Tensors:
        """Return average + p (theta - average), p the share of the run that is over.

        At the average, v shows whether the run moves in a good direction, and not the cost of its noise. At
        the weights, v shows both. Early in a run only the direction matters, at its end the noise does too.
        """
        return detach(params) | {
            name: self._average[name].lerp(p.to(self._average[name]), self._at_progress).to(p)
            for name, p in self._known(params).items()
        }

    def drift(self, params: Tensors) -> Tensors:
        """Return theta - average, name -> tensor.

        This is d theta / d log lr, as each recent step is proportional to lr. It leaves out that another lr
        would have changed the gradients.
        """
        return {name: p.detach() - self._average[name].to(p) for name, p in self._known(params).items()}

    @property
    def _at_progress(self) -> float:
        return UNKNOWN if self._progress is None else self._progress

    def _known(self, params: Tensors) -> Tensors:
        """Return those weights that have an average."""
        average = self._average
        return {n: p for n, p in params.items() if n in average and average[n].shape == p.shape}

    @torch.no_grad()
    def smoothed(self, v: Tensors) -> Tensors:
        """Average v with those of earlier hyper-steps, which count less the higher the extrapolation.

        Writes the mean into v's memory. The stored mean has the types of KEPT_MEAN.
        """
        v = unalias(v)
        self._weight = 1 + self._weight * STEADY * self.averaging
        share = 1 / self._weight
        for name, now in v.items():
            mean = self._mean.get(name)
            if mean is None or mean.shape != now.shape:
                self._mean[name] = now.to(KEPT_MEAN.get(now.dtype, now.dtype), copy=True)
            else:
                mean.copy_(now.mul_(share).add_(mean, alpha=1 - share))
        return v

    def candidates(self) -> dict[str, Tensors]:
        """Return the average now, and the average with the least validation loss so far."""
        if not self.best:
            return {}
        return {"average": self.average(), "earlier": self.earlier()}

    def earlier(self) -> Tensors:
        """Return the average with the least validation loss so far, and its buffers, in their own types."""
        return {name: t.to(self._dtypes.get(name, t.dtype)) for name, t in self.best.items()}

    def log(self) -> dict[str, float]:
        """Return the extrapolation now, and the losses of the average."""
        losses = {"recent_loss": self.recent_loss, "best_loss": self.best_loss} if self.best else {}
        return {"extrapolation": self.extrapolation, **losses}


def _window(progress: float | None) -> float:
    left = 1.0 if progress is None else min(1.0, (1 - progress) / LAST)
    return LAST_WINDOW + (WINDOW - LAST_WINDOW) * left


def _line(progress: float | None) -> float:
    return OPEN_END if progress is None else 1 - (1 - MEMORISED) * math.sqrt(progress)


def horizon_for(horizon: str | Horizon) -> Horizon:
    """Return the horizon for the argument `horizon` of `Tuner`.

    Raises:
        UnknownName: there is no horizon of this name.
        TypeError: it is an object of another class than `Horizon`.
    """
    known: dict[Any, Callable[[], Horizon]] = {"run": Averaged, "step": NextStep}
    if isinstance(horizon, Horizon):
        return horizon
    if hasattr(horizon, "valid_at"):
        raise TypeError(f"a horizon must be a subclass of {Horizon.__module__}.Horizon, but got {horizon!r}.")
    if not isinstance(horizon, str) or horizon not in known:
        raise UnknownName("horizon", horizon, known)
    return known[horizon]()
