"""Choose the algorithm and its configuration together, and tune what is continuous while it trains."""

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
