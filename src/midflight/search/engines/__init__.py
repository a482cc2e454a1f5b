"""The search engines, each an Optuna sampler and pruner.

Every engine proposes trials through `study.ask` and ends them through `trial.should_prune`, so one Optuna
study holds them all. A new engine is one file and one row in `ENGINES`.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from inspect import signature
from typing import Any, cast

from midflight.errors import UnknownName, require_extra
from midflight.search.engine import Engine, Task
from midflight.search.errors import SearchError

ENGINES = {
    "random": "optuna:random",
    "tpe": "optuna:tpe",
    "bohb": "optuna:bohb",
    "smac": "smac:smac",
    "ray": "ray:ray",
}
"""Name -> module:function in this package; the function maps a `Task` to an `Engine`."""


def build(name: str, task: Task, options: Mapping[str, Any]) -> Engine:
    """Build the engine `name` with its options.

    Raises:
        UnknownName: no engine has this name.
        SearchError: an option is unknown or invalid.
        MissingExtra: a package of the engine is not installed.
    """
    if not isinstance(name, str) or name not in ENGINES:
        raise UnknownName("engine", name, ENGINES)
    module, function = ENGINES[name].split(":")
    require_extra(module, "ray" if module == "ray" else "search")
    make: Any = getattr(import_module(f"{__name__}.{module}"), function)
    known = list(signature(make).parameters)[1:]
    for option in options:
        if option not in known:
            raise SearchError(
                f"the options of the engine {name} are {', '.join(known) or 'none'}, but got {option}=."
            )
    return replace(cast(Engine, make(task, **options)), name=name)
