"""Search hyperparameters that have no gradient, and tune the others during each trial.

An existing engine (Optuna, SMAC3, Ray Tune) searches layers, widths, activations and optimisers.
`midflight.Tuner` tunes every `Float(..., online=True)` during each trial.
"""

from typing import TYPE_CHECKING, Any

from midflight.search.errors import Interrupted, ObjectiveFailed, SearchError, StorageLost
from midflight.search.space import Space
from midflight.search.trial import Objective, Stop, Trial

if TYPE_CHECKING:
    from midflight.search.jobs import Result
    from midflight.search.ledger import Record
    from midflight.search.search import run

__all__ = [
    "Interrupted",
    "Objective",
    "ObjectiveFailed",
    "Record",
    "Result",
    "SearchError",
    "Space",
    "Stop",
    "StorageLost",
    "Trial",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import `run`, `Result` and `Record` on first use, because they need Optuna."""
    if name not in ("run", "Result", "Record"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from midflight.errors import require_extra

    require_extra("optuna", "search")
    from midflight.search import jobs, ledger, search

    return {"run": search.run, "Result": jobs.Result, "Record": ledger.Record}[name]
