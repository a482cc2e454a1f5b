"""The search engines that exist, and what the search needs of each: an Optuna sampler and a pruner.

Every engine proposes through `study.ask` and ends trials through `trial.should_prune`, so that all trials of
all engines stand in one Optuna study. A new engine is one file and one row in `ENGINES`.
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
"""Name -> module:function of this package; the function is (`Task`) -> `Engine`."""


@dataclass(frozen=True)
class Task:
    """What an engine is built for; `trials` is None if only time limits the search."""

    space: Space
    epochs: int
    trials: int | None
    seed: int


@dataclass(frozen=True)
class Engine:
    """How configurations are proposed, and trials ended early.

    Attributes:
        promotes: whether it may propose a configuration again, to be trained for longer.
        name: in `ENGINES`.
        prepare: called before each proposal; False if there is nothing to propose any more.
        drive: runs the trials elsewhere, in place of the search's own processes: (search, objective,
            how many at once) -> None.
    """

    sampler: "BaseSampler"
    pruner: "BasePruner"
    promotes: bool = False
    name: str = ""
    prepare: Callable[["Study"], bool] = lambda study: True
    drive: Callable[["Search", "Objective", int], None] | None = None


def build(name: str, task: Task, options: Mapping[str, Any]) -> Engine:
    """The engine of this name, with options of its own.

    Raises:
        UnknownName: there is none.
        SearchError: it has no such option, or cannot be what the options say.
        MissingExtra: what it stands on is not installed.
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
                f"{option}= is no option of the engine {name}; it has {', '.join(known) or 'none'}."
            )
    return replace(cast(Engine, make(task, **options)), name=name)
