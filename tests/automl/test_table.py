"""The types of the columns are those of `fit`, whatever pandas makes of them later."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

import midflight as mf
from midflight.automl.table import Codes, Table, coded, number, scaled

N = 120
RNG = np.random.default_rng(0)
WHOLE = RNG.integers(1, 5, N)
YES = RNG.random(N) < 0.5
WORD = RNG.choice(["red", "green", "blue"], N)


def as_objects(values):
    return pd.Series(list(values), dtype=object)


def with_gap(values):
    """What a gap in the first row makes of whole numbers: floats."""
    return pd.Series(values, dtype=float).where(np.arange(N) > 0)


WHOLES = {
    "whole numbers": pd.Series(WHOLE),
    "floats and a gap": with_gap(WHOLE),
    "small whole numbers": pd.Series(WHOLE.astype("int8")),
    "float32": pd.Series(WHOLE.astype("float32")),
    "nullable and a gap": pd.Series(with_gap(WHOLE).astype("Int64")),
    "text": pd.Series(WHOLE.astype(str)),
    "text of floats": pd.Series(WHOLE.astype(float).astype(str)),
    "text with a gap": with_gap(WHOLE).map(lambda v: None if np.isnan(v) else str(int(v))),
    "objects with None": as_objects([None, *WHOLE[1:].tolist()]),
    "objects of two kinds": as_objects([str(v) if i % 2 else v for i, v in enumerate(WHOLE)]),
    "decimals": as_objects([Decimal(int(v)) for v in WHOLE]),
    "a category": pd.Series(pd.Categorical(WHOLE)),
    "a category with a gap": pd.Series(pd.Categorical(with_gap(WHOLE))),
    "a category of text": pd.Series(pd.Categorical(WHOLE.astype(str))),
    "a category with other codes": pd.Series(pd.Categorical(WHOLE, categories=[9, 4, 3, 2, 1])),
}
BOOLEANS = {
    "booleans": pd.Series(YES),
    "0 and 1": pd.Series(YES.astype(int)),
    "floats and a gap": with_gap(YES.astype(float)),
    "nullable and a gap": pd.Series([None, *YES[1:].tolist()], dtype="boolean"),
    "objects with None": as_objects([None, *YES[1:].tolist()]),
    "text": pd.Series(np.where(YES, "True", "False")),
    "small text": pd.Series(np.where(YES, "true", "false")),
    "a category": pd.Series(pd.Categorical(YES)),
    "a category of text": pd.Series(pd.Categorical(np.where(YES, "True", "False"))),
}
WORDS = {
    "text": pd.Series(WORD),
    "objects with None": as_objects([None, *WORD[1:].tolist()]),
    "pandas' text": pd.Series(WORD, dtype="string"),
    "a category": pd.Series(pd.Categorical(WORD)),
    "a category with other codes": pd.Series(pd.Categorical(WORD, categories=["red", "x", "blue", "green"])),
}


@pytest.mark.parametrize("forms", [WHOLES, BOOLEANS, WORDS], ids=["whole", "booleans", "words"])
def test_each_form_in_fit_and_each_in_predict_give_equal_floats(forms):
    for seen in forms.values():
        table = Table().fit(pd.DataFrame({"a": seen}))
        expected = table.transform(pd.DataFrame({"a": seen}))
        for name, given in forms.items():
            read = table.transform(pd.DataFrame({"a": given}))
            gap = given.isna().to_numpy()
            same = ~gap & ~seen.isna().to_numpy()
            np.testing.assert_array_equal(read[same], expected[same], err_msg=name)
            # a gap is NaN among numbers, and a category of its own
            assert np.all(read[gap] == 0 if table.codes_ else np.isnan(read[gap]))


@pytest.mark.parametrize("family", ["boosting", "linear"])
def test_a_model_predicts_equally_for_each_form(family):
    kinds = [(WHOLES, WHOLE % 2), (BOOLEANS, YES.astype(int)), (WORDS, (WORD == "red").astype(int))]
    for forms, y in kinds:
        seen = pd.DataFrame({"a": pd.Series(forms["a category"]), "b": RNG.normal(size=N)})
        auto = mf.AutoClassifier(seconds=None, trials=1, families=[family], random_state=0).fit(seen, y)
        assert auto.score(seen, y) == 1.0
        for name, given in forms.items():
            predicted = auto.predict_proba(seen.assign(a=given))
            np.testing.assert_array_equal(predicted[1:], auto.predict_proba(seen)[1:], err_msg=name)


def test_text_that_looks_like_numbers_stays_apart_where_fit_saw_it_apart():
    table = Table().fit(pd.DataFrame({"zip": ["01", "1", "2", "x"]}))
    read = table.transform(pd.DataFrame({"zip": ["01", "1", "1.0", "2.0", "x", "1_0"]}))[:, 0]
    # "1.0" might be "01" or "1", so it is unseen
    np.testing.assert_array_equal(read, [1, 2, np.nan, 3, 4, np.nan])
    alone = Table().fit(pd.DataFrame({"zip": ["01", "02"]}))
    np.testing.assert_array_equal(alone.transform(pd.DataFrame({"zip": [2, 1]}))[:, 0], [2, 1])


def test_long_numbers_of_a_category_are_not_rounded_to_each_other():
    big = 2**53
    table = Table().fit(pd.DataFrame({"id": pd.Categorical([big, 7])}))
    read = table.transform(pd.DataFrame({"id": pd.Series([big, big + 1, 7.0], dtype=object)}))[:, 0]
    np.testing.assert_array_equal(read, [2, np.nan, 1])


def test_codes_follow_the_order_of_the_numbers():
    codes = Codes(["10", "9", "b", "a", "-1"])
    np.testing.assert_array_equal(codes(pd.Series(["-1", "9", "10", "a", "b", None])), [1, 2, 3, 4, 5, 0])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1), (np.False_, 0), ("TRUE", 1), ("false", 0), (" 2.50 ", 2.5), ("1e3", 1000),
        (Decimal("0.1"), 0.1),
        ("", None), ("1_000", None), ("inf", None), ("nan", None), (np.inf, None), (10**400, None),
        ("yes", None),
    ],
)  # fmt: skip
def test_a_number_is_read_from_each_form(value, expected):
    assert number(value) == expected


def test_arrays_and_lists_and_masks_are_numbers():
    rows = [[1, None], [True, 2.5]]
    np.testing.assert_array_equal(Table().fit_transform(rows), [[1, np.nan], [1, 2.5]])
    masked = np.ma.masked_array([[1, 2], [3, 4]], mask=[[0, 1], [0, 0]])
    np.testing.assert_array_equal(Table().fit_transform(masked), [[1, np.nan], [3, 4]])


def test_intervals_are_categories_and_what_was_empty_in_fit_accepts_anything():
    frame = pd.DataFrame(
        {"age": pd.cut([1, 5, 9], [0, 3, 6, 10]), "empty": pd.Series([None] * 3, dtype=object)}
    )
    table = Table().fit(frame)
    np.testing.assert_array_equal(table.transform(frame), [[1, 0], [2, 0], [3, 0]])
    np.testing.assert_array_equal(table.transform(frame.assign(empty="x"))[:, 1], [np.nan] * 3)


def test_scaled_tables_have_no_gaps_and_coded_ones_keep_them():
    frame = pd.DataFrame({"n": [1.0, 2.0, np.nan, 3.0] * 10, "c": ["x", "y", None, "x"] * 10})
    table = Table().fit(frame)
    X = table.transform(frame)
    plain = scaled([1], "standard").fit_transform(X)
    assert plain.shape == (40, 3 + 2)  # three values, the number and its marker
    assert np.isfinite(plain).all()
    np.testing.assert_allclose(plain[:, 3:].std(0), 1)
    codes = coded([1]).fit(X)
    np.testing.assert_array_equal(codes.transform(X)[:4], [[1, 1], [2, 2], [0, np.nan], [1, 3]])
    new = table.transform(pd.DataFrame({"n": [0.0], "c": ["never seen"]}))
    np.testing.assert_array_equal(codes.transform(new), [[np.nan, 0]])


def test_reading_text_only_as_text_would_lose_the_gap():
    """The fault of the first edition: "1" and "1.0" were two categories."""
    wrong = {str(v) for v in WHOLES["a category"].unique()} & {
        str(v) for v in with_gap(WHOLE).dropna().unique()
    }
    assert not wrong
