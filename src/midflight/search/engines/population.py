"""Population-based training (Jaderberg et al. 2017): a bad trial becomes a copy of a good one.

Its searched `Float`s are perturbed by the rule and the defaults of Ray Tune. An `Int` or `Categorical` stays
as in the copied trial, because a network cannot change it during training.
"""

import math
import random

import torch

from midflight.search.engine import Task
from midflight.search.ledger import Record
from midflight.search.space import Config
from midflight.space import Float

QUANTILE, RESAMPLE, FACTORS = 0.25, 0.25, (1.2, 0.8)  # Ray's defaults
STEPS = 5  # moves in a training


class Population:
    """The decisions of population-based training."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.interval = max(1, task.epochs // STEPS)

    def explore(self, trial: Record, records: list[Record]) -> tuple[Record, Config] | None:
        """Return a good trial to copy and the perturbed configuration if `trial` is bad, else None."""
        peers = [r for r in records if r.epoch >= trial.epoch and math.isfinite(r.loss)]
        ranked = sorted((r for r in peers if r.state in ("unfinished", "complete")), key=lambda r: r.loss)
        most = min(math.ceil(len(ranked) * QUANTILE), len(ranked) // 2)
        donors = [r for r in ranked[:most] if r.epoch < self._task.epochs]
        if not donors or trial.number not in [r.number for r in ranked[len(ranked) - most :]]:
            return None
        draw = random.Random(f"{self._task.seed} {trial.number} {trial.epoch}")
        good = draw.choice(donors)
        return good, {name: self._moved(name, value, draw) for name, value in good.config.items()}

    def _moved(self, name: str, value: object, draw: random.Random) -> object:
        spec = self._task.space[name]
        if not isinstance(spec, Float):
            return value
        assert isinstance(value, float)
        if draw.random() < RESAMPLE:
            return float(spec.transform.value(torch.tensor(draw.random(), dtype=torch.float64)))
        return min(max(value * draw.choice(FACTORS), float(spec.low)), float(spec.high))
