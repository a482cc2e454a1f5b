"""Run a search: an engine proposes configurations, and each trial trains one and tunes during training.

One process talks to the engine. Trials run in this process or in workers.
"""

import math
import numbers
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from midflight._reporting.machine import machine
from midflight.search import checkpoint
from midflight.search.engine import Engine, Task
from midflight.search.engines import build
from midflight.search.errors import Interrupted, SearchError
from midflight.search.jobs import Callback, Result, Search
from midflight.search.ledger import Declaration, default_folder, open_study
from midflight.search.space import Config, Space
from midflight.search.trial import Objective, run_job

SEEDS = 2**32  # numpy's and SMAC's seeds are smaller


def run(
    objective: Objective,
    space: Space,
    *,
    engine: str = "bohb",
    trials: int | None = None,
    seconds: float | None = None,
    epochs: int = 27,
    workers: int = 1,
    storage: str | os.PathLike[str] | None = None,
    name: str = "search",
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
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
        seed: seed of the engine and of every trial, from 0.
        folder: folder of the checkpoints; default: beside the storage, or temporary. Machines that share it
            continue each other's trials.
        warm_start: whether tuned hyperparameters start at the final values of the nearest good trial.
        first: configurations to try once before the engine proposes any. The engine chooses what a
            configuration leaves out; for "smac" it must be whole.
        callbacks: called with the `Record` of a trial when it starts, reports or ends.
        label: name of the objective; a study cannot be resumed with another name.
        options: options of the engine; "ray" has `address` and `scheduler`.

    Raises:
        SearchError: an argument is invalid, the storage cannot be reached, or it holds another search.
        SpaceError: a configuration in `first` is not possible.
        MissingExtra: a package of the engine is not installed.
        ObjectiveFailed: the first trials all failed.
        StorageLost: the storage or the disk of the checkpoints failed during the search.
        Interrupted: Ctrl-C was pressed; `result` holds the trials so far. A `KeyboardInterrupt`.
    """
    _check(objective, space, name, label, callbacks)
    if trials is None and seconds is None:
        raise SearchError("one of seconds and trials must be given, because the search would never end.")
    trials = None if trials is None else _whole("trials", trials)
    epochs, workers, seed = _whole("epochs", epochs), _whole("workers", workers), _whole("seed", seed, 0)
    seconds = None if seconds is None else _duration(seconds)
    storage = None if storage is None else _path_text("storage", storage)
    task = Task(space, epochs, trials, seed)
    built = build(engine, task, options)
    first = _checked_first(first, space, built)
    if temporary := folder is None and storage is None:
        place = Path(tempfile.mkdtemp())
    elif folder is None:
        place = default_folder(storage, name) / "checkpoints"
    else:
        place = Path(_path_text("folder", folder))
    declaration = Declaration(space, epochs, seed, label, machine())
    with open_study(storage, name, declaration, place, sampler=built.sampler, pruner=built.pruner) as ledger:
        if temporary:
            weakref.finalize(ledger, shutil.rmtree, place, ignore_errors=True)
        search = Search(ledger, built, task, seconds, warm_start, first, callbacks)
        try:
            with ledger.heartbeats():
                _run_all(search, built, objective, workers)
        except KeyboardInterrupt:
            raise Interrupted(search.result()) from None
        return search.result()


def _check(objective: Any, space: Any, name: Any, label: Any, callbacks: Any) -> None:
    """Raise `SearchError` if an argument has another type, or no hyperparameter can be searched."""
    is_file_name = isinstance(name, str) and name == Path(name).name and 0 < len(name.encode()) <= 200
    is_file_name = is_file_name and name != ".."
    are_functions = isinstance(callbacks, list | tuple) and all(map(callable, callbacks))
    for what, holds, value in (
        ("objective must be a function of a trial", callable(objective), objective),
        ("space must be a midflight.search.Space", isinstance(space, Space), space),
        ("name must be a text of up to 200 bytes that can name a folder", is_file_name, name),
        ("label must be a text", isinstance(label, str), label),
        ("callbacks must be a list of functions", are_functions, callbacks),
    ):
        if not holds:
            raise SearchError(f"{what}, but got {value!r}.")
    if not space.searched:
        raise SearchError(
            "a search needs a hyperparameter that is not online, but the whole space is; use midflight.Tuner."
        )


def _whole(name: str, value: Any, least: int = 1) -> int:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    below = SEEDS if name == "seed" else math.inf
    if not real or not least <= value < below or value % 1:
        holds = f"0 <= seed < {SEEDS}" if name == "seed" else f"{name} > 0"
        raise SearchError(f"{holds} must hold for a whole number, but {name}={value!r}.")
    return int(value)


def _duration(value: Any) -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 < value < math.inf:
        raise SearchError(f"seconds > 0 must hold for a finite number, but seconds={value!r}.")
    return float(value)


def _path_text(name: str, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise SearchError(f"{name} must be a path or a text, but {name}={value!r}.")
    return text


def _checked_first(first: Any, space: Space, engine: Engine) -> list[Config]:
    if isinstance(first, str | Mapping) or not isinstance(first, Sequence):
        raise SearchError(f"first must be a list of configurations, but got {first!r}.")
    configs = [space.checked(config, f"first[{n}]") for n, config in enumerate(first)]
    for n, config in enumerate(configs if engine.promotes else []):
        missing = [name for name in space.searched if space.is_active(name, config) and name not in config]
        if missing:
            raise SearchError(f"first[{n}] must be whole for {engine.name}, but lacks {', '.join(missing)}.")
    return configs


def _run_all(search: Search, engine: Engine, objective: Objective, workers: int) -> None:
    if engine.hire or workers > 1:
        from midflight.search.workers import Worker, run_in_workers

        with engine.hire(workers) if engine.hire else nullcontext(Worker) as kind:
            run_in_workers(search, objective, workers, kind)
        return
    before = checkpoint.random_state()
    try:
        while (job := search.next_job()) is not None:
            search.on_end(job.number, run_job(job, objective, partial(search.on_report, job.number)))
    finally:
        checkpoint.set_random_state(before)
