"""Calls that cannot be right: each is refused in a sentence of ours or of scikit-learn, at once."""

import datetime
import decimal
import itertools
import re
import traceback

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import midflight as mf
from midflight.automl.table import Table

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3))
Y = np.arange(24) % 2
FRAME = pd.DataFrame({"a": X[:, 0], "b": ["u", "v", "w"] * 8, "c": np.arange(24) > 11})
CHEAP = {"seconds": None, "trials": 1, "families": ["tree"], "random_state": 0}


def column(value, dtype=object):
    """A frame with a column of these values."""
    values = value if isinstance(value, list) and len(value) == 24 else [value] * 24
    return FRAME.assign(new=pd.Series(values, dtype=dtype))


class Unknown:
    """An object of a user."""


TABLES = {
    "None": None,
    "a number": 3.0,
    "text": "table",
    "a dict of columns": {"a": [1, 2], "b": [3, 4]},
    "a list of dicts": [{"a": 1.0}] * 24,
    "a list of text": ["a"] * 24,
    "a ragged list": [[1.0, 2.0], [3.0]] * 12,
    "an array of 1 dimension": X[:, 0],
    "an array of 3 dimensions": X[:, :, None],
    "an array of text": np.array([["a", "b"]] * 24),
    "an array of objects with text": np.array([["a", 1.0]] * 24, dtype=object),
    "an array of objects with lists": pd.DataFrame({"a": [[1]] * 24, "b": [[1, 2]] * 24}).to_numpy(),
    "an array of dates": np.full((24, 2), np.datetime64("2026-01-01")),
    "an array of durations": np.full((24, 2), np.timedelta64(3, "D")),
    "a list of dates": [[datetime.date(2026, 1, 1)]] * 24,
    "complex numbers": X + 1j,
    "an infinity": np.where(np.arange(3) == 1, np.inf, X),
    "a sparse matrix": scipy.sparse.csr_matrix(X),
    "a sparse array": scipy.sparse.csr_array(X),
    "a structured array": np.zeros(24, dtype=[("a", float), ("b", float)]),
    "0 columns": np.zeros((24, 0)),
    "0 rows": np.zeros((0, 3)),
    "3 rows": X[:3],
    "a generator": (row for row in X),
    "a Series": FRAME["a"],
    "a Series of text": FRAME["b"],
    "an Index": FRAME.index,
    "a frame without columns": FRAME[[]],
    "a frame without rows": FRAME[:0],
    "a frame with an infinity": FRAME.assign(a=np.inf),
    "a frame with an infinity among objects": column([1.0, np.inf] * 12),
    "a frame of complex numbers": FRAME.assign(a=1j),
    "a frame with complex objects": column([1j, 2] * 12),
    "names of two types": FRAME.rename(columns={"a": 1}),
    "a column of dates": FRAME.assign(a=pd.Timestamp("2026-01-01")),
    "a column of dates with a zone": FRAME.assign(a=pd.Timestamp("2026-01-01", tz="UTC")),
    "a column of dates as objects": column(datetime.date(2026, 1, 1)),
    "a category of dates": column(pd.Timestamp("2026-01-01"), "category"),
    "a column of durations": FRAME.assign(a=pd.Timedelta("1 day")),
    "a column of periods": column(pd.Period("2026-01"), None),
    "a column of times": column(datetime.time(12)),
    "a column of lists": column([[1, 2]] * 24),
    "a column of arrays": column([np.zeros(2)] * 24),
    "a column of arrays with one number": column([np.zeros(1)] * 24),
    "a column of dicts": column([{"a": 1}] * 24),
    "a column of sets": column([{1}] * 24),
    "a column of tuples": column([(1, 2)] * 24),
    "a column of bytes": column(b"a"),
    "a column of objects": column([Unknown() for _ in range(24)]),
    "a column of classes": column([Unknown] * 24),
    "a column of Series": column([pd.Series([1.0])] * 24),
    "a column of text and dates": column(["a", datetime.date(2026, 1, 1)] * 12),
}
TARGETS = {
    "None": None,
    "a number": 3,
    "too few": Y[:20],
    "two columns": np.stack([Y, Y], 1),
    "a frame with two columns": pd.DataFrame({"a": Y, "b": Y}),
    "one class": np.zeros(24),
    "one class of text": ["a"] * 24,
    "numbers that are not labels": X[:, 0],
    "a gap": np.where(Y == 0, np.nan, 1.0),
    "None among text": ["a", "b", None] * 8,
    "None among numbers": [0, 1, None] * 8,
    "NaN among text": ["a", "b", np.nan] * 8,
    "NA among text": pd.array(["a", "b", None] * 8, dtype="string"),
    "NA among whole numbers": pd.array([0, 1, None] * 8, dtype="Int64"),
    "NaT": pd.Series([pd.NaT, pd.Timestamp("2026-01-01")] * 12),
    "a gap among categories": pd.Categorical(["a", "b", None] * 8),
    "an infinity": np.where(Y == 0, np.inf, 1.0),
    "text and numbers": ["a", 1] * 12,
    "text and booleans": ["a", True] * 12,
    "dates": [datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)] * 12,
    "dates of numpy": np.arange(24).astype("datetime64[D]"),
    "durations": np.arange(24).astype("timedelta64[D]"),
    "complex numbers": Y + 1j,
    "lists": [[1], [2, 3]] * 12,
    "dicts": [{"a": 1}] * 24,
    "tuples": pd.Series([(1, 2), (3, 4)] * 12),
    "bytes": [b"a", b"b"] * 12,
    "objects": [Unknown() for _ in range(24)],
    "a sparse matrix": scipy.sparse.csr_matrix(Y[:, None]),
}
NUMBERS = {
    "text": ["a", "b"] * 12,
    "one value": np.full(24, 3.0),
    "a whole number that is too large": [10**400, 1] * 12,
}
ARGUMENTS = [
    {"seconds": 0}, {"seconds": -1}, {"seconds": np.nan}, {"seconds": "60"}, {"seconds": True},
    {"seconds": [60]},
    {"seconds": np.inf, "trials": None}, {"seconds": None, "trials": None}, {"seconds": 1j},
    {"trials": 0}, {"trials": -1}, {"trials": 1.5}, {"trials": "3"}, {"trials": True}, {"trials": np.nan},
    {"families": []}, {"families": "tree"}, {"families": ["svn"]}, {"families": 3}, {"families": [None]},
    {"families": [["tree"]]}, {"families": ["tree", 1]},
    {"engine": "smack"}, {"engine": None}, {"engine": "ray"}, {"engine": "bohb"}, {"engine": ["tpe"]},
    {"scoring": "accurate"}, {"scoring": 3}, {"scoring": ["accuracy", "f1"]}, {"scoring": {"a": "accuracy"}},
    {"scoring": lambda p, y: 1 / 0}, {"scoring": "neg_mean_squared_log_error"}, {"scoring": np.mean},
    {"ensemble": 0}, {"ensemble": -1}, {"ensemble": 1.5}, {"ensemble": None}, {"ensemble": "8"},
    {"ensemble": True},    {"n_jobs": 0}, {"n_jobs": 1.5}, {"n_jobs": "all"}, {"n_jobs": True},
    {"random_state": "a"}, {"random_state": -1}, {"random_state": 1.5},
    {"random_state": np.random.default_rng(0)},
]  # fmt: skip
RAW = re.compile(
    r"not supported between|has no attribute|unhashable|at least one array|not iterable|^\d|ufunc"
)


def refused(call):
    """Return the sentence of a refusal: an error that begins in this project's or scikit-learn's code."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    last = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    assert "midflight" in last or "sklearn" in last, f"the error is raised in {last}"
    sentence = str(caught.value)
    assert len(sentence.split()) >= 4
    assert not RAW.search(sentence), sentence
    return sentence


@pytest.mark.parametrize("name", TABLES)
def test_what_is_no_table_of_features_is_refused_by_fit(name):
    table = TABLES[name]
    refused(
        lambda: mf.AutoClassifier(**CHEAP).fit(table, Y[: len(table)] if name in ("0 rows", "3 rows") else Y)
    )


@pytest.mark.filterwarnings("ignore:X has feature names", "ignore:X does not have valid feature names")
@pytest.mark.parametrize("name", [n for n in TABLES if n not in ("3 rows", "a generator")])
@pytest.mark.parametrize("seen", ["array", "frame"])
def test_what_is_no_table_of_features_is_refused_by_predict(name, seen):
    auto = fitted_on(seen)
    refused(lambda: auto.predict(TABLES[name]))


_FITTED = {}


def fitted_on(seen):
    if seen not in _FITTED:
        _FITTED[seen] = mf.AutoClassifier(**CHEAP).fit(X if seen == "array" else FRAME, Y)
    return _FITTED[seen]


@pytest.mark.parametrize("name", TARGETS)
def test_what_are_no_classes_is_refused(name):
    refused(lambda: mf.AutoClassifier(**CHEAP).fit(X, TARGETS[name]))


NO_NUMBERS = TARGETS | NUMBERS
FINE_NUMBERS = ("numbers that are not labels",)


@pytest.mark.parametrize("name", [n for n in NO_NUMBERS if n not in FINE_NUMBERS])
def test_what_are_no_numbers_is_refused_by_a_regressor(name):
    refused(lambda: mf.AutoRegressor(**CHEAP).fit(X, NO_NUMBERS[name]))


@pytest.mark.parametrize(
    "changes", ARGUMENTS, ids=lambda changes: re.sub(" at 0x[0-9a-fA-F]+", "", str(changes))
)
def test_an_argument_that_cannot_be_is_refused_before_the_search(changes):
    refused(lambda: mf.AutoClassifier(**{**CHEAP, **changes}).fit(X, ["a", "b"] * 12))


@pytest.mark.parametrize("method", ["predict", "predict_proba", "score"])
def test_an_estimator_without_a_model_says_so(method):
    auto = mf.AutoClassifier(**CHEAP)
    arguments = (X, Y) if method == "score" else (X,)
    assert "not fitted" in refused(lambda: getattr(auto, method)(*arguments))
    auto.fit(X, Y)
    with pytest.raises(ValueError, match="at least two classes"):
        auto.fit(X, np.zeros(24))  # a second fit that fails takes the first model away
    assert "not fitted" in refused(lambda: getattr(auto, method)(*arguments))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (FRAME[["b", "a", "c"]], "same order"),
        (FRAME[["a", "b"]], "missing"),
        (FRAME.assign(d=1.0), "unseen at fit time"),
        (FRAME.to_numpy(), "must be a pandas frame"),
        (FRAME.assign(a="red"), "'a' must hold finite numbers as in fit, but holds 'red'"),
        (FRAME.assign(c="maybe"), "'c' must hold finite numbers as in fit, but holds 'maybe'"),
    ],
)
def test_other_columns_than_those_of_fit_are_refused(changed, sentence):
    assert sentence in refused(lambda: fitted_on("frame").predict(changed))


def test_columns_whose_names_are_numbers_keep_their_order():
    auto = mf.AutoClassifier(**CHEAP).fit(pd.DataFrame(X), Y)
    for order in itertools.permutations(range(3)):
        if list(order) != [0, 1, 2]:
            assert "in their order" in refused(lambda o=list(order): auto.predict(pd.DataFrame(X)[o]))


def test_a_harness_that_takes_each_error_for_a_sentence_would_be_wrong():
    for raw in (lambda: sorted(["a", None]), lambda: FRAME["a"].columns, lambda: float("table")):
        with pytest.raises((AssertionError, pytest.fail.Exception, AttributeError)):
            refused(raw)


def test_unusual_numbers_are_features():
    for numbers in ([decimal.Decimal("1.5"), 2], [True, None], [np.float32(1), 2], [pd.NA, 3]):
        read = Table().fit_transform(pd.DataFrame({"a": pd.Series(numbers, dtype=object)}))
        assert read.shape == (2, 1)
        assert read[1] == (numbers[1] if numbers[1] is not None else pytest.approx(np.nan, nan_ok=True))
