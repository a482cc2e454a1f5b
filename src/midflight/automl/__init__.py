"""scikit-learn estimators that choose a learner and its hyperparameters together."""

from midflight.automl.auto import AutoClassifier, AutoRegressor
from midflight.automl.families import FAMILIES, Family
from midflight.automl.online_mlp import OnlineMLPClassifier, OnlineMLPRegressor

__all__ = [
    "FAMILIES",
    "AutoClassifier",
    "AutoRegressor",
    "Family",
    "OnlineMLPClassifier",
    "OnlineMLPRegressor",
]
