"""The time limit, Ctrl-C at any moment, and what a search must leave alone."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from sklearn.datasets import load_wine
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

import midflight as mf
from midflight.automl import FAMILIES, Family
from midflight.automl.worker import CallFailed, OutOfTime, limited

WINE = load_wine(return_X_y=True)


def deaf(seconds=100):
    """Stay in compiled code that holds the GIL and hears no signal handler."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        sum(range(10**8))


def learner_that(do):
    class Doing(LogisticRegression):
        def fit(self, X, y):
            do()
            return super().fit(X, y)

    return Family(
        {"a": mf.Float(0.0, 1.0)}, {"a": 0.5}, *(lambda params, seed: Doing(),) * 2, needs_scale=True
    )


def test_a_call_that_hears_nothing_ends_at_its_limit():
    began = time.monotonic()
    with pytest.raises(OutOfTime, match=r"not done within 0.3 s"):
        limited(0.3, deaf)
    assert time.monotonic() - began < 3  # about 0.35 on a quiet machine; deaf takes 100
    with pytest.raises(OutOfTime, match="no time is left"):
        limited(0, deaf)


def test_a_call_returns_its_value_and_says_how_it_failed():
    assert limited(100, lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]
    with pytest.raises(CallFailed, match="ZeroDivisionError: division by zero"):
        limited(100, lambda: 1 / 0)
    with pytest.raises(CallFailed, match="may have run out of memory"):
        limited(100, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(CallFailed, match="TypeError: cannot pickle"):
        limited(100, lambda: threading.Lock())


def test_a_call_that_cannot_run_in_a_fork_runs_here():
    here = os.getpid()

    def only_here():
        if os.getpid() != here:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        return "here"

    assert limited(100, only_here) == "here"


def test_a_child_may_use_threads_and_gradients_that_its_parent_has_used():
    x, y = np.random.default_rng(0).normal(size=(3000, 5)), np.arange(3000) % 2
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def work():
        torch.ones(10**6, requires_grad=True).exp().sum().backward()
        return HistGradientBoostingClassifier(max_iter=3).fit(x, y).score(x, y)

    try:
        assert limited(30, work) == work() == limited(30, work)
    finally:
        torch.set_num_threads(before)


def children():
    """The processes of this process, dead ones that nobody waited for included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(stat.parent.name)
    return found


def test_no_child_is_left():
    before = children()  # other tests start servers of forks, which stay
    limited(100, int)
    with pytest.raises(CallFailed):
        limited(100, lambda: 1 / 0)
    with pytest.raises(OutOfTime):
        limited(0.2, deaf)
    assert children() <= before


def test_a_child_ends_soon_after_a_parent_that_was_killed(tmp_path):
    script = """
        import os, sys, time
        from midflight.automl.worker import limited
        def work():
            print(os.getpid(), flush=True)
            sum(range(10**11))
        limited(1, work)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 30  # it ends after 2
    while os.path.exists(f"/proc/{child}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}")


@pytest.mark.parametrize("main", [True, False], ids=["main thread", "another thread"])
def test_a_search_keeps_its_time_beside_a_learner_that_hears_nothing(monkeypatch, main):
    monkeypatch.setitem(FAMILIES, "deaf", learner_that(deaf))
    auto = mf.AutoClassifier(seconds=4, families=["tree", "deaf"], random_state=0)
    began = time.monotonic()
    if main:
        auto.fit(*WINE)
    else:
        thread = threading.Thread(target=auto.fit, args=WINE)
        thread.start()
        thread.join()
    assert time.monotonic() - began < 4.4
    assert auto.score(*WINE) > 0.8
    states = {(row["family"], row["state"]) for row in auto.leaderboard_}
    assert ("deaf", "skipped") in states
    assert ("deaf", "complete") not in states


def test_a_search_in_which_nothing_is_ready_in_time_returns_neighbours_and_says_so(monkeypatch):
    monkeypatch.setitem(FAMILIES, "deaf", learner_that(deaf))
    for estimator, least in ((mf.AutoClassifier, 0.9), (mf.AutoRegressor, 0.8)):
        auto = estimator(seconds=0.5, families=["deaf"], random_state=0)
        with pytest.warns(UserWarning, match=r"no configuration was validated within seconds=0.5"):
            auto.fit(*WINE)
        assert auto.score(*WINE) > least
        assert auto.best_params_ == {}


def test_a_final_fit_that_takes_too_long_leaves_the_model_of_a_fold(monkeypatch):
    n = len(WINE[1])

    class SlowOnAll(LogisticRegression):
        def fit(self, X, y):
            if len(X) == n:
                deaf()
            return super().fit(X, y)

    family = Family(
        {"a": mf.Float(0.0, 1.0)}, {"a": 0.5}, *(lambda params, seed: SlowOnAll(),) * 2, needs_scale=True
    )
    monkeypatch.setitem(FAMILIES, "slow", family)
    began = time.monotonic()
    auto = mf.AutoClassifier(seconds=6, trials=1, families=["slow"], random_state=0).fit(*WINE)
    assert time.monotonic() - began < 6.6
    assert auto.score(*WINE) > 0.9
    assert auto.best_params_["family"] == "slow"


def to_parent():
    """Press Ctrl-C in the process that waits for this learner."""
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(100)


@pytest.mark.parametrize("ensemble", [1, 8])
def test_ctrl_c_leaves_the_best_so_far(monkeypatch, ensemble):
    monkeypatch.setitem(FAMILIES, "interrupted", learner_that(to_parent))
    auto = mf.AutoClassifier(families=["tree", "linear", "interrupted"], ensemble=ensemble, random_state=0)
    with pytest.warns(UserWarning, match="interrupted after 2 configurations"):
        auto.fit(*WINE)
    assert auto.score(*WINE) > 0.95
    assert auto.best_params_["family"] == "linear"
    assert [weight for weight, _ in auto.members_] == [1]
    assert [row["weight"] for row in auto.leaderboard_] == [1, 0]


def test_ctrl_c_before_there_is_a_model_is_ctrl_c(monkeypatch):
    monkeypatch.setitem(FAMILIES, "interrupted", learner_that(to_parent))
    auto = mf.AutoClassifier(families=["interrupted"], random_state=0)
    with pytest.raises(KeyboardInterrupt, match="fit was interrupted before a configuration was trained"):
        auto.fit(*WINE)
    with pytest.raises(ValueError, match="not fitted"):
        auto.predict(WINE[0])


@pytest.mark.parametrize("seconds", [None, 60])
def test_ctrl_c_at_any_moment_leaves_a_model_or_says_that_there_is_none(seconds):
    rng = random.Random(0)
    for _ in range(6):
        auto = mf.AutoClassifier(seconds=seconds, trials=6, families=["tree", "linear"], random_state=0)
        timer = threading.Timer(rng.uniform(0.0, 0.5), os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                auto.fit(*WINE)
                fitted = True
                timer.cancel()
                timer.join()
        except KeyboardInterrupt:
            fitted = hasattr(auto, "members_")
        if fitted:
            assert auto.score(*WINE) > 0.8
        else:
            with pytest.raises(ValueError, match="not fitted"):
                auto.predict(WINE[0])


def state():
    """What a search must leave alone."""
    return {
        "numpy": str(np.random.get_state()),
        "random": random.getstate(),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "filters": list(warnings.filters),
        "environment": dict(os.environ),
        "errors": np.geterr(),
        "sklearn": sklearn.get_config(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGALRM)],
    }


@pytest.mark.parametrize("engine", ["tpe", "smac", "random"])
def test_a_search_leaves_the_state_of_its_caller_alone(monkeypatch, engine):
    monkeypatch.setitem(FAMILIES["mlp"].space, "max_steps", mf.Int(50, 200))
    monkeypatch.setitem(FAMILIES["mlp"].default, "max_steps", 60)
    torch.optim.Adam([torch.zeros(1)])  # torch's first optimiser sets an environment variable of its own
    for seconds in (None, 60):
        before = state()
        auto = mf.AutoClassifier(
            seconds=seconds, trials=3, families=["mlp", "forest"], engine=engine, n_jobs=2, random_state=0
        )
        auto.fit(*WINE).predict(WINE[0])
        assert state() == before


def test_equal_seeds_give_equal_bits_here_in_a_child_and_whatever_the_caller_has_set(monkeypatch):
    monkeypatch.setitem(FAMILIES["mlp"].space, "max_steps", mf.Int(50, 200))
    monkeypatch.setitem(FAMILIES["mlp"].default, "max_steps", 60)

    def fit(seconds):
        families = ["linear", "mlp", "tree"]
        auto = mf.AutoClassifier(seconds=seconds, trials=3, families=families, random_state=0)
        auto.fit(WINE[0][::3], WINE[1][::3])
        rows = [(r["family"], r["state"], r["fold_losses"], r["message"]) for r in auto.leaderboard_]
        return str(rows), auto.predict_proba(WINE[0])

    def same(seconds):
        rows, predicted = fit(seconds)
        assert rows == expected[0]
        np.testing.assert_array_equal(predicted, expected[1])

    expected = fit(None)
    same(600)
    np.random.seed(5)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    try:
        changed = sklearn.config_context(transform_output="pandas", assume_finite=True)
        with changed, torch.no_grad(), np.errstate(all="raise"):
            same(None)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
