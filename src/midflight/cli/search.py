"""`midflight search`: search a space and report the result."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from midflight.cli._console import err, out
from midflight.errors import require_extra
from midflight.search.errors import SearchError

DEFAULT_STORAGE = "runs/search.sqlite"
DEFAULT_TIME = "5m"


@dataclass(frozen=True)
class Search:
    """Search a space for the lowest validation loss; tune the online hyperparameters during each trial.

    Each report of a trial is stored at once. The same command resumes an interrupted search.
    """

    space: tyro.conf.Positional[str]
    """mlp, or FILE.py:FUNCTION, where the file also defines `space`; see docs/how-to/search.md."""
    data: str | None = None
    """Dataset of mlp: mnist, fashion_mnist or digits; default: digits."""
    train: int | None = None
    """Number of training images of mlp; default: all."""
    engine: str = "bohb"
    """random, tpe, bohb (TPE with Hyperband), smac (random forest with Hyperband) or ray."""
    trials: int | None = None
    """Number of trials in the whole search, earlier ones included."""
    time: str | None = None
    """Duration of this call, such as 90s, 5m or 2h; default without --trials: 5m."""
    epochs: int = 9
    """Epochs of a full training; Hyperband compares trials after 1, 3, 9, ... epochs."""
    workers: int | None = None
    """Number of parallel trials, one process each; default: number of cores."""
    storage: str = DEFAULT_STORAGE
    """A .sqlite or .journal file, or a URL such as postgresql://user@host/database."""
    folder: Path | None = None
    """Folder of the checkpoints, shared if several machines search together; default: beside the storage."""
    study: str | None = None
    """Name of the search in the storage; default: made of space, data and engine."""
    seed: int = 0
    """Seed of the engine and of every trial."""
    offline: bool = False
    """Let the engine search all hyperparameters; tune none during the trials."""
    warm_start: bool = True
    """Start tuned hyperparameters at the final values of the nearest good trial."""
    address: str | None = None
    """Address of a running Ray cluster; default: start a local one."""
    scheduler: str | None = None
    """Scheduler of ray: asha, median, pbt or fifo; default: asha."""
    out: Path | None = None
    """Folder of the report; default: a folder named like the search, beside the storage."""
    json: bool = False
    """Print the trials as JSON."""


def run(arguments: list[str]) -> int:
    """Search, then report; return the exit code."""
    command = tyro.cli(Search, args=arguments, prog="midflight search")
    from midflight.search.problems import problem
    from midflight.search.progress import showing_trials
    from midflight.search.search import run as search

    time = DEFAULT_TIME if command.trials is None and command.time is None else command.time
    seconds = None if time is None else parse_seconds(time)
    what = problem(command.space, command.data, command.train)
    space = what.space.offline() if command.offline else what.space
    name = _study_name(command) if command.study is None else command.study
    cores = len(os.sched_getaffinity(0))
    options: dict[str, Any] = {"address": command.address, "scheduler": command.scheduler}
    options = {option: value for option, value in options.items() if value is not None}
    with showing_trials(err, command.trials, seconds) as callbacks:
        found = search(
            what.objective, space, engine=command.engine, trials=command.trials, seconds=seconds,
            epochs=command.epochs, workers=cores if command.workers is None else command.workers,
            storage=command.storage, folder=command.folder, name=name, seed=command.seed,
            warm_start=command.warm_start, label=what.label, callbacks=callbacks, **options,
        )  # fmt: skip
    report(name, command.storage, command.out, command.json)
    if found.best is None and any(record.state != "unfinished" for record in found.records):
        err.print("midflight: no trial has a finite loss; the report has their messages.")
        return 1
    return 0


def report(name: str, storage: str, folder: Path | None, as_text: bool) -> int:
    """Report on the stored trials of a search; return the exit code."""
    require_extra("optuna", "search")
    from midflight.search import report as reports
    from midflight.search.ledger import default_folder, read_study, without_password

    with read_study(storage, name) as (ledger, declaration):
        records = ledger.records()
    if as_text:
        print(reports.as_json(name, declaration, records))
        return 0
    with err.status("drawing the report"):
        page = reports.write_report(name, declaration, records, folder or default_folder(storage, name))
    out.print(reports.summary_table(records))
    out.print(f"Stored as {name} in {without_password(storage)}. Report: {page.resolve()}")
    return 0


def _study_name(command: Search) -> str:
    space = Path(command.space.partition(":")[0]).stem
    data = ("digits" if command.data is None else command.data) if space == "mlp" else ""
    size = f"{command.train}" if command.train else ""
    parts = (space, data, size, command.engine, "offline" if command.offline else "")
    return "-".join(part for part in parts if part)


def parse_seconds(text: str) -> float:
    """Return the seconds of a text such as 90, 90s, 5m or 2h; raises `SearchError`."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in tuple("smh") else (text, "s")
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise SearchError(f"--time must be a duration such as 90s, 5m or 2h, but got {text!r}.")
    return seconds
