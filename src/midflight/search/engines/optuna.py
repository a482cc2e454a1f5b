"""Build Optuna's samplers and pruners with their default options."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from midflight.search.engine import Engine, Task

REDUCTION = 3  # the default of Optuna's HyperbandPruner, of SMAC3 and of the Hyperband paper


class SeededSampler(RandomSampler):
    """Draw each hyperparameter on its own, from a sampler with a seed of its own.

    Random numbers depend on the search's seed, the trial's number and the name only. So a restart, a second
    process and a killed one draw what an undisturbed search draws, and never the same for two trials.
    """

    def __init__(self, seed: int, make: Callable[..., BaseSampler]) -> None:
        super().__init__(seed)
        self._seed, self._make = seed, make

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        source = np.random.SeedSequence([self._seed, trial.number, *param_name.encode()])
        sampler = self._make(seed=int(source.generate_state(1)[0]))
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def random(task: Task) -> Engine:
    """Random search; every trial is trained to the end."""
    return Engine(SeededSampler(task.seed, RandomSampler))


def tpe(task: Task) -> Engine:
    """The tree-structured Parzen estimator (Bergstra et al. 2011); every trial is trained to the end."""
    return Engine(SeededSampler(task.seed, TPESampler))


def bohb(task: Task) -> Engine:
    """TPE with Hyperband, as in BOHB (Falkner et al. 2018); a trial continues until it is pruned."""
    pruner = optuna.pruners.HyperbandPruner(
        min_resource=1, max_resource=task.epochs, reduction_factor=REDUCTION
    )
    return Engine(tpe(task).sampler, pruner)
