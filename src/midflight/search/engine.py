"""Define what a search gives to an engine, and what an engine gives to the search."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study

from midflight.search.space import Space
from midflight.search.trial import Objective


@dataclass(frozen=True)
class Task:
    """The search that an engine is built for; `trials` is None if only time limits it."""

    space: Space
    epochs: int
    trials: int | None
    seed: int


@dataclass(frozen=True)
class Engine:
    """A search engine.

    Attributes:
        sampler: proposes configurations.
        pruner: ends trials early.
        promotes: whether it may propose a configuration again, for a longer training.
        name: key in `ENGINES`.
        prepare: called before each proposal; returns False if nothing is left to propose.
        drive: runs the trials itself, given (`Search`, objective, number of parallel trials); None: the
            search's own processes run them.
    """

    sampler: BaseSampler
    pruner: BasePruner
    promotes: bool = False
    name: str = ""
    prepare: Callable[[Study], bool] = lambda study: True
    drive: Callable[[Any, Objective, int], None] | None = None
