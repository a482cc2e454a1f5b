"""Convert tables for learners: scaled numbers without missing values, or numbers and codes as they are."""

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

MAX_ONE_HOT = 30
"""Maximal number of one-hot columns per category; the rarest values share the last."""
MAX_CODES = 254
"""Maximal number of codes in scikit-learn's histogram gradient boosting."""


@dataclass(frozen=True)
class Columns:
    """Positions of the numeric and the categorical columns."""

    numbers: tuple[int, ...]
    categories: tuple[int, ...]


def columns_of(X: Any) -> Columns:
    """Return the kinds of the columns of a pandas frame or an array, which has numbers only.

    Raises:
        ValueError: a column holds dates or durations.
    """
    if not is_frame(X):
        return Columns(tuple(range(X.shape[1])), ())
    from pandas.api.types import is_numeric_dtype

    for name, dtype in zip(X.columns, X.dtypes, strict=True):
        if getattr(dtype, "kind", "") in "mM":
            raise ValueError(
                f"columns must be numbers or categories, but {name!r} is {dtype}; "
                "convert it to numbers, such as days."
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
    """Return a transformer that imputes and scales numbers and one-hot encodes categories.

    A missing number becomes the median, marked in an additional column.

    Args:
        scaling: "standard" (mean 0, variance 1) or "normal" (quantiles to a normal distribution).
    """
    scaler = (
        StandardScaler()
        if scaling == "standard"
        else QuantileTransformer(n_quantiles=100, output_distribution="normal")
    )
    imputer = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
    one_hot = OneHotEncoder(
        handle_unknown="infrequent_if_exist", max_categories=MAX_ONE_HOT, sparse_output=False
    )
    return _by_kind(columns, make_pipeline(imputer, scaler), one_hot)


def coded(columns: Columns) -> ColumnTransformer:
    """Return a transformer that keeps numbers, then appends categories as codes from 0."""
    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan, max_categories=MAX_CODES)
    return _by_kind(columns, NoEmptyColumns(), codes)


def _by_kind(columns: Columns, numbers: Any, categories: Any) -> ColumnTransformer:
    parts = [("numbers", numbers, list(columns.numbers))]
    if columns.categories:
        text = FunctionTransformer(as_text, feature_names_out="one-to-one")
        parts.append(("categories", make_pipeline(text, categories), list(columns.categories)))
    return ColumnTransformer(parts)


class NoEmptyColumns(TransformerMixin, BaseEstimator):
    """Sets columns that were empty in `fit` to 0, because scikit-learn's gradient boosting fails on them."""

    def fit(self, X: Any, y: Any = None) -> Self:
        self.empty_ = np.isnan(np.asarray(X, dtype=float)).all(0)
        return self

    def transform(self, X: Any) -> np.ndarray[Any, Any]:
        return np.where(self.empty_, 0.0, np.asarray(X, dtype=float))


def as_text(X: Any) -> np.ndarray[Any, Any]:
    """Return categories as strings, which can be sorted; a missing value becomes the category ""."""
    columns = [X.iloc[:, i] for i in range(X.shape[1])]
    text = [["" if gap else str(v) for v, gap in zip(c, c.isna(), strict=True)] for c in columns]
    return np.array(text, dtype=object).T.reshape(X.shape)
