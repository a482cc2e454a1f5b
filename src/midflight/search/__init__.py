"""Search what has no gradient, and tune the rest while each trial trains.

An engine that already exists (Optuna, SMAC3, Ray Tune) chooses layers, widths, activations, optimisers;
what is declared `Float(..., online=True)` is not searched, but tuned by `midflight.Tuner` inside each trial.
"""

from typing import TYPE_CHECKING, Any

from midflight.search.errors import Interrupted, ObjectiveFailed, SearchError, StorageLost
from midflight.search.space import Space
from midflight.search.trial import Objective, Stop, Trial

if TYPE_CHECKING:
    from midflight.search.ledger import Record
    from midflight.search.search import Result, run

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
    """`run`, `Result` and `Record` need Optuna, and are imported when they are first used."""
    if name not in ("run", "Result", "Record"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from midflight.errors import require_extra

    require_extra("optuna", "search")
    from midflight.search import ledger
    from midflight.search import search as module

    return ledger.Record if name == "Record" else getattr(module, name)
