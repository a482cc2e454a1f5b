"""Read tables as floats. The types of the columns are decided once, in `fit`.

pandas changes types on its own: a gap makes 1 to 1.0, and a file makes True to "True". Therefore 1, 1.0,
True, "1", "1.0" and "true" are the same number, and the same category if `fit` saw only one of them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer, make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, QuantileTransformer, StandardScaler
from sklearn.utils import check_array

Array = np.ndarray[Any, Any]
MAX_ONE_HOT = 30
"""Maximal number of one-hot columns per category; the rarest values share the last."""
MAX_CODES = 254
"""Maximal number of codes in scikit-learn's histogram gradient boosting."""
NUMBER = (Real, np.bool_, Decimal)
EXACT = 2**53
"""Below this size, different whole numbers are different floats."""


def is_frame(X: Any) -> bool:
    """Whether X is a pandas frame."""
    return hasattr(X, "iloc") and hasattr(X, "columns")


class Table(TransformerMixin, BaseEstimator):
    """Read an array of numbers, or a pandas frame of numbers and categories, as floats.

    Gaps in numbers become NaN. Categories become codes: 0 for a gap, then 1, 2, ..., and NaN for a value that
    `fit` did not see. A column is a category if it is a categorical or if it holds text.

    Attributes:
        names_: names of the columns; None if `fit` saw an array.
        codes_: position -> codes of each category.

    Raises:
        TypeError, ValueError: X is no table, a column holds something else, or it changed its meaning.
    """

    def fit(self, X: Any, y: Any = None) -> Self:
        """Decide the type of each column."""
        self.names_, self.codes_ = None, {}
        if is_frame(X):
            self.names_ = list(X.columns)
            for i in range(X.shape[1]):
                column = X.iloc[:, i]
                values = [] if _numeric(column) else distinct_of(column)[1]
                numbers = (
                    str(column.dtype) == "object" and values and all(isinstance(v, NUMBER) for v in values)
                )
                if not _numeric(column) and not numbers:
                    self.codes_[i] = Codes(values)
        return self

    def transform(self, X: Any) -> Array:
        """Return floats, finite or NaN, shape (n, features)."""
        if is_frame(X):
            if self.names_ not in (None, list(X.columns)):
                raise ValueError(
                    f"X must have the columns of fit in their order, {self.names_}, but has "
                    f"{list(X.columns)}."
                )
            if 0 in X.shape:
                raise ValueError(f"X must have at least one row and one column, but its shape is {X.shape}.")
            read = [self.codes_.get(i, numbers_in)(X.iloc[:, i]) for i in range(X.shape[1])]
            return _checked(np.column_stack(read))
        if self.codes_:
            raise TypeError(
                f"X must be a pandas frame with the columns seen in fit, but got a {type(X).__name__}."
            )
        return _checked(np.ma.filled(X.astype(float), np.nan) if isinstance(X, np.ma.MaskedArray) else X)


class Codes:
    """The codes of the values of a category, from 1."""

    def __init__(self, values: Iterable[Any]) -> None:
        texts = sorted(
            set(map(str, values)), key=lambda text: (_exact(text) is None, _exact(text) or 0.0, text)
        )
        self._of_text = {text: code for code, text in enumerate(texts, 1)}
        times = Counter(map(_exact, texts))
        self._of_number: dict[float | None, float] = {
            _exact(text): code for text, code in self._of_text.items() if times[_exact(text)] == 1
        }
        self._of_number[None] = np.nan

    def __call__(self, column: Any) -> Array:
        """Return the codes of a column; 0: gap, NaN: unseen."""
        positions, values = distinct_of(column)
        codes = [self._of_text.get(str(v), self._of_number.get(_exact(v), np.nan)) for v in values]
        return np.array([*codes, 0.0])[positions]


def number(value: Any) -> float | None:
    """Return a value as a number, text included; None if it is none or not finite."""
    if isinstance(value, str):
        plain = value.replace("_", "?")  # float("1_0") is 10
        value = {"true": "1", "false": "0"}.get(value.casefold(), plain)
    try:
        read = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


def _exact(value: Any) -> float | None:
    read = number(value)
    return None if read is None or abs(read) >= EXACT else read


def numbers_in(column: Any) -> Array:
    """Return a column as floats, NaN for gaps."""
    if _numeric(column):
        return np.asarray(column.to_numpy(dtype=float, na_value=np.nan))
    positions, values = distinct_of(column)
    floats = [number(v) for v in values]
    if None in floats:
        raise ValueError(
            f"column {column.name!r} must hold finite numbers as in fit, but holds "
            f"{values[floats.index(None)]!r}."
        )
    return np.array([*floats, np.nan], dtype=float)[positions]


def _numeric(column: Any) -> bool:
    from pandas.api.types import is_complex_dtype, is_numeric_dtype

    return is_numeric_dtype(column.dtype) and not is_complex_dtype(column.dtype)


def distinct_of(column: Any) -> tuple[Array, list[Any]]:
    """Return the position of each value in the list of distinct ones, -1 for a gap, and that list.

    Raises:
        ValueError: a value is neither a number nor text nor an interval.
    """
    import pandas

    try:
        positions, values = pandas.factorize(column)
        other = [v for v in values if not isinstance(v, (*NUMBER, str, pandas.Interval))]
    except TypeError:  # cannot be hashed
        other = [v for v in column if not isinstance(v, (*NUMBER, str))]
    if other:
        raise ValueError(
            f"columns must be numbers or categories, but {column.name!r} is {column.dtype} and holds "
            f"{other[0]!r}; convert it to numbers or text, such as a date to days, or drop it."
        )
    return positions, list(values)


def _checked(X: Any) -> Array:
    try:
        if not hasattr(X, "toarray") and np.asarray(X).dtype.kind in "mM":
            raise TypeError("it holds dates or durations; convert them, such as to days.")
        return np.asarray(check_array(X, dtype=np.float64, ensure_all_finite="allow-nan"))
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"X must be a table of numbers, or a pandas frame if it has categories, but: {error}"
        ) from None


def scaled(categories: Sequence[int], scaling: str) -> ColumnTransformer:
    """Return a transformer that one-hot encodes categories, then imputes and scales numbers.

    A missing number becomes the median, marked in an additional column.

    Args:
        categories: positions of the categories.
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
    return make_column_transformer((one_hot, categories), remainder=make_pipeline(imputer, scaler))


def coded(categories: Sequence[int]) -> ColumnTransformer:
    """Return a transformer that writes categories as codes from 0, then numbers as they are."""
    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan, max_categories=MAX_CODES)
    return make_column_transformer((codes, categories), remainder=NoEmptyColumns())


class NoEmptyColumns(TransformerMixin, BaseEstimator):
    """Sets columns that were empty in `fit` to 0, because scikit-learn's gradient boosting fails on them."""

    def fit(self, X: Array, y: Any = None) -> Self:
        self.empty_ = np.isnan(X).all(0)
        return self

    def transform(self, X: Array) -> Array:
        return np.where(self.empty_, 0.0, X)
