"""Ray Tune on a cluster of this process, and through the command on one that was there before."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from midflight import search
from midflight.search.problems import problem

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning"
    ),  # Ray leaves log files and sockets to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

BIN = Path(sys.executable).parent
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}


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


def test_workers_have_the_priority_of_any_process(cluster):
    import ray

    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)


def test_asha_on_ray_ends_most_trials_early_and_the_ledger_holds_them_all(cluster, objective_file, tmp_path):
    what = problem(f"{objective_file}:objective")
    options = {"engine": "ray", "epochs": 4, "workers": 2, "storage": str(tmp_path / "s.sqlite")}
    told, lock = set(), threading.RLock()

    def tell(record):  # as the live table does, it holds a lock, which cannot be pickled
        with lock:
            told.add(record.number)

    found = search.run(what.objective, what.space, trials=8, callbacks=[tell], **options)
    assert told == set(range(8))
    assert [r.number for r in found.records] == list(range(8))
    assert {r.state for r in found.records} == {"complete", "pruned"}
    for r in found.records:
        assert (r.state == "complete") == (r.epoch == 4)
        assert list(r.losses) == list(range(1, r.epoch + 1))
        assert [epoch for epoch, _ in r.trajectory] == list(r.losses)
    assert found.load() == 4
    more = search.run(what.objective, what.space, trials=9, **{**options, "workers": 1})
    assert [r.losses for r in more.records[:8]] == [r.losses for r in found.records]
    assert len(more.records) == 9


@pytest.mark.slow
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
        search.run(what.objective, what.space, engine="ray", trials=5, epochs=2, workers=1)


@pytest.fixture
def port():
    """Where a cluster that asks for a token listens."""
    pytest.importorskip("ray")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--head", "--block", "--port", str(port), "--num-cpus", "2", "--include-dashboard", "false"]
    head = subprocess.Popen(
        [BIN / "ray", "start", *options], env={**os.environ, **TOKEN},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 300
    while time.monotonic() < until and head.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    yield port
    os.killpg(head.pid, signal.SIGKILL)  # told to end, it would wait for a minute
    head.wait()


@pytest.mark.slow
def test_the_command_runs_on_a_given_cluster_and_says_what_one_with_a_token_wants(port, tmp_path):
    address = ["--engine", "ray", "--address", f"127.0.0.1:{port}", "--workers", "2"]
    size = ["--data", "digits", "--trials", "3", "--epochs", "2", "--out", str(tmp_path)]
    command = [BIN / "midflight", "search", "mlp", *address, *size]
    settings = {k: v for k, v in os.environ.items() if k not in TOKEN}

    def run(**extra):
        return subprocess.run(
            command, env={**settings, **extra}, cwd=tmp_path, capture_output=True, text=True, timeout=600
        )

    refused = run(RAY_NUM_REDIS_GET_RETRIES="2")
    assert refused.returncode == 2
    assert "RAY_AUTH_MODE=token" in refused.stderr.splitlines()[-1]
    found = run(**TOKEN)
    assert found.returncode == 0, found.stderr
    assert "3 trials" in found.stdout
