"""The families of learners, each with its space, its default configuration and its constructors.

A new family is one row in `FAMILIES`; searches and tests read the table.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import ElasticNet, LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from midflight.automl.online_mlp import OnlineMLPClassifier, OnlineMLPRegressor
from midflight.automl.validation import Array, spread
from midflight.search.space import Space, Spec
from midflight.space import Categorical, Float, Int

Params = dict[str, Any]
Build = Callable[[Params, int], Any]
"""(hyperparameters of the family, seed) -> scikit-learn estimator"""

SCALING = Categorical(["standard", "normal"])
"""Scaling of numbers for the families that need it; see `table.scaled`."""
LIBSVM = {"max_iter": 50_000}
"""Limits the iterations, because libsvm may need very many; the model is used unconverged."""


@dataclass(frozen=True)
class Family:
    """A kind of learner.

    Attributes:
        space: name -> searched hyperparameter; hyperparameters tuned during training are not included.
        default: first configuration of the search.
        classifier: builds a classifier with `predict_proba`.
        regressor: builds a regressor.
        needs_scale: whether it needs `table.scaled`; otherwise it reads `table.coded`.
        growth: exponent g of the fit time, about rows^g; measured from 1,000 to 16,000 rows.
    """

    space: Mapping[str, Spec]
    default: Params
    classifier: Build
    regressor: Build
    needs_scale: bool = False
    growth: float = 1.0


class Thirds:
    """Three stratified folds, also for classes with fewer than three rows, which scikit-learn's refuse."""

    def split(self, X: Array, y: Array, groups: Any = None) -> Iterator[tuple[Array, Array]]:
        order = spread(y, 0)
        for k in range(3):
            training = np.setdiff1d(order, order[k::3])
            absent = ~np.isin(y, y[training])  # one row of a class is better seen twice than never
            yield np.append(training, np.flatnonzero(absent)), order[k::3]

    def get_n_splits(self, *unused: Any) -> int:
        return 3


def _calibrated(classifier: Any, method: str = "sigmoid") -> Any:
    """Calibrate probabilities (Platt 1999): an SVM gives margins, and shares of neighbours may be 0."""
    return CalibratedClassifierCV(classifier, cv=Thirds(), ensemble=False, method=method)


def _per_column(X: Array) -> Array:
    """Return X / sqrt(columns), so that the best gamma of an SVM depends little on their number."""
    scaled_rows: Array = X / np.sqrt(X.shape[1])
    return scaled_rows


def _svm(kind: Any) -> Build:
    return lambda params, seed: make_pipeline(FunctionTransformer(_per_column), kind(**LIBSVM, **params))


def _forest(random: Any, extra: Any) -> Build:
    def build(params: Params, seed: int) -> Any:
        kind = {"random": random, "extra": extra}[params["kind"]]
        return kind(200, random_state=seed, **{k: v for k, v in params.items() if k != "kind"})

    return build


def _boosting(kind: Any) -> Build:
    return lambda params, seed: kind(random_state=seed, early_stopping=False, **params)


def _mlp(kind: Any) -> Build:
    def build(params: Params, seed: int) -> Any:
        hidden = (params["width"],) * params["layers"]
        rest = {name: params[name] for name in ("lr", "max_steps", "refit")}
        return kind(hidden=hidden, random_state=seed, **rest)

    return build


FAMILIES: dict[str, Family] = {
    "linear": Family(
        {"strength": Float(1e-5, 1e3, log=True)},
        {"strength": 1.0},
        lambda params, seed: LogisticRegression(C=1 / params["strength"], max_iter=500),
        lambda params, seed: Ridge(alpha=params["strength"]),
        needs_scale=True,
    ),
    "tree": Family(
        {"max_depth": Int(1, 20, log=True), "min_samples_leaf": Int(1, 50, log=True)},
        {"max_depth": 6, "min_samples_leaf": 5},
        lambda params, seed: DecisionTreeClassifier(random_state=seed, **params),
        lambda params, seed: DecisionTreeRegressor(random_state=seed, **params),
    ),
    "knn": Family(
        {
            "n_neighbors": Int(1, 50, log=True),
            "weights": Categorical(["uniform", "distance"]),
            "p": Int(1, 2),
        },
        {"n_neighbors": 10, "weights": "distance", "p": 2},
        lambda params, seed: _calibrated(KNeighborsClassifier(**params)),
        lambda params, seed: KNeighborsRegressor(**params),
        needs_scale=True,
        growth=1.5,
    ),
    "mlp": Family(
        {
            "layers": Int(1, 3),
            "width": Int(16, 256, log=True),
            "lr": Float(5e-4, 2e-2, log=True),
            "max_steps": Int(500, 4000, log=True),
            "refit": Categorical([True, False]),
        },
        {"layers": 2, "width": 128, "lr": 3e-3, "max_steps": 1000, "refit": False},
        _mlp(OnlineMLPClassifier),
        _mlp(OnlineMLPRegressor),
        needs_scale=True,
        growth=0.4,
    ),
    "boosting": Family(
        {
            "learning_rate": Float(0.01, 0.5, log=True),
            "max_iter": Int(20, 300, log=True),
            "max_leaf_nodes": Int(3, 63, log=True),
            "min_samples_leaf": Int(1, 50, log=True),
            "l2_regularization": Float(1e-6, 100.0, log=True),
            "max_features": Float(0.2, 1.0),
        },
        {
            "learning_rate": 0.1, "max_iter": 100, "max_leaf_nodes": 31, "min_samples_leaf": 20,
            "l2_regularization": 1e-6, "max_features": 1.0,
        },
        _boosting(HistGradientBoostingClassifier),
        _boosting(HistGradientBoostingRegressor),
        growth=0.5,
    ),
    "svm": Family(
        {"C": Float(1e-2, 1e3, log=True), "gamma": Float(1e-2, 100.0, log=True)},
        {"C": 10.0, "gamma": 0.5},
        lambda params, seed: _calibrated(_svm(SVC)(params, seed), "temperature"),
        _svm(SVR),
        needs_scale=True,
        growth=2.0,
    ),
    "forest": Family(
        {
            "kind": Categorical(["random", "extra"]),
            "max_features": Float(0.05, 1.0),
            "min_samples_leaf": Int(1, 20, log=True),
        },
        {"kind": "extra", "max_features": 0.5, "min_samples_leaf": 1},
        _forest(RandomForestClassifier, ExtraTreesClassifier),
        _forest(RandomForestRegressor, ExtraTreesRegressor),
    ),
    "elastic_net": Family(
        {"strength": Float(1e-3, 100.0, log=True), "l1_ratio": Float(0.0, 1.0)},
        {"strength": 1.0, "l1_ratio": 0.5},
        lambda params, seed: LogisticRegression(
            C=1 / params["strength"], l1_ratio=params["l1_ratio"], solver="saga", random_state=seed
        ),
        # ElasticNet divides the loss by the number of rows, the others do not; they agree at 100 rows
        lambda params, seed: ElasticNet(alpha=params["strength"] / 100, l1_ratio=params["l1_ratio"]),
        needs_scale=True,
    ),
}  # fmt: skip
"""Name -> family, in the order in which the defaults are tried, fast ones first.

The time of a network grows less with the table than that of boosting and SVMs, so it comes before them.
"""


def space_of(families: Sequence[str]) -> Space:
    """Return the conditional space of some families, with the names `family` and FAMILY.HYPERPARAMETER."""
    specs: dict[str, Spec] = {"family": Categorical(list(families))}
    for name in families:
        own = dict(FAMILIES[name].space) | ({"scaling": SCALING} if FAMILIES[name].needs_scale else {})
        specs |= {f"{name}.{key}": replace(spec, when={"family": name}) for key, spec in own.items()}
    return Space(specs)


def default_of(family: str) -> Params:
    """Return a family's default configuration, with the names of `space_of`."""
    own = FAMILIES[family].default | ({"scaling": "standard"} if FAMILIES[family].needs_scale else {})
    return {"family": family, **{f"{family}.{key}": value for key, value in own.items()}}
