"""Run a search: an engine proposes configurations, and each trial trains one and tunes during training.

One process talks to the engine. Trials run in this process or in workers.
"""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from midflight._reporting.machine import machine
from midflight.search import checkpoint
from midflight.search.engine import Engine, Task
from midflight.search.engines import build
from midflight.search.errors import Interrupted, SearchError
from midflight.search.jobs import Callback, Result, Search
from midflight.search.ledger import Declaration, default_folder, open_study
from midflight.search.space import Config, Space
from midflight.search.trial import Objective, run_job


def run(
    objective: Objective,
    space: Space,
    *,
    engine: str = "bohb",
    trials: int | None = None,
    seconds: float | None = None,
    epochs: int = 27,
    workers: int = 1,
    storage: str | None = None,
    name: str = "search",
    seed: int = 0,
    folder: Path | None = None,
    warm_start: bool = True,
    first: Sequence[Config] = (),
    callbacks: Sequence[Callback] = (),
    label: str = "",
    **options: Any,
) -> Result:
    """Search `space` for the lowest validation loss; tune its online hyperparameters during each trial.

    Args:
        objective: trains a `Trial` and reports its validation loss.
        space: searched hyperparameters and hyperparameters tuned online.
        engine: name of the engine:
            "random": random search;
            "tpe": tree-structured Parzen estimator;
            "bohb": TPE with Hyperband;
            "smac": SMAC3's random forest with Hyperband;
            "ray": Ray Tune, on several machines.
        trials: number of trials in the study, including earlier calls. A configuration that SMAC promotes
            counts again. Each process that shares the study may exceed the number by one.
        seconds: duration of this call. The next call continues interrupted trials.
        epochs: epochs of a full training. Hyperband compares trials after 1, 3, 9, ... epochs.
        workers: number of parallel trials, one process each; 1 runs them in this process.
        storage: storage of the study, see `open_storage`; None: memory. A stored study of the same `name` is
            resumed.
        seed: seed of the engine and of every trial.
        folder: folder of the checkpoints; default: beside the storage, or temporary. Machines that share it
            continue each other's trials.
        warm_start: whether tuned hyperparameters start at the final values of the nearest good trial.
        first: configurations to try before the engine proposes any; unsupported for "smac" with epochs > 1.
        callbacks: called with the `Record` of a trial when it starts, reports or ends.
        label: name of the objective; a study cannot be resumed with another name.
        options: options of the engine; "ray" has `address` and `scheduler`.

    Raises:
        SearchError: an argument is invalid, the storage cannot be reached, or it holds another search.
        MissingExtra: a package of the engine is not installed.
        ObjectiveFailed: the first trials all failed.
        StorageLost: the storage failed during the search.
        Interrupted: Ctrl-C was pressed; `result` holds the trials so far. A `KeyboardInterrupt`.
    """
    _check(space, trials, seconds, epochs, workers)
    built = build(engine, Task(space, epochs, trials, seed), options)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    temporary = folder is None and storage is None
    if temporary:
        folder = Path(tempfile.mkdtemp())
    elif folder is None:
        folder = default_folder(storage, name) / "checkpoints"
    declaration = Declaration(space, epochs, seed, label, machine())
    with open_study(storage, name, declaration, folder, sampler=built.sampler, pruner=built.pruner) as ledger:
        if temporary:
            weakref.finalize(ledger, shutil.rmtree, folder, ignore_errors=True)
        search = Search(ledger, space, built, epochs, trials, seconds, seed, warm_start, first, callbacks)
        try:
            with ledger.heartbeats():
                search.take_over()
                _run_all(search, built, objective, workers)
        except KeyboardInterrupt:
            raise Interrupted(search.result()) from None
        return search.result()


def _check(space: Space, trials: int | None, seconds: float | None, epochs: int, workers: int) -> None:
    if trials is None and seconds is None:
        raise SearchError("one of seconds and trials must be given, because the search would never end.")
    for argument, value in (
        ("trials", trials),
        ("seconds", seconds),
        ("epochs", epochs),
        ("workers", workers),
    ):
        if value is not None and value <= 0:
            raise SearchError(f"{argument} > 0 must hold, but {argument}={value}.")
    if not space.searched:
        raise SearchError(
            "a search needs a hyperparameter that is not online, but the whole space is; use midflight.Tuner."
        )


def _run_all(search: Search, engine: Engine, objective: Objective, workers: int) -> None:
    if engine.drive is not None:
        engine.drive(search, objective, workers)
    elif workers == 1:
        _run_here(search, objective)
    else:
        from midflight.search.workers import run_in_workers

        run_in_workers(search, objective, workers)


def _run_here(search: Search, objective: Objective) -> None:
    before = checkpoint.random_state()
    try:
        while (job := search.next_job()) is not None:
            search.on_end(job.number, run_job(job, objective, partial(search.on_report, job.number)))
    finally:
        checkpoint.set_random_state(before)
