"""Choose an ensemble by greedy selection with replacement (Caruana et al. 2004)."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from midflight.automl.validation import Array, Loss, Parts

ROUNDING = 1e-6
"""Relative gain that counts as an improvement; smaller ones may be rounding errors."""


def greedy(predictions: Sequence[Array], parts: Parts, loss: Loss, size: int) -> list[int]:
    """Add the candidate that lowers the loss of the mean prediction most, until none lowers it.

    Args:
        predictions: predictions of each candidate, shape (rows, ...).
        size: maximal number of members, repetitions included.

    Returns:
        Indices of candidates in the order chosen; at least one.
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
    """Whether ensembles beat single models in cross-validation: choose on all parts but one, test on that."""
    gains = []
    for k, part in enumerate(parts):
        others = [p for i, p in enumerate(parts) if i != k]
        single, ensemble = (
            np.mean([predictions[i] for i in greedy(predictions, others, loss, n)], axis=0) for n in (1, size)
        )
        gains.append(mean_loss(single, [part], loss) - mean_loss(ensemble, [part], loss))
    return fmean(gains) > 0


def mean_loss(predictions: Array, parts: Parts, loss: Loss) -> float:
    """Return the mean loss over the parts."""
    return fmean(loss(predictions[rows], target) for rows, target in parts)
