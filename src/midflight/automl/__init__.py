"""Choose the algorithm and its configuration together, and tune what is continuous while it trains."""

from midflight.automl.online_mlp import OnlineMLPClassifier, OnlineMLPRegressor

__all__ = ["OnlineMLPClassifier", "OnlineMLPRegressor"]
