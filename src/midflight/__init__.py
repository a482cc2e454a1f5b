"""Tune the hyperparameters while the model trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from midflight import errors, nn
from midflight.gradcheck import CheckReport, check
from midflight.hypergrad import hypergradient
from midflight.space import Categorical, Float, Hyperparameter, Int, Space, default_range
from midflight.tuner import (
    Averaged,
    Every,
    FrontLoaded,
    NextStep,
    Population,
    Replay,
    Rotation,
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

__version__ = "0.1.0"

__all__ = [
    "Averaged",
    "Categorical",
    "CheckReport",
    "Every",
    "Float",
    "FrontLoaded",
    "Hyperparameter",
    "Int",
    "NextStep",
    "Population",
    "Replay",
    "Rotation",
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

_AUTOML = ("AutoClassifier", "AutoRegressor", "OnlineMLPClassifier", "OnlineMLPRegressor")


def __getattr__(name: str) -> Any:
    """What needs scikit-learn is imported when it is first used."""
    if name not in _AUTOML:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    errors.require_extra("sklearn", "automl")
    errors.require_extra("optuna", "automl")
    return getattr(import_module("midflight.automl"), name)
