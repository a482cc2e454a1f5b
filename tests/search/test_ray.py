"""Ray Tune on a cluster that the test starts, twice: early stopping, and population-based training."""

import os

import pytest

from midflight import search
from midflight.search.problems import problem

pytestmark = [
    pytest.mark.skipif(
        "MIDFLIGHT_TEST_RAY" not in os.environ,
        reason="Ray's processes do not keep up on a busy machine; run it with MIDFLIGHT_TEST_RAY=1",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning"
    ),  # Ray leaves log files and sockets to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster():
    """One for both tests; `search.run` uses a cluster that is there."""
    pytest.importorskip("ray")
    import ray

    import midflight.search.engines.ray  # noqa: F401 - quietens Ray before it starts

    try:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
    except Exception as error:  # no shared memory, no ports: many things may be missing
        pytest.skip(f"Ray cannot start a cluster here: {error}")
    yield
    ray.shutdown()


def test_asha_on_ray_ends_most_trials_early_and_the_ledger_holds_them_all(cluster, objective_file, tmp_path):
    what = problem(f"{objective_file}:objective")
    options = {"engine": "ray", "epochs": 4, "workers": 2, "storage": str(tmp_path / "s.sqlite")}
    found = search.run(what.objective, what.space, trials=8, **options)
    assert [r.number for r in found.records] == list(range(8))
    assert {r.state for r in found.records} == {"complete", "pruned"}
    for r in found.records:
        assert (r.state == "complete") == (r.epoch == 4)
        assert list(r.losses) == list(range(1, r.epoch + 1))
        assert [epoch for epoch, _ in r.trajectory] == list(r.losses)
    assert found.load() == 4
    more = search.run(what.objective, what.space, trials=9, **options)
    assert [r.losses for r in more.records[:8]] == [r.losses for r in found.records]
    assert len(more.records) == 9


def test_population_based_training_clones_what_is_good_and_moves_only_floats(
    cluster, objective_file, tmp_path
):
    what = problem(f"{objective_file}:objective")
    found = search.run(
        what.objective, what.space, engine="ray", scheduler="pbt", trials=4, epochs=10, workers=2, seed=1
    )
    assert [r.state for r in found.records] == ["complete"] * 4
    assert all(r.epoch == 10 for r in found.records)
    original = [t.params for t in found.ledger.study.trials]
    cloned = [r for r in found.records if r.config != original[r.number]]
    assert cloned
    for r in cloned:
        donors = [
            p
            for p in original
            if (p["layers"], p["optimizer"]) == (r.config["layers"], r.config["optimizer"])
        ]
        assert donors
        assert set(r.config) == set(what.space.active(r.config)) - {"decay"}
        assert 1e-4 <= r.config["lr"] <= 1e-1


def test_a_failing_objective_is_told_as_by_every_engine(cluster, objective_file):
    what = problem(f"{objective_file}:breaks")
    with pytest.raises(search.ObjectiveFailed, match="KeyError: 'no such layer'"):
        search.run(what.objective, what.space, engine="ray", trials=5, epochs=2, workers=2)
