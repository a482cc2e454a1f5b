"""The parts of the search, each against what it must do."""

import itertools

import numpy as np
import pytest
from smac import HyperparameterOptimizationFacade

import midflight as mf
from midflight.automl.ensemble import greedy, helps
from midflight.automl.validation import folds_of, log_loss, loss_of, squared_error
from midflight.search import Space, run


def test_few_rows_make_five_stratified_folds_that_hold_each_row_once():
    y = np.repeat([0, 1], [400, 100])
    folds = folds_of(y, seed=0)
    assert sorted(np.concatenate([valid for _, valid in folds])) == list(range(500))
    for train, valid in folds:
        assert sorted([*train, *valid]) == list(range(500))
        assert np.bincount(y[valid]).tolist() == [80, 20]


@pytest.mark.parametrize(
    ("n", "seconds", "trains", "validates"),
    [
        (4999, np.inf, None, None),
        (5000, np.inf, 4000, 1000),
        (999, 20.0, None, None),
        (1000, 20.0, 800, 200),
        (20_000, 20.0, 4000, 4000),
        (400, 1.0, None, None),
        (100_000, 60.0, 12_000, 10_000),
    ],
)
def test_many_rows_for_the_time_are_held_out_once_and_sampled(n, seconds, trains, validates):
    y = np.random.default_rng(0).normal(size=n)
    folds = folds_of(y, 0, seconds)
    if trains is None:
        assert len(folds) == 5
        return
    ((train, valid),) = folds
    assert (len(train), len(valid)) == (trains, validates)
    assert not set(train) & set(valid)
    for part in (train, valid):
        # evenly spread over the sorted target: a random sample would be off by ten times as much
        expected = np.quantile(y, [0.1, 0.5, 0.9])
        np.testing.assert_allclose(np.quantile(y[part], [0.1, 0.5, 0.9]), expected, atol=0.02)


def test_two_models_that_err_on_opposite_sides_are_better_together():
    rng = np.random.default_rng(0)
    y, error = rng.normal(size=100), rng.normal(size=100)
    predictions = [y + error, y - 0.9 * error, y + 2 * error]
    parts = [(np.arange(k, 100, 5), y[k::5]) for k in range(5)]
    chosen = greedy(predictions, parts, squared_error, 2)
    pairs = itertools.combinations_with_replacement(range(3), 2)
    best = min(pairs, key=lambda pair: squared_error(np.mean([predictions[i] for i in pair], axis=0), y))
    assert set(chosen) == set(best) == {0, 1}
    assert chosen[0] == 1  # the best one alone
    assert helps(predictions, parts, squared_error, 2)


def test_copies_of_one_model_do_not_help():
    y = np.random.default_rng(0).normal(size=100)
    predictions = [y + 0.1, y + 0.1]
    parts = [(np.arange(k, 100, 5), y[k::5]) for k in range(5)]
    assert len(greedy(predictions, parts, squared_error, 8)) == 1
    assert not helps(predictions, parts, squared_error, 8)


def test_what_helps_only_where_it_was_chosen_does_not_help():
    y, part = np.zeros(50), np.arange(50) % 5
    # with the first one, candidate k is right on part k, and a little worse than it elsewhere
    predictions = [y + 1, *(np.where(part == k, -1.0, 1.05) for k in range(5))]
    parts = [(np.flatnonzero(part == k), y[part == k]) for k in range(5)]
    assert len(greedy(predictions, parts, squared_error, 8)) > 1
    assert not helps(predictions, parts, squared_error, 8)


def test_losses_equal_those_of_scikit_learn():
    from sklearn import metrics

    rng = np.random.default_rng(0)
    classes, p = np.array(["a", "b", "c"]), rng.dirichlet([1, 1, 1], 30)
    y = rng.choice(classes, 30)
    assert loss_of(None, classes)(p, y) == pytest.approx(metrics.log_loss(y, p))
    assert loss_of("accuracy", classes)(p, y) == -metrics.accuracy_score(y, classes[p.argmax(1)])
    assert loss_of("r2", None)(p[:, 0], p[:, 1]) == pytest.approx(-metrics.r2_score(p[:, 1], p[:, 0]))
    assert np.isfinite(log_loss(np.array([[1.0, 0.0]]), np.array([1])))


def distance(config):
    return abs(config.get("x", config.get("y")) - 0.25)


KINDS = Space(
    kind=mf.Categorical(["a", "b"]),
    x=mf.Float(0.0, 1.0, when={"kind": "a"}),
    y=mf.Float(0.0, 1.0, when={"kind": "b"}),
)
FIRST = [{"kind": "a", "x": 0.25}, {"kind": "b", "y": 0.75}]


@pytest.mark.parametrize("engine", ["tpe", "smac", "random"])
def test_a_search_tries_the_first_configurations_first(engine):
    result = run(lambda trial: distance(trial.params), KINDS, engine=engine, trials=5, epochs=1, first=FIRST)
    assert [record.config for record in result.records[:2]] == FIRST
    assert len(result.records) == 5
    assert (result.best.config, result.best.loss) == (FIRST[0], 0)


def test_smac_is_told_the_loss_of_each_configuration_that_was_tried(monkeypatch):
    told = []
    tell = HyperparameterOptimizationFacade.tell

    def spy(self, info, value, **options):
        told.append((dict(info.config), value.cost))
        return tell(self, info, value, **options)

    monkeypatch.setattr(HyperparameterOptimizationFacade, "tell", spy)
    run(lambda trial: distance(trial.params), KINDS, engine="smac", trials=5, epochs=1, first=FIRST)
    assert len(told) >= 4  # the last one need not be told
    for config, cost in told:
        assert cost == pytest.approx(distance(config))
