"""Tune the hyperparameters while the model trains."""

from typing import TYPE_CHECKING, Any

from midflight import losses, nn, penalties
from midflight.checking import CheckReport, check
from midflight.errors import (
    BindingError,
    InvalidLoss,
    MidflightError,
    MissingExtra,
    NoCompiler,
    NoForwardMode,
    NotTwiceDifferentiable,
    SpaceError,
    UnknownGradient,
    UnknownName,
    UnreachedHyperparameter,
    UnsupportedOptimizer,
    UnsupportedParameter,
    UnsupportedSetting,
    UnusableLoader,
)
from midflight.hypergrad import ESTIMATORS, Estimator, hypergradient
from midflight.problem import Problem, Step
from midflight.ranges import RANGES, default_range
from midflight.space import Categorical, Float, Hyperparameter, Int, Space
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
from midflight.updates import RULES, Update, UpdateRule

if TYPE_CHECKING:
    from midflight.automl import AutoClassifier as AutoClassifier
    from midflight.automl import AutoRegressor as AutoRegressor
    from midflight.automl import OnlineMLPClassifier as OnlineMLPClassifier
    from midflight.automl import OnlineMLPRegressor as OnlineMLPRegressor

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "RANGES",
    "RULES",
    "Averaged",
    "BindingError",
    "Categorical",
    "CheckReport",
    "Estimator",
    "Every",
    "Float",
    "FrontLoaded",
    "Hyperparameter",
    "Int",
    "InvalidLoss",
    "MidflightError",
    "MissingExtra",
    "NextStep",
    "NoCompiler",
    "NoForwardMode",
    "NotTwiceDifferentiable",
    "Population",
    "Problem",
    "Replay",
    "Rotation",
    "SignSteps",
    "Space",
    "SpaceError",
    "Step",
    "TimeBudget",
    "Trajectory",
    "Tuner",
    "UnknownGradient",
    "UnknownName",
    "UnreachedHyperparameter",
    "UnsupportedOptimizer",
    "UnsupportedParameter",
    "UnsupportedSetting",
    "UnusableLoader",
    "Update",
    "UpdateRule",
    "check",
    "default_range",
    "hypergradient",
    "losses",
    "nn",
    "param_groups",
    "penalties",
    "stacked",
]


def __getattr__(name: str) -> Any:
    """What needs scikit-learn is imported when it is first used."""
    if name not in ("AutoClassifier", "AutoRegressor", "OnlineMLPClassifier", "OnlineMLPRegressor"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from midflight.search.engines import need

    need("sklearn", "automl")
    need("optuna", "automl")
    from midflight import automl

    return getattr(automl, name)
