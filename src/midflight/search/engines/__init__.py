"""The search engines that exist, and what the search needs of each: an Optuna sampler and a pruner.

Every engine proposes through `study.ask` and ends trials through `trial.should_prune`, so that all trials of
all engines stand in one Optuna study. A new engine is one file and one row in `ENGINES`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from midflight.errors import MissingExtra, UnknownName
from midflight.search.space import Space

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study

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
    """

    sampler: "BaseSampler"
    pruner: "BasePruner"
    promotes: bool = False
    name: str = ""
    prepare: Callable[["Study"], bool] = lambda study: True


def build(name: str, task: Task) -> Engine:
    """The engine of this name.

    Raises:
        UnknownName: there is none.
        MissingExtra: what it stands on is not installed.
    """
    if name not in ENGINES:
        raise UnknownName("engine", name, ENGINES)
    module, function = ENGINES[name].split(":")
    need("optuna", "search")
    need(module, "ray" if module == "ray" else "search")
    make: Any = getattr(import_module(f"{__name__}.{module}"), function)
    return replace(cast(Engine, make(task)), name=name)


def need(module: str, extra: str) -> None:
    """Raise `MissingExtra` if `module` is not installed."""
    if find_spec(module) is None:
        raise MissingExtra(
            f"{module} is needed for this, but is not installed; pip install 'midflight[{extra}]'"
        )
