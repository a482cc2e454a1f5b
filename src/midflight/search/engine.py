"""Define what a search gives to an engine, and what an engine gives to the search."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.study import Study

from midflight.search.ledger import Record
from midflight.search.space import Config, Space


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
        pruner: ends trials early; default: none is.
        promotes: whether it may propose a configuration again, for a longer training.
        name: key in `ENGINES`.
        prepare: called before each proposal; returns False if nothing is left to propose.
        hire: opens the place where trials run, given the number of parallel trials, and yields its kind of
            worker; None: processes of this machine.
        explore: returns a trial to copy and a new configuration for a trial, given its record and all
            records; or None. Called every `interval` epochs.
    """

    sampler: BaseSampler
    pruner: BasePruner = field(default_factory=NopPruner)
    promotes: bool = False
    name: str = ""
    prepare: Callable[[Study], bool] = lambda study: True
    hire: Callable[[int], AbstractContextManager[Any]] | None = None
    explore: Callable[[Record, list[Record]], tuple[Record, Config] | None] | None = None
    interval: int = 0
