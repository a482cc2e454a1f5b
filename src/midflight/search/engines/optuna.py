"""Optuna's own samplers and pruners at their documented defaults, and the translation of a space for them."""

import warnings

import optuna

from midflight.search.engines import Engine, Task
from midflight.search.space import Config, Space
from midflight.space import Categorical, Int

REDUCTION = 3  # the default of Optuna's HyperbandPruner, of SMAC3 and of the Hyperband paper


def random(task: Task) -> Engine:
    """Configurations at random, each trained to the end."""
    return Engine(optuna.samplers.RandomSampler(seed=task.seed), optuna.pruners.NopPruner())


def tpe(task: Task) -> Engine:
    """The tree-structured Parzen estimator (Bergstra et al. 2011), each trial trained to the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # constant_liar, before 5.0
        sampler = optuna.samplers.TPESampler(seed=task.seed, constant_liar=True)
    return Engine(sampler, optuna.pruners.NopPruner())


def bohb(task: Task) -> Engine:
    """TPE with Hyperband, the pair of BOHB (Falkner et al. 2018); a trial that is not pruned just goes on."""
    pruner = optuna.pruners.HyperbandPruner(
        min_resource=1, max_resource=task.epochs, reduction_factor=REDUCTION
    )
    return Engine(tpe(task).sampler, pruner)


def suggest(trial: optuna.Trial, space: Space) -> Config:
    """Have the engine choose a configuration, each condition decided by the values before it.

    A `Float` on a logit scale is searched on a linear one, which Optuna has.
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
