"""Judge a learning rate by how far steps move the weights, relative to the weights.

If the learning rate is too high, the validation loss falls at first, and the final model is worse. So no
hyper-step lengthens steps that are fast already. Steps that are very slow it lengthens further than others.
The limits were read off the best fixed learning rates of five tasks (`benchmarks/movement.py`).

If the first steps change the weights by more than their initial size, the run begins again with a lower lr.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from midflight._tensors import Tensors, all_finite, write
from midflight.tuner.horizon import KEPT
from midflight.tuner.saved import Saved
from midflight.tuner.sharded import WHOLE, Parts

MOVED = {16: 1.2, 64: 3.0}
"""Optimiser steps -> the largest relative change of the weights over these first steps."""
AIM, LEAST = 0.5, 0.01
"""A run that begins again aims at this relative change. The factor on lr is at least LEAST."""
MOST_RESTARTS = 2
"""How often a run may begin again for this reason."""
FAST, FAST_AT_FIRST = 0.0035, 1.0
"""A step is fast if it changes the weights by more than FAST, and by more than FAST_AT_FIRST over the number
of the step."""
SLOW, FURTHER = 0.05, 4.0
"""A step is slow if it changes the weights by less than SLOW of a fast one. Then lr and momentum rise further
at a hyper-step, in proportion, up to FURTHER times as far. Otherwise a run whose lr starts at a hundredth of
a good one needs a third of its steps to come near it."""
ENTRIES = 2**16
"""The most entries of a weight matrix that are compared."""


class Beginning(Saved):
    """Keeps the initial weights during the first steps of a run, and judges how far they have moved.

    Weights are kept in half precision, buffers whole. All are dropped after the last of the steps in MOVED.

    Args:
        params, buffers: return the weights and the model's buffers, name -> live tensor.
        parts: sums over the processes, if the weights are sharded.

    Attributes:
        steps: optimiser steps since the beginning, or since the guard has restored weights.
        raws: the raw coordinates of the space at the beginning.
    """

    SAVED = ("steps", "_restarts", "_kept", "raws")

    def __init__(
        self, params: Callable[[], Tensors], buffers: Callable[[], Tensors], parts: Parts = WHOLE
    ) -> None:
        self._params, self._buffers, self._parts = params, buffers, parts
        self.steps, self._restarts = 0, 0
        self._kept: Tensors = {}
        self.raws: Tensors = {}

    def keep(self, raws: Tensors) -> None:
        """Keep the weights and buffers of now, and these raw coordinates, as the initial ones."""
        params = {name: p.detach() for name, p in self._params().items()}
        self._kept = {name: p.to(KEPT.get(p.dtype, p.dtype), copy=True) for name, p in params.items()}
        if not all_finite(self._kept.values()):  # some are too large for half precision
            self._kept = {name: p.clone() for name, p in params.items()}
        self._kept |= {name: b.clone() for name, b in self._buffers().items()}
        self.raws = raws

    def count_step(self) -> None:
        """Count an optimiser step."""
        self.steps += bool(self._kept)
        if self.steps > max(MOVED):
            self._kept = {}

    def count_anew(self) -> None:
        """Count from the first step again, because the guard has restored weights."""
        self.steps = 0

    def end(self) -> None:
        """Drop the initial weights; the run begins again no more."""
        self._kept = {}

    @property
    def due(self) -> bool:
        """Whether the weights are judged before the coming step."""
        return bool(self._kept) and self.steps in MOVED and self._restarts < MOST_RESTARTS

    @torch.no_grad()
    def slower(self) -> float | None:
        """Return the factor on lr with which to begin again, if the weights have changed too much."""
        if not self.due:
            return None
        change = relative_change(_samples(self._kept), _samples(self._params()), self._parts)
        return max(LEAST, AIM / change) if change > MOVED[self.steps] else None

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model its initial weights and buffers."""
        self._restarts += 1
        for name, value in {**self._params(), **self._buffers()}.items():
            if name in self._kept:
                write(self._kept[name], value)


class Speed:
    """Measures how far a step moves the weights, relative to the weights.

    Args:
        parts: sums over the processes, if the weights are sharded.
    """

    def __init__(self, parts: Parts = WHOLE) -> None:
        self._before: Tensors = {}
        self._parts = parts

    def begin(self, params: Tensors) -> None:
        """Note the weights before a step, ENTRIES of each matrix."""
        self._before = {name: sample.clone() for name, sample in _samples(params).items()}

    def pace(self, params: Tensors, steps: int, factor: float = 1.0) -> float:
        """Return how many times as far as usual lr and momentum may rise, by the step since `begin`.

        It is 0 if that step was fast, and else in [1, FURTHER].

        Args:
            params: the weights after that step.
            steps: its number.
            factor: of the loop's schedule on lr in this step. A step that is short because of the schedule
                is not slow.
        """
        before, self._before = self._before, {}
        change = relative_change(before, _samples(params), self._parts)
        fast = max(FAST, FAST_AT_FIRST / max(1, steps))
        if change > fast:
            return 0.0
        return min(FURTHER, max(1.0, SLOW * fast * factor / change)) if change else 1.0


def _samples(params: Tensors) -> Tensors:
    """Return up to ENTRIES entries of each matrix, at equal distances, name -> vector."""
    return {n: _sample(p.detach()) for n, p in params.items() if p.dim() > 1 and p.is_floating_point()}


def _sample(matrix: Tensor) -> Tensor:
    flat = matrix.flatten()
    return flat[:: max(1, -(-flat.numel() // ENTRIES))]


def relative_change(before: Tensors, after: Tensors, parts: Parts = WHOLE) -> float:
    """Return the median, over matrices with a norm above 0, of |after - before| / |before|."""
    names = [n for n, then in before.items() if n in after and after[n].shape == then.shape]
    if not names:
        return 0.0
    then = [before[n].to(after[n]) for n in names]
    changes = torch._foreach_norm(torch._foreach_sub([after[n] for n in names], then))
    both = [
        torch.stack([t.float().to(changes[0].device) for t in norms])
        for norms in (changes, torch._foreach_norm(then))
    ]
    numbers = parts.norms(torch.cat(both).tolist())  # the one synchronisation with a GPU
    found = [change / norm for change, norm in zip(numbers, numbers[len(names) :], strict=False) if norm > 0]
    return sorted(found)[(len(found) - 1) // 2] if found else 0.0
