"""SMAC3: a random forest proposes, Hyperband promotes; a promoted configuration continues its checkpoint.

SMAC's ask-and-tell interface runs in this process. A sampler turns its proposal into a trial of the Optuna
study, and a pruner ends the trial at SMAC's budget. Before each proposal, SMAC learns of all finished trials
that are new to it; after a restart, these include the trials of earlier processes.
"""

import math
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ConfigSpace
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial
from smac import HyperparameterOptimizationFacade, MultiFidelityFacade, Scenario
from smac.main.exceptions import ConfigurationSpaceExhaustedException
from smac.runhistory import StatusType, TrialInfo, TrialValue

from midflight.search.engine import Engine, Task
from midflight.search.space import Config, Space, Spec, conditions
from midflight.space import Categorical, Int

UNTIL = "smac:until"
"""System attribute of a trial: the epoch at which it ends, SMAC's budget."""
UNLIMITED = 10_000  # number of trials given to SMAC if only time limits the search


def smac(task: Task) -> Engine:
    """SMAC3's multi-fidelity facade with default options; for a single epoch, its random-forest facade."""
    sampler = SmacSampler(task)
    return Engine(sampler, UntilPruner(), promotes=True, prepare=sampler.prepare)


class SmacSampler(RandomSampler):
    """Give SMAC's proposals to Optuna; draw nothing itself."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.seed)
        self._space, self._epochs = task.space, task.epochs
        self._configs = configuration_space(task.space, task.seed)
        self._facade = _facade(self._configs, task)
        self._proposal: tuple[TrialInfo, Config] | None = None
        self._asked: dict[int, tuple[TrialInfo, Config]] = {}
        self._told: set[int] = set()

    def prepare(self, study: Study) -> bool:
        """Tell SMAC the new results and ask for a proposal; False if all configurations are known.

        A proposal that another process already runs is left to it, because SMAC's first ones depend on the
        seed only.
        """
        trials = study.get_trials(deepcopy=False)
        self._tell(trials)
        begun = [(t.params, t.system_attrs.get(UNTIL)) for t in trials]
        for _ in range(len(trials) + 1):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # inside SMAC and scikit-learn; users cannot act on them
                    info = self._facade.ask()
            except (ConfigurationSpaceExhaustedException, StopIteration):
                return False
            self._proposal = info, to_config(self._space, info.config)
            if (self._proposal[1], self._until(info)) not in begun:
                break
        return True

    def _until(self, info: TrialInfo) -> int:
        return self._epochs if info.budget is None else min(self._epochs, max(1, round(info.budget)))

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        if UNTIL in trial.system_attrs or "fixed_params" in trial.system_attrs:
            return  # an interrupted trial of another process, or a trial in `first`
        if self._proposal is None:
            self.prepare(study)
        assert self._proposal is not None
        self._asked[trial.number] = self._proposal
        info, self._proposal = self._proposal[0], None
        study._storage.set_trial_system_attr(trial._trial_id, UNTIL, self._until(info))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._asked[trial.number][1][param_name]

    def _tell(self, trials: Iterable[FrozenTrial]) -> None:
        finished = [t for t in trials if t.state.is_finished() and t.params]
        losses = {t.number: t.value for t in finished if t.value is not None and math.isfinite(t.value)}
        worst = max(losses.values(), default=1.0)
        for trial in finished:
            if trial.number in self._told:
                continue
            self._told.add(trial.number)
            # a forest cannot learn from infinity, so a failure gets the worst finite loss
            cost = losses.get(trial.number, worst)
            status = StatusType.SUCCESS if trial.number in losses else StatusType.CRASHED
            self._facade.tell(self._info(trial), TrialValue(cost=cost, status=status), save=False)

    def _info(self, trial: FrozenTrial) -> TrialInfo:
        if trial.number in self._asked:
            return self._asked.pop(trial.number)[0]
        budget = None if self._epochs == 1 else float(trial.system_attrs.get(UNTIL, trial.last_step or 1))
        return TrialInfo(from_config(self._space, self._configs, trial.params), seed=0, budget=budget)


class UntilPruner(BasePruner):
    """Ends a trial at SMAC's budget."""

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        until = trial.system_attrs.get(UNTIL)
        return until is not None and trial.last_step is not None and trial.last_step >= until


def configuration_space(space: Space, seed: int) -> ConfigSpace.ConfigurationSpace:
    """Convert the searched part of a space to ConfigSpace; a category becomes its index."""
    found = ConfigSpace.ConfigurationSpace(seed=seed)
    made = {name: _hyperparameter(name, spec) for name, spec in space.searched.items()}
    found.add(*made.values())
    for name, spec in space.searched.items():
        terms = [
            ConfigSpace.InCondition(
                made[name], made[parent], [_to_configspace(space[parent], v) for v in values]
            )
            for parent, values in conditions(spec).items()
        ]
        if terms:
            found.add(terms[0] if len(terms) == 1 else ConfigSpace.AndConjunction(*terms))
    return found


def to_config(space: Space, configuration: ConfigSpace.Configuration) -> Config:
    """Convert a ConfigSpace configuration; keep the active hyperparameters only."""
    return {
        name: _from_configspace(spec, configuration[name])
        for name, spec in space.searched.items()
        if name in configuration
    }


def from_config(
    space: Space, configs: ConfigSpace.ConfigurationSpace, config: Config
) -> ConfigSpace.Configuration:
    """Invert `to_config`."""
    return ConfigSpace.Configuration(
        configs, values={name: _to_configspace(space[name], value) for name, value in config.items()}
    )


def _hyperparameter(name: str, spec: Spec) -> Any:
    if isinstance(spec, Categorical):
        return ConfigSpace.CategoricalHyperparameter(name, list(range(len(spec.choices))))
    if isinstance(spec, Int):
        return ConfigSpace.UniformIntegerHyperparameter(name, spec.low, spec.high, log=spec.log)
    return ConfigSpace.UniformFloatHyperparameter(name, spec.low, spec.high, log=spec.log)


def _to_configspace(spec: Spec, value: Any) -> Any:
    return spec.choices.index(value) if isinstance(spec, Categorical) else value


def _from_configspace(spec: Spec, value: Any) -> Any:
    if isinstance(spec, Categorical):
        return spec.choices[int(value)]
    if isinstance(spec, Int):
        return int(value)
    return min(max(float(value), spec.low), spec.high)  # exp and log may round past a bound


def _facade(configs: ConfigSpace.ConfigurationSpace, task: Task) -> Any:
    folder = Path(tempfile.mkdtemp())
    trials = task.trials or UNLIMITED
    budgets: dict[str, Any] = {"min_budget": 1, "max_budget": task.epochs} if task.epochs > 1 else {}
    scenario = Scenario(
        configs, deterministic=True, n_trials=trials, seed=task.seed, output_directory=folder, **budgets
    )
    kind = MultiFidelityFacade if task.epochs > 1 else HyperparameterOptimizationFacade
    facade = kind(
        scenario, _never_called if budgets else lambda config, seed: 0.0, logging_level=False, overwrite=True
    )
    weakref.finalize(facade, shutil.rmtree, folder, ignore_errors=True)
    return facade


def _never_called(config: ConfigSpace.Configuration, seed: int, budget: float) -> float:
    raise AssertionError("SMAC runs by ask and tell, so it must never call the objective.")
