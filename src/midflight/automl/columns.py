"""Tables made into what a learner can read: numbers without gaps and on one scale, or as they are."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    OrdinalEncoder,
    QuantileTransformer,
    StandardScaler,
)

MOST_ONE_HOT = 30
"""Columns that a category becomes at most; the rarest values share the last."""
MOST_CODES = 254
"""What scikit-learn's histograms can tell apart."""


@dataclass(frozen=True)
class Columns:
    """Positions of the columns of each kind."""

    numbers: tuple[int, ...]
    categories: tuple[int, ...]


def columns_of(X: Any) -> Columns:
    """The kinds of the columns of an array or a pandas frame; all of an array are numbers.

    Raises:
        ValueError: a column is a date or a duration.
    """
    if not is_frame(X):
        return Columns(tuple(range(X.shape[1])), ())
    from pandas.api.types import is_numeric_dtype

    for name, dtype in zip(X.columns, X.dtypes, strict=True):
        if getattr(dtype, "kind", "") in "mM":
            raise ValueError(
                f"columns must be numbers or categories, but {name!r} is {dtype}; "
                "turn it into numbers such as days."
            )
    numbers = [is_numeric_dtype(dtype) for dtype in X.dtypes]
    return Columns(
        tuple(i for i, number in enumerate(numbers) if number),
        tuple(i for i, number in enumerate(numbers) if not number),
    )


def is_frame(X: Any) -> bool:
    """Whether X is a pandas frame."""
    return hasattr(X, "iloc")


def scaled(columns: Columns, scaling: str) -> ColumnTransformer:
    """Gaps filled by the median and marked by a further column, numbers scaled, categories one-hot.

    Args:
        scaling: "standard", to mean 0 and variance 1; or "normal", by quantiles to a normal distribution.
    """
    scaler = (
        StandardScaler()
        if scaling == "standard"
        else QuantileTransformer(n_quantiles=100, output_distribution="normal")
    )
    filler = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
    one_hot = OneHotEncoder(
        handle_unknown="infrequent_if_exist", max_categories=MOST_ONE_HOT, sparse_output=False
    )
    return _by_kind(columns, make_pipeline(filler, scaler), one_hot)


def coded(columns: Columns) -> ColumnTransformer:
    """Numbers as they are, with their gaps; categories as codes from 0. First the numbers, then the codes."""
    codes = OrdinalEncoder(
        handle_unknown="use_encoded_value", unknown_value=np.nan, max_categories=MOST_CODES
    )
    return _by_kind(columns, NoEmptyColumns(), codes)


def _by_kind(columns: Columns, numbers: Any, categories: Any) -> ColumnTransformer:
    parts = [("numbers", numbers, list(columns.numbers))]
    if columns.categories:
        text = FunctionTransformer(as_text, feature_names_out="one-to-one")
        parts.append(("categories", make_pipeline(text, categories), list(columns.categories)))
    return ColumnTransformer(parts)


class NoEmptyColumns(TransformerMixin, BaseEstimator):
    """Columns that held nothing but gaps become 0: scikit-learn's histograms stumble over them."""

    def fit(self, X: Any, y: Any = None) -> Self:
        self.empty_ = np.isnan(np.asarray(X, dtype=float)).all(0)
        return self

    def transform(self, X: Any) -> np.ndarray[Any, Any]:
        return np.where(self.empty_, 0.0, np.asarray(X, dtype=float))


def as_text(X: Any) -> np.ndarray[Any, Any]:
    """Categories as strings, so that they can be sorted; a gap is a category of its own, the empty string."""
    columns = [X.iloc[:, i] for i in range(X.shape[1])]
    text = [["" if gap else str(v) for v, gap in zip(c, c.isna(), strict=True)] for c in columns]
    return np.array(text, dtype=object).T.reshape(X.shape)
