"""Optuna's samplers and pruners with their default options, and `suggest`, which samples a space."""

import warnings

import optuna

from midflight.search.engines import Engine, Task
from midflight.search.space import Config, Space
from midflight.space import Categorical, Int

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


def suggest(trial: optuna.Trial, space: Space) -> Config:
    """Let the engine choose the active hyperparameters of a configuration, parents first.

    A `Float` with a logit scale is searched on a linear scale, because Optuna has no logit scale.
    """
    config: Config = {}
    for name, spec in space.searched.items():
        if not space.is_active(name, config):
            continue
        if isinstance(spec, Categorical):
            config[name] = trial.suggest_categorical(name, spec.choices)
        elif isinstance(spec, Int):
            config[name] = trial.suggest_int(name, spec.low, spec.high, log=spec.log)
        else:
            config[name] = trial.suggest_float(name, spec.low, spec.high, log=spec.log)
    return config
