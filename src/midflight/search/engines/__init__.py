"""The search engines, each an Optuna sampler and pruner.

Every engine proposes trials through `study.ask` and ends them through `trial.should_prune`, so one Optuna
study holds them all. A new engine is one file and one row in `ENGINES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

from midflight.errors import UnknownName, require_extra
from midflight.search.errors import SearchError
from midflight.search.space import Space

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study

    from midflight.search.search import Search
    from midflight.search.trial import Objective

ENGINES = {
    "random": "optuna:random",
    "tpe": "optuna:tpe",
    "bohb": "optuna:bohb",
    "smac": "smac:smac",
    "ray": "ray:ray",
}
"""Name -> module:function in this package; the function maps a `Task` to an `Engine`."""


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
        drive: runs the trials itself, given (search, objective, number of parallel trials); None: the
            search's own processes run them.
    """

    sampler: "BaseSampler"
    pruner: "BasePruner"
    promotes: bool = False
    name: str = ""
    prepare: Callable[["Study"], bool] = lambda study: True
    drive: Callable[["Search", "Objective", int], None] | None = None


def build(name: str, task: Task, options: Mapping[str, Any]) -> Engine:
    """Build the engine `name` with its options.

    Raises:
        UnknownName: no engine has this name.
        SearchError: an option is unknown or invalid.
        MissingExtra: a package of the engine is not installed.
    """
    if name not in ENGINES:
        raise UnknownName("engine", name, ENGINES)
    module, function = ENGINES[name].split(":")
    require_extra("optuna", "search")
    require_extra(module, "ray" if module == "ray" else "search")
    make: Any = getattr(import_module(f"{__name__}.{module}"), function)
    known = list(signature(make).parameters)[1:]
    for option in options:
        if option not in known:
            raise SearchError(
                f"the options of the engine {name} are {', '.join(known) or 'none'}, but got {option}=."
            )
    return replace(cast(Engine, make(task, **options)), name=name)
