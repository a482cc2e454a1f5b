"""Build Optuna's samplers and pruners with their default options."""

import warnings

import optuna

from midflight.search.engine import Engine, Task

REDUCTION = 3  # the default of Optuna's HyperbandPruner, of SMAC3 and of the Hyperband paper


def random(task: Task) -> Engine:
    """Random search; every trial is trained to the end."""
    return Engine(optuna.samplers.RandomSampler(seed=task.seed), optuna.pruners.NopPruner())


def tpe(task: Task) -> Engine:
    """The tree-structured Parzen estimator (Bergstra et al. 2011); every trial is trained to the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # for constant_liar
        sampler = optuna.samplers.TPESampler(seed=task.seed, constant_liar=True)
    return Engine(sampler, optuna.pruners.NopPruner())


def bohb(task: Task) -> Engine:
    """TPE with Hyperband, as in BOHB (Falkner et al. 2018); a trial continues until it is pruned."""
    pruner = optuna.pruners.HyperbandPruner(
        min_resource=1, max_resource=task.epochs, reduction_factor=REDUCTION
    )
    return Engine(tpe(task).sampler, pruner)
