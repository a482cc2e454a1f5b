"""A few good models together: greedy selection with replacement (Caruana et al. 2004)."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from midflight.automl.judge import Judge, Row
from midflight.automl.validation import Array, Loss, Parts

ROUNDING = 1e-6
"""Relative gains below this are none."""


def together(judge: Judge, size: int) -> list[Row]:
    """The members, the best configuration first, each as often as it counts; it alone if none helps."""
    assert judge.best is not None
    leaders, predictions = judge.leaders(), [row.predictions for row in judge.leaders()]
    found = [p for p in predictions if p is not None]
    parts, loss = judge.problem.parts, judge.problem.loss
    if size == 1 or len(found) == 1 or not helps(found, parts, loss, size):
        return [judge.best]
    return [leaders[i] for i in greedy(found, parts, loss, size)]


def greedy(predictions: Sequence[Array], parts: Parts, loss: Loss, size: int) -> list[int]:
    """Members one after the other, each time the one that lowers the loss of the mean most, while one does.

    Args:
        predictions: of each candidate, shape (rows, ...).
        size: members at most, repetitions included.

    Returns:
        indices of candidates, in the order chosen; at least one.
    """
    chosen: list[int] = []
    total: Any = 0.0
    best = np.inf
    while len(chosen) < size:
        losses = [mean_loss((total + p) / (len(chosen) + 1), parts, loss) for p in predictions]
        n = int(np.argmin(losses))
        if chosen and not losses[n] < best - ROUNDING * abs(best):
            break
        chosen, total, best = [*chosen, n], total + predictions[n], losses[n]
    return chosen


def helps(predictions: Sequence[Array], parts: Parts, loss: Loss, size: int) -> bool:
    """Whether members chosen on all parts but one are better on that one than the model chosen alone."""
    gains = []
    for k, part in enumerate(parts):
        others = [p for i, p in enumerate(parts) if i != k]
        alone, joint = (
            np.mean([predictions[i] for i in greedy(predictions, others, loss, n)], axis=0) for n in (1, size)
        )
        gains.append(mean_loss(alone, [part], loss) - mean_loss(joint, [part], loss))
    return fmean(gains) > 0


def mean_loss(predictions: Array, parts: Parts, loss: Loss) -> float:
    """Over the parts."""
    return fmean(loss(predictions[places], target) for places, target in parts)
