"""Ctrl-C and SIGKILL at any moment: the search ends at once; what comes later loses and repeats nothing."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from midflight import search
from midflight.search.jobs import uninterrupted
from midflight.search.problems import problem


def started(objective_file, storage, *more):
    command = [
        sys.executable, "-m", "midflight", "search", f"{objective_file}:objective", "--study", "s",
        "--trials", "8",
        "--storage", str(storage), "--engine", "random", "--epochs", "4", "--workers", "2", "--json", *more,
    ]  # fmt: skip
    with objective_file.with_name("printed").open("a") as file:
        return subprocess.Popen(command, start_new_session=True, stdout=file, stderr=file)


def table(records):
    return {r.number: (r.state, r.config, r.losses) for r in records}


def test_ctrl_c_waits_for_the_end_of_an_open_transaction():
    done = []

    @uninterrupted()
    def block():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait():
    done = []

    @uninterrupted()
    def block():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert not done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_ctrl_c_ends_a_search_with_workers_at_once(seed, objective_file, tmp_path, trace, slowed, group_ends):
    slowed(0.05)
    process = started(objective_file, tmp_path / "s.sqlite", "--trials", "500")
    while len(trace()) < 3 and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 1))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    began = time.monotonic()
    assert process.wait(60) == 130, (tmp_path / "printed").read_text()
    assert time.monotonic() - began < 10  # at once, but for the load of this machine
    assert group_ends(process.pid)
    assert "Traceback" not in (tmp_path / "printed").read_text()


@pytest.mark.parametrize("whole_group", [False, True])
def test_a_killed_search_leaves_no_orphan_and_goes_on_to_equal_rows(
    whole_group, objective_file, tmp_path, trace, slowed, group_ends
):
    slowed(0.2)
    storage = tmp_path / "s.journal"
    for n in range(2):
        before = len(trace())
        process = started(objective_file, storage)
        while len(trace()) < before + 3 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(n).uniform(0, 0.3))
        assert process.poll() is None, (tmp_path / "printed").read_text()
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        assert group_ends(process.pid), "workers outlived their parent by 10 s"
    slowed(0)
    what = problem(f"{objective_file}:objective")
    options = {"engine": "random", "epochs": 4, "trials": 8}
    found = search.run(
        what.objective,
        what.space,
        storage=str(storage),
        name="s",
        label=what.label,
        warm_start=True,
        **options,
    )
    trained = trace()
    whole = search.run(what.objective, what.space, **options)
    rows, undisturbed = table(found.records), table(whole.records)
    assert rows == undisturbed
    assert {r.state for r in found.records} == {"complete"}
    assert set(trained) == {(n, e) for n in range(8) for e in range(1, 5)}
    assert len(trained) <= 8 * 4 + 2 * 2  # an epoch in each of two workers, twice
