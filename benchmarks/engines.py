"""Run search engines with default options on a table of trainings, with equal cost accounting.

An engine asks for a configuration and gets its validation loss at one of 27 checkpoints. It pays only for the
part of a training that is new, because a training continues from its last checkpoint. This favours the
engines, most of all SMAC, whose documented use trains again from the start.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lattice import CHECKPOINTS, L2, NOISE, table

Found = tuple[float, float, float]
"""(trainings paid for so far, validation loss of the best model, its test error)"""


class Spent(Exception):
    """The budget is spent."""


class Purse:
    """The cost and the best model of an engine: lowest validation loss at any checkpoint."""

    def __init__(self, task: str, budget: float) -> None:
        self.table, self.budget = table(task), budget * CHECKPOINTS
        self.paid, self.reached = 0, {}
        self.best, self.trace = (float("inf"), float("nan")), []

    def look(self, point: tuple[int, int], checkpoint: int) -> float:
        """Return the validation loss of a configuration after `checkpoint` of 27 parts; raises `Spent`."""
        for n in range(self.reached.get(point, 0) + 1, checkpoint + 1):
            if self.paid >= self.budget:
                raise Spent
            self.paid += 1
            self.reached[point] = n
            valid, test = self.table[point][n - 1]
            if valid < self.best[0]:
                self.best = float(valid), float(test)
            self.trace.append((self.paid / CHECKPOINTS, *self.best))
        return float(min(self.table[point][checkpoint - 1][0], 1e6))


def random(purse: Purse, seed: int) -> None:
    rng = np.random.default_rng(seed)
    while True:
        purse.look((int(rng.integers(len(L2))), int(rng.integers(len(NOISE)))), CHECKPOINTS)


def optuna(purse: Purse, seed: int, tpe: bool, hyperband: bool) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = optuna.samplers
    pruners = optuna.pruners
    study = optuna.create_study(
        sampler=samplers.TPESampler(seed=seed) if tpe else samplers.RandomSampler(seed=seed),
        pruner=pruners.HyperbandPruner(1, CHECKPOINTS, 3) if hyperband else pruners.NopPruner(),
    )
    while True:
        trial = study.ask()
        point = trial.suggest_int("l2", 0, len(L2) - 1), trial.suggest_int("noise", 0, len(NOISE) - 1)
        for n in range(1, CHECKPOINTS + 1):
            loss = purse.look(point, n)
            trial.report(loss, n)
            if hyperband and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, loss)


def smac(purse: Purse, seed: int) -> None:
    from ConfigSpace import ConfigurationSpace, Integer
    from smac import MultiFidelityFacade, Scenario
    from smac.main.exceptions import ConfigurationSpaceExhaustedException
    from smac.runhistory import TrialValue

    space = ConfigurationSpace(seed=seed)
    space.add(Integer("l2", (0, len(L2) - 1)), Integer("noise", (0, len(NOISE) - 1)))

    def in_turn(config, seed: int, budget: float) -> float:
        raise NotImplementedError  # ask and tell replaces it

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scenario = Scenario(space, deterministic=True, n_trials=10_000, min_budget=1, max_budget=CHECKPOINTS,
                            seed=seed, output_directory=Path(folder))  # fmt: skip
        engine = MultiFidelityFacade(scenario, in_turn, logging_level=False, overwrite=True)
        while True:
            try:
                info = engine.ask()
            except ConfigurationSpaceExhaustedException:
                raise Spent from None  # all configurations are known
            point = info.config["l2"], info.config["noise"]
            engine.tell(info, TrialValue(cost=purse.look(point, max(1, round(info.budget)))))


ENGINES: dict[str, Callable[[Purse, int], None]] = {
    "random": random,
    "TPE": lambda purse, seed: optuna(purse, seed, tpe=True, hyperband=False),
    "Hyperband": lambda purse, seed: optuna(purse, seed, tpe=False, hyperband=True),
    "TPE + Hyperband": lambda purse, seed: optuna(purse, seed, tpe=True, hyperband=True),
    "SMAC multi-fidelity": smac,
}


def search(engine: str, task: str, seed: int, budgets: list[int]) -> list[Found]:
    """Return the best model at each budget, in trainings; an engine that ends early keeps its best."""
    purse = Purse(task, max(budgets))
    with contextlib.suppress(Spent):
        ENGINES[engine](purse, seed)
    return [[found for found in purse.trace if found[0] <= budget][-1] for budget in budgets]
