"""AutoClassifier and AutoRegressor: what is searched, what comes out, and what the time does."""

import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine, make_friedman1
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import get_scorer, log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import midflight as mf
from midflight.automl import FAMILIES, Family
from midflight.automl.families import default_of
from midflight.automl.judge import Judge, Problem, Row
from midflight.automl.validation import folds_of
from midflight.search import SearchError

WINE = load_wine(return_X_y=True)
CHEAP = {"seconds": None, "families": ["linear", "tree"], "random_state": 0}


def fake(learner, **about):
    """A family with one hyperparameter that it does not read."""
    return Family({"a": mf.Float(0.0, 1.0)}, {"a": 0.5}, *(lambda params, seed: learner,) * 2, **about)


class Spoilt(LogisticRegression):
    """Does something else before it fits."""

    def __init__(self, do):
        super().__init__()
        self.do = do

    def fit(self, X, y):
        self.do(X)
        return super().fit(X, y)


@pytest.fixture
def mixed():
    """A frame with numbers, gaps, categories and a new category in the part that is predicted."""
    rng = np.random.default_rng(0)
    n = 160
    frame = pd.DataFrame(
        {
            "number": rng.normal(size=n),
            "gaps": np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n)),
            "colour": rng.choice(["red", "green", "blue"], n),
            "shape": pd.Categorical(rng.choice(["round", "square"], n)),
            "empty": np.full(n, np.nan),
        }
    )
    frame.loc[::9, "colour"] = None
    signal = frame["number"] + 3 * (frame["colour"] == "red") + 2 * (frame["shape"] == "round")
    frame.loc[n - 1, "colour"] = "never seen"
    return frame, signal.to_numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_learns_from_numbers_categories_and_gaps(family, mixed, monkeypatch):
    monkeypatch.setitem(FAMILIES["mlp"].space, "max_steps", mf.Int(50, 200))  # enough for this, and quick
    monkeypatch.setitem(FAMILIES["mlp"].default, "max_steps", 50)
    frame, signal = mixed
    y = np.where(signal > np.median(signal), "high", "low")
    settings = {"seconds": None, "trials": 1, "families": [family], "random_state": 0}
    classifier = mf.AutoClassifier(**settings).fit(frame[:120], y[:120])
    assert log_loss(y[120:], classifier.predict_proba(frame[120:])) < 0.8 * np.log(2)
    assert set(classifier.predict(frame)) == {"high", "low"}
    regressor = mf.AutoRegressor(**settings).fit(frame[:120], signal[:120])
    assert regressor.score(frame[120:], signal[120:]) > 0.3
    assert [row["state"] for row in classifier.leaderboard_ + regressor.leaderboard_] == ["complete"] * 2


def test_the_best_equals_its_row_built_by_hand():
    X, y = WINE
    auto = mf.AutoClassifier(seconds=None, trials=2, families=["boosting"], ensemble=1, random_state=0).fit(
        X, y
    )
    best = auto.leaderboard_[0]
    params = {k.removeprefix("boosting."): v for k, v in best["config"].items() if k != "family"}
    seed = np.random.RandomState(0).randint(2**31 - 1)
    by_hand = HistGradientBoostingClassifier(early_stopping=False, random_state=seed, **params)
    np.testing.assert_array_equal(auto.predict_proba(X), clone(by_hand).fit(X, y).predict_proba(X))
    losses = [
        log_loss(y[valid], clone(by_hand).fit(X[train], y[train]).predict_proba(X[valid]))
        for train, valid in folds_of(y, seed)
    ]
    assert best["fold_losses"] == pytest.approx(losses)
    assert best["loss"] == pytest.approx(np.mean(losses))


def test_a_scaled_regression_equals_its_row_built_by_hand():
    X, y = load_diabetes(return_X_y=True)
    auto = mf.AutoRegressor(seconds=None, trials=1, families=["linear"], random_state=0).fit(X, y)
    table = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    by_hand = make_pipeline(table, TransformedTargetRegressor(Ridge(1.0), transformer=StandardScaler()))
    np.testing.assert_allclose(auto.predict(X), by_hand.fit(X, y).predict(X), rtol=1e-12)  # float64
    assert auto.best_params_ == {"family": "linear", "linear.strength": 1.0, "linear.scaling": "standard"}


def test_the_ensemble_predicts_the_weighted_mean_of_its_members():
    X, y = make_friedman1(200, noise=1.0, random_state=1)
    families = ["tree", "forest", "knn", "linear"]
    auto = mf.AutoRegressor(seconds=None, trials=4, families=families, random_state=0).fit(X, y)
    members = [row for row in auto.leaderboard_ if row["weight"]]
    assert len(auto.members_) == len(members) > 1
    assert len({weight for weight, _ in auto.members_}) > 1
    assert auto.members_[0][1] is auto.best_estimator_
    assert sorted(weight for weight, _ in auto.members_) == sorted(row["weight"] for row in members)
    total = sum(weight * model.predict(X) for weight, model in auto.members_)
    expected = total / sum(weight for weight, _ in auto.members_)
    np.testing.assert_allclose(auto.predict(X), expected, rtol=1e-12)  # float64
    alone = clone(auto).set_params(ensemble=1).fit(X, y)
    np.testing.assert_array_equal(alone.predict(X), auto.best_estimator_.predict(X))


@pytest.mark.parametrize("engine", ["tpe", "smac", "random"])
def test_equal_seeds_and_trials_give_equal_searches(engine):
    def search(seed):
        auto = mf.AutoClassifier(seconds=None, trials=5, families=["linear", "tree"], engine=engine,
                                 random_state=seed).fit(*WINE)  # fmt: skip
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in auto.leaderboard_]
        return rows, auto.predict_proba(WINE[0])

    (rows, predicted), (again, predicted_again), (other, _) = search(0), search(0), search(1)
    assert rows == again
    np.testing.assert_array_equal(predicted, predicted_again)
    assert rows != other


@pytest.fixture(scope="module")
def searched():
    families = ["tree", "knn", "linear"]
    return mf.AutoClassifier(seconds=None, trials=15, families=families, random_state=0).fit(*WINE)


def test_defaults_come_first_in_the_order_of_the_table_and_the_leaderboard_is_sorted(searched):
    by_number = sorted(searched.leaderboard_, key=lambda row: row["number"])
    assert [row["config"] for row in by_number[:3]] == [default_of(f) for f in searched.families]
    order = ["complete", "behind", "skipped", "failed"]
    keys = [(order.index(row["state"]), row["loss"]) for row in searched.leaderboard_]
    assert keys == sorted(keys)
    assert {row["state"] for row in searched.leaderboard_} >= {"complete", "behind"}


def test_a_configuration_that_falls_behind_is_given_up_and_its_loss_estimated(searched):
    behind = [row for row in searched.leaderboard_ if row["state"] == "behind"]
    assert behind
    assert all(1 <= len(row["fold_losses"]) < 5 for row in behind)
    for row in behind:
        complete = [
            r for r in searched.leaderboard_ if r["state"] == "complete" and r["number"] < row["number"]
        ]
        best = min(complete, key=lambda r: r["loss"])
        n = len(row["fold_losses"])
        difference = np.mean(np.subtract(row["fold_losses"], best["fold_losses"][:n]))
        assert row["loss"] == pytest.approx(best["loss"] + difference)
        assert difference > 0


def test_a_score_of_scikit_learn_is_what_the_search_makes_large():
    X, y = load_breast_cancer(return_X_y=True)
    auto = mf.AutoClassifier(trials=1, scoring="roc_auc", **CHEAP).fit(X, y)
    seed = np.random.RandomState(0).randint(2**31 - 1)
    scores = [
        get_scorer("roc_auc")(clone(auto.best_estimator_).fit(X[train], y[train]), X[valid], y[valid])
        for train, valid in folds_of(y, seed)
    ]
    assert auto.leaderboard_[0]["loss"] == pytest.approx(-np.mean(scores))


def test_a_slow_family_gets_half_of_the_time_left_and_the_search_goes_on(monkeypatch):
    monkeypatch.setitem(FAMILIES, "slow", fake(Spoilt(lambda X: time.sleep(100)), needs_scale=True))
    auto = mf.AutoClassifier(seconds=6, trials=3, families=["tree", "slow", "linear"], random_state=0).fit(
        *WINE
    )
    rows = {row["family"]: row for row in auto.leaderboard_}
    assert rows["slow"]["state"] == "skipped"
    assert "not done within" in rows["slow"]["message"]
    assert rows["slow"]["seconds"] < 3.3
    assert "linear" in rows
    assert auto.best_params_["family"] in ("linear", "tree")


def test_a_trial_whose_folds_would_take_too_long_ends_after_the_first(monkeypatch):
    monkeypatch.setitem(FAMILIES, "slow", fake(Spoilt(lambda X: time.sleep(1.0)), needs_scale=True))
    options = {"seconds": 6, "trials": 3, "families": ["tree", "slow", "linear"], "random_state": 0}
    slow = next(r for r in mf.AutoClassifier(**options).fit(*WINE).leaderboard_ if r["family"] == "slow")
    assert slow["state"] == "skipped"
    assert slow["message"].startswith("4 more folds would take about")
    assert len(slow["fold_losses"]) == 1
    assert slow["seconds"] < 2


def test_a_family_that_was_too_slow_before_is_skipped_without_a_fit():
    problem = Problem(None, np.arange(8), None, [], [(np.arange(4), np.arange(4, 8))], None, 0, 1)
    judge = Judge(problem, deadline=10.0, clock=lambda: 8.0)
    judge._fold_seconds = {"tree": [0.1], "svm": [5.0]}
    judge.best = Row(0, default_of("tree"), loss=1.0, fold_losses=[1.0], fit_seconds=0.1)
    judge(SimpleNamespace(params=default_of("svm")))
    assert judge.rows[0].state == "skipped"
    assert judge.rows[0].message.startswith("a fold would take about 5 s, but only")


def test_a_learner_that_fails_is_a_row_with_its_message(monkeypatch):
    def fail(X):
        raise ValueError("not today")

    monkeypatch.setitem(FAMILIES, "fails", fake(Spoilt(fail), needs_scale=True))
    auto = mf.AutoClassifier(seconds=None, trials=4, families=["fails", "linear"], random_state=0).fit(*WINE)
    assert auto.leaderboard_[-1]["message"] == "ValueError: not today"
    assert auto.leaderboard_[-1]["loss"] == np.inf
    with pytest.raises(SearchError, match="none did; the last: ValueError: not today"):
        mf.AutoClassifier(seconds=None, trials=2, families=["fails"]).fit(*WINE)


@pytest.mark.parametrize("rare", [8, 2, 1])
@pytest.mark.parametrize("scoring", ["neg_log_loss", "roc_auc_ovr", "neg_brier_score", None])
def test_a_score_that_needs_all_classes_finds_a_model_where_folds_lack_one(rare, scoring):
    X = np.random.default_rng(0).normal(size=(600, 3))
    y = np.r_[np.full(300, "a"), np.full(300 - rare, "b"), np.full(rare, "c")]
    X[:, 0] += y == "b"
    auto = mf.AutoClassifier(
        seconds=10, trials=3, families=["linear", "knn", "svm"], scoring=scoring, random_state=0
    )
    auto.fit(X, y)
    assert [row["state"] for row in auto.leaderboard_] == ["complete"] * 3
    assert auto.predict_proba(X).shape == (600, 3)
    assert auto.score(X, y) > 0.6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seconds": None}, "one of seconds and trials must be given"),
        ({"families": ["svn"]}, "a family must be one of linear, tree, .*; got 'svn'"),
        ({"families": []}, "families must name at least one of linear"),
        ({"engine": "smack"}, "engine must be one of .*smac.*; got 'smack'"),
        ({"ensemble": 0}, "ensemble >= 1 must hold"),
        ({"seconds": 0}, "seconds > 0 must hold"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        mf.AutoClassifier(**changes).fit(*WINE)


def test_targets_and_tables_that_do_not_fit_are_refused(mixed):
    frame, signal = mixed
    with pytest.raises(TypeError, match="y must hold numbers for AutoRegressor, but its first value is"):
        mf.AutoRegressor(trials=1, **CHEAP).fit(frame, ["a", "b"] * 80)
    with pytest.raises(ValueError, match="at least two classes, but got one class, a"):
        mf.AutoClassifier(trials=1, **CHEAP).fit(frame, ["a"] * 160)
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        mf.AutoClassifier(trials=1, **CHEAP).fit(frame, signal)
    with pytest.raises(ValueError, match="columns must be numbers or categories, but 'day' is datetime64"):
        mf.AutoRegressor(trials=1, **CHEAP).fit(frame.assign(day=pd.Timestamp("2026-01-01")), signal)
    with pytest.raises(ValueError, match="contains infinity"):
        mf.AutoRegressor(trials=1, **CHEAP).fit(frame.assign(number=np.inf), signal)
    auto = mf.AutoRegressor(trials=1, **CHEAP).fit(frame, signal)
    with pytest.raises(TypeError, match="X must be a pandas frame"):
        auto.predict(frame.to_numpy())


def test_pandas_own_types_and_their_gaps_are_read():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "whole": pd.array(rng.integers(0, 9, 60), dtype="Int64"),
            "yes": rng.random(60) < 0.5,
            "text": pd.array(rng.choice(["u", "v"], 60), dtype="string"),
        }
    )
    y = pd.Series(np.where(frame["whole"] > 4, "many", "few"))
    frame.loc[3, "whole"], frame.loc[5, "text"] = pd.NA, pd.NA
    for families in (["linear"], ["boosting"]):
        auto = mf.AutoClassifier(seconds=None, trials=1, families=families, random_state=0).fit(frame, y)
        assert auto.score(frame, y) > 0.95
        assert auto.feature_names_in_.tolist() == ["whole", "yes", "text"]
