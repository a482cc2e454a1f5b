"""An objective that leaves a trace of every epoch it trains, in a file that worker processes import."""

import re

import pytest

OBJECTIVE = """
import math, os, pathlib, time
import midflight as mf
from midflight import search

space = search.Space(
    layers=mf.Int(1, 4), optimizer=mf.Categorical(["adam", "sgd"]), lr=mf.Float(1e-4, 1e-1, log=True),
    momentum=mf.Float(0.0, 0.9, when={"optimizer": "sgd"}), decay=mf.Float(1e-6, 1e-2, log=True, online=True),
)
NAP, TRACE = 0.0, pathlib.Path(__file__).with_name("trace")

def objective(trial):
    done = trial.load() or 0
    tuned = trial.online()
    for epoch in range(done + 1, trial.epochs + 1):
        time.sleep(NAP)
        with TRACE.open("a") as file:
            file.write(f"{trial.number} {epoch}\\n")
        p = trial.params
        loss = abs(p["layers"] - 2) + abs(math.log10(p["lr"]) + 2) + p.get("momentum", 0.0) + 1 / epoch
        trial.report(epoch, loss, state=epoch, space=tuned, pid=os.getpid())

def breaks(trial):
    raise KeyError("no such layer")

def kills_itself(trial):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def objective_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OBJECTIVE)
    return path


@pytest.fixture
def slowed(objective_file):
    """Makes each epoch take some seconds more, in processes that import the file from now on."""

    def slow(seconds):
        objective_file.write_text(re.sub(r"NAP, TRACE = [\d.]+", f"NAP, TRACE = {seconds}", OBJECTIVE))

    return slow


@pytest.fixture
def trace(tmp_path):
    """A function that reads which epochs were trained: a list of (trial, epoch)."""
    path = tmp_path / "trace"

    def read():
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(map(int, line.split())) for line in lines]

    return read
