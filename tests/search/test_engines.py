"""Each engine, by one table of what must hold for all of them."""

import math
from functools import cache

import pytest

import midflight as mf
from midflight import search
from midflight.search.engines import ENGINES

IN_PROCESS = [name for name in ENGINES if name != "ray"]
SPACE = search.Space(
    layers=mf.Int(1, 4),
    width=mf.Int(8, 128, log=True),
    optimizer=mf.Categorical(["adam", "sgd"]),
    lr=mf.Float(1e-4, 1e-1, log=True),
    momentum=mf.Float(0.0, 0.9, when={"optimizer": "sgd"}),
    decay=mf.Float(1e-6, 1e-2, log=True, online=True),
    noise=mf.Float(0.0, 1.0, init=0.5, online=True, when={"layers": (3, 4)}),
)


def loss_of(params, epoch):
    """Least, with 1 / epoch on top, for two layers, adam and a learning rate of 0.01."""
    return (
        abs(params["layers"] - 2)
        + (params["optimizer"] == "sgd")
        + abs(math.log10(params["lr"]) + 2)
        + 1 / epoch
    )


def objective(trial):
    done = trial.load() or 0
    tuned = trial.online()
    for epoch in range(done + 1, trial.epochs + 1):
        tuned["decay"].set(1e-3)
        trial.report(epoch, loss_of(trial.params, epoch), state=epoch, space=tuned, test_error=0.5)


@cache
def found_by(engine):
    return search.run(objective, SPACE, engine=engine, trials=30, epochs=9, seed=1)


@pytest.fixture(params=IN_PROCESS)
def found(request):
    return found_by(request.param)


def test_an_engine_runs_exactly_the_trials_it_was_given(found):
    assert [r.number for r in found.records] == list(range(30))
    assert {r.state for r in found.records} <= {"complete", "pruned"}


def test_an_engine_proposes_active_hyperparameters_within_their_bounds(found):
    for r in found.records:
        assert {*r.config, *r.starts} == set(SPACE.active(r.config))
        assert set(r.starts) == {"decay", *(["noise"] if r.config["layers"] > 2 else [])}
        assert r.config["layers"] in (1, 2, 3, 4)
        assert isinstance(r.config["width"], int)
        assert 8 <= r.config["width"] <= 128
        assert 1e-4 <= r.config["lr"] <= 1e-1


def test_an_engine_hears_every_epoch_and_a_complete_trial_has_them_all(found):
    for r in found.records:
        assert list(r.losses) == list(range(1, r.epoch + 1))
        assert (r.state == "complete") == (r.epoch == 9)
        for epoch, loss in r.losses.items():
            assert loss == pytest.approx(loss_of(r.config, epoch))
        assert [epoch for epoch, _ in r.trajectory] == list(r.losses)
        assert r.extra == {"test_error": 0.5}


def test_an_engine_finds_better_than_the_middle_of_its_first_ten(found):
    first = sorted(loss_of(r.config, 9) for r in found.records[:10])
    assert found.best.loss <= first[4]
    assert found.best.loss == min(r.loss for r in found.records if r.state == "complete")
    assert found.load() == 9


@pytest.mark.parametrize("engine", IN_PROCESS)
def test_an_engine_repeats_itself_with_the_same_seed(engine):
    runs = [search.run(objective, SPACE, engine=engine, trials=12, epochs=9, seed=3) for _ in range(2)]
    assert [r.config for r in runs[0].records] == [r.config for r in runs[1].records]


@pytest.mark.parametrize(
    ("engine", "stops"), [("random", False), ("tpe", False), ("bohb", True), ("smac", True)]
)
def test_an_engine_with_fidelity_stops_most_trials_early(engine, stops):
    records = found_by(engine).records
    early = sum(r.epoch < 9 for r in records)
    assert (early > 10) if stops else early == 0
    spent = sum(r.epoch - r.from_epoch for r in records)
    assert (spent < 0.7 * 30 * 9) if stops else spent == 30 * 9


def test_a_promoted_trial_starts_where_its_configuration_first_started():
    records = found_by("smac").records
    promoted = [r for r in records if r.root != r.number]
    assert any(r.starts["decay"] == pytest.approx(1e-3) for r in promoted)  # a warm one
    for r in promoted:
        first = records[r.root]
        assert (r.config, r.starts) == (first.config, first.starts)
        assert r.from_epoch >= first.epoch
        assert {epoch: r.losses[epoch] for epoch in first.losses} == first.losses
