"""Tune the hyperparameters while the model trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from midflight import errors, nn
from midflight.example_weights import ExampleWeights
from midflight.hypergrad import hypergradient
from midflight.mixture import Mixture
from midflight.space import Categorical, Float, Hyperparameter, Int, Space, default_range
from midflight.tuner import (
    Averaged,
    Every,
    FrontLoaded,
    LiveLine,
    NextStep,
    Population,
    Replay,
    SignSteps,
    TimeBudget,
    Trajectory,
    Tuner,
    param_groups,
    stacked,
)

if TYPE_CHECKING:
    from midflight.automl import AutoClassifier as AutoClassifier
    from midflight.automl import AutoRegressor as AutoRegressor
    from midflight.automl import OnlineMLPClassifier as OnlineMLPClassifier
    from midflight.automl import OnlineMLPRegressor as OnlineMLPRegressor
    from midflight.gradcheck import CheckReport as CheckReport
    from midflight.gradcheck import check as check

__version__ = "0.2.0"

__all__ = [
    "Averaged",
    "Categorical",
    "CheckReport",
    "Every",
    "ExampleWeights",
    "Float",
    "FrontLoaded",
    "Hyperparameter",
    "Int",
    "LiveLine",
    "Mixture",
    "NextStep",
    "Population",
    "Replay",
    "SignSteps",
    "Space",
    "TimeBudget",
    "Trajectory",
    "Tuner",
    "check",
    "default_range",
    "errors",
    "hypergradient",
    "nn",
    "param_groups",
    "stacked",
]

_LAZY = {
    **dict.fromkeys(
        ("AutoClassifier", "AutoRegressor", "OnlineMLPClassifier", "OnlineMLPRegressor"), "midflight.automl"
    ),
    **dict.fromkeys(("CheckReport", "check"), "midflight.gradcheck"),
}
"""name -> its module, which is imported when the name is first used."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _LAZY[name] == "midflight.automl":
        errors.require_extra("sklearn", "automl")
        errors.require_extra("optuna", "automl")
    return getattr(import_module(_LAZY[name]), name)
