"""midflight: tune the hyperparameters while the model trains.

  midflight study PRESET   reproduce the paper: smoke, quick or paper
  midflight report RUN     figures and one HTML page from the stored rows of a study
  midflight check          hypergradients against central differences, in float64
  midflight search SPACE   search what has no gradient, tune the rest while each trial trains
  midflight report STUDY --storage URL

Examples:
  midflight study smoke
  midflight study quick --run mine --starts 20 --estimator default t1t2
  midflight study paper --networks 1000-1000-1000 --device cuda
  midflight report quick --json
  midflight search mlp --data mnist --engine bohb --time 5m
  midflight search mine.py:objective --engine smac --trials 50 --storage postgresql://user@host/database

`midflight COMMAND --help` lists the options. Exit codes: 0 done; 1 the environment failed (no data
to be had, disk full), a check did not pass or every trial failed; 2 bad input; 130 interrupted.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from midflight.errors import MidflightError
from midflight.machine import machine
from midflight.search.errors import ObjectiveFailed, SearchError, StorageLost
from midflight.study.data import DatasetUnavailable
from midflight.study.progress import showing_progress
from midflight.study.report import as_json, summary_table, write_report
from midflight.study.run import WorkerDied, estimate_seconds, run_study
from midflight.study.spec import PRESETS, Spec, SpecError
from midflight.study.store import Store, StoreUnavailable
from midflight.study.summary import summarise
from midflight.testing.table import Check, Skipped, as_dicts, run_checks

DEFAULT_STORE = Path("runs/midflight.sqlite")
DEFAULT_STORAGE = "runs/search.sqlite"
DEFAULT_TIME = "5m"
LONG = 3600.0  # seconds above which a study says beforehand how long it will take

_out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
_err = Console(stderr=True)


@dataclass(frozen=True)
class Study:
    """Run a study, or go on with one that was interrupted.

    Every finished arm is stored at once; the same command resumes where it stopped.
    """

    spec: Annotated[Spec, tyro.conf.arg(name="")]
    run: str | None = None
    """Its name in the store; the preset's if not given."""
    store: Path = DEFAULT_STORE
    """SQLite file."""
    workers: int | None = None
    """Processes, one thread each; all cores if not given. The rows do not depend on it. Not for a GPU."""
    json: bool = False
    """Print the summary for machines."""


@dataclass(frozen=True)
class Report:
    """Write the figures and report.html of a study, or with --storage of a search, from its stored rows."""

    run: tyro.conf.Positional[str]
    """The study's name in the store."""
    store: Path = DEFAULT_STORE
    """SQLite file."""
    storage: str | None = None
    """Of a search: a .sqlite or .journal file, or a URL."""
    out: Path | None = None
    """Folder to write to; runs/RUN beside the store if not given."""
    json: bool = False
    """Print the same numbers for machines and write nothing."""


@dataclass(frozen=True)
class CheckCommand:
    """Compare every estimator's hypergradient with the central difference of the one-step map."""

    all: bool = False
    """Every estimator, update rule and kind of hyperparameter, not only the paper's."""
    json: bool = False
    """Print the table for machines."""


@dataclass(frozen=True)
class SearchCommand:
    """Search a space for the least validation loss; what is declared online is tuned inside each trial.

    Every report of a trial is stored at once; the same command resumes where it stopped.
    """

    space: tyro.conf.Positional[str]
    """mlp, or FILE.py:FUNCTION with a `space` in the file; see docs/search.md."""
    data: str | None = None
    """For mlp: mnist, fashion_mnist or digits; digits if not given."""
    train: int | None = None
    """For mlp: training images, fewer for a quicker search."""
    engine: str = "bohb"
    """random, tpe, bohb (TPE with Hyperband), smac (random forest with Hyperband) or ray."""
    trials: int | None = None
    """Trials in the whole study."""
    time: str | None = None
    """How long to search now, such as 90s, 5m or 2h; 5m if neither this nor --trials is given."""
    epochs: int = 9
    """Of a whole training; Hyperband compares after 1, 3, 9, ... of them."""
    workers: int | None = None
    """Trials at once, each in a process of its own; all cores if not given."""
    storage: str = DEFAULT_STORAGE
    """A .sqlite or .journal file, or a URL such as postgresql://user@host/database."""
    folder: Path | None = None
    """Of the checkpoints, where several machines share a study; beside the storage if not given."""
    study: str | None = None
    """Its name in the storage; made of space, data and engine if not given."""
    seed: int = 0
    """Of the engine and of every trial."""
    offline: bool = False
    """Tune nothing inside the trials: the engine searches everything."""
    warm_start: bool = True
    """Start what is tuned inside where the nearest good configuration ended."""
    address: str | None = None
    """For ray: a running cluster; one is started here if not given."""
    scheduler: str | None = None
    """For ray: asha, median, pbt or fifo; asha if not given."""
    out: Path | None = None
    """Folder of the report; one of the study's name beside the storage if not given."""
    json: bool = False
    """Print the trials for machines."""


def main() -> None:
    """Entry point of the command `midflight`."""
    arguments = sys.argv[1:]
    commands = {"study": _study, "report": _report, "check": _check, "search": _search}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    if arguments[0] not in commands:
        _fail(f"the command must be one of {', '.join(commands)}; got {arguments[0]!r}.", 2)
    try:
        sys.exit(commands[arguments[0]](arguments[1:]))
    except (DatasetUnavailable, StoreUnavailable, WorkerDied, StorageLost, ObjectiveFailed) as error:
        _fail(str(error), 1)
    except MidflightError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(
            f"{error.filename or 'the system'}: {error.strerror or error}; nothing that was stored is lost.",
            1,
        )
    except KeyboardInterrupt:
        _fail("interrupted; what was finished is stored, the same command goes on from there.", 130)


def _study(arguments: list[str]) -> int:
    presets = tyro.extras.subcommand_type_from_defaults(
        {name: Study(spec) for name, spec in PRESETS.items()},
        {name: _about(spec) for name, spec in PRESETS.items()},
    )
    study: Study = tyro.cli(presets, args=arguments, prog="midflight study", description=Study.__doc__)
    run = study.run or arguments[0]
    workers = len(os.sched_getaffinity(0)) if study.workers is None else study.workers
    if workers < 1:
        raise SpecError(f"workers >= 1 must hold, but got {workers}.")
    if study.spec.device != "cpu" and not torch.cuda.is_available():
        raise SpecError(f"device {study.spec.device} is not there; use --device cpu.")
    with Store(study.store) as store:
        store.open_run(run, study.spec, machine())
        _announce(study.spec, PRESETS[arguments[0]], workers)
        with showing_progress(study.spec, store.rows(run), _err) as progress:
            run_study(study.spec, store, run, workers, progress.on_tick, progress.on_row)
        if study.json:
            print(as_json(store, run))
        else:
            _out.print(summary_table(summarise(study.spec, store.rows(run))))
            at = "" if study.store == DEFAULT_STORE else f" --store {study.store}"
            _out.print(f"Stored as {run} in {study.store}. Next: midflight report {run}{at}", soft_wrap=True)
    return 0


def _report(arguments: list[str]) -> int:
    report = tyro.cli(Report, args=arguments, prog="midflight report")
    if report.storage is not None:
        return _search_report(report.run, report.storage, report.out, report.json)
    with Store(report.store, create=False) as store:
        if report.json:
            print(as_json(store, report.run))
            return 0
        store.spec(report.run)
        with _err.status("checking the hypergradients"):
            checks = as_dicts(run_checks())
        folder = report.out or report.store.parent / report.run
        page = write_report(store, report.run, folder, checks)
        _out.print(summary_table(summarise(store.spec(report.run), store.rows(report.run))))
    _out.print(f"Report: {page.resolve()}", soft_wrap=True)
    return 0


def _search(arguments: list[str]) -> int:
    command = tyro.cli(SearchCommand, args=arguments, prog="midflight search")
    needs_search_extra()
    from midflight.search.problems import problem
    from midflight.search.progress import showing_trials
    from midflight.search.search import run

    if command.trials is None and command.time is None:
        command = replace(command, time=DEFAULT_TIME)
    seconds = None if command.time is None else parse_seconds(command.time)
    what = problem(command.space, command.data, command.train)
    space = what.space.offline() if command.offline else what.space
    name = command.study or _study_name(command)
    cores = len(os.sched_getaffinity(0))
    options: dict[str, Any] = {"address": command.address, "scheduler": command.scheduler}
    options = {option: value for option, value in options.items() if value is not None}
    with showing_trials(_err, command.epochs, command.trials, seconds) as table:
        run(
            what.objective, space, engine=command.engine, trials=command.trials, seconds=seconds,
            epochs=command.epochs, workers=cores if command.workers is None else command.workers,
            storage=command.storage, folder=command.folder, name=name, seed=command.seed,
            warm_start=command.warm_start, label=what.label, callbacks=[table.on_record], **options,
        )  # fmt: skip
    return _search_report(name, command.storage, command.out, command.json)


def _search_report(name: str, storage: str, out: Path | None, as_text: bool) -> int:
    needs_search_extra()
    from midflight.search import report
    from midflight.search.ledger import default_folder, read_study, shown

    with read_study(storage, name) as (ledger, declaration):
        records = ledger.records()
    if as_text:
        print(report.as_json(name, declaration, records))
        return 0
    with _err.status("drawing the report"):
        page = report.write_report(name, declaration, records, out or default_folder(storage, name))
    _out.print(report.summary_table(records))
    _out.print(
        f"Stored as {name} in {shown(storage)}. Report: {page.resolve()}", markup=False, soft_wrap=True
    )
    return 0


def _study_name(command: SearchCommand) -> str:
    space = Path(command.space.partition(":")[0]).stem
    data = (command.data or "digits") if space == "mlp" else ""
    size = f"{command.train}" if command.train else ""
    parts = (space, data, size, command.engine, "offline" if command.offline else "")
    return "-".join(part for part in parts if part)


def parse_seconds(text: str) -> float:
    """Seconds of 90, 90s, 5m or 2h; raises `SearchError`."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in tuple("smh") else (text, "s")
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise SearchError(f"--time must be a duration such as 90s, 5m or 2h, but got {text!r}.")
    return seconds


def needs_search_extra() -> None:
    """Raise `MissingExtra` if the extra `search` is not installed."""
    from midflight.search.engines import need

    need("optuna", "search")


def _check(arguments: list[str]) -> int:
    check = tyro.cli(CheckCommand, args=arguments, prog="midflight check")
    torch.set_num_threads(1)  # the networks of the table are too small for more
    rows = []
    with _err.status("comparing with central differences") as status:
        workers = (os.cpu_count() or 1) if check.all else 1
        for row in run_checks(everything=check.all, workers=workers):
            rows.append(row)
            status.update(f"comparing with central differences: {row.rule}, {row.hyperparameter}")
    checks = [row for row in rows if isinstance(row, Check)]
    skipped = [row for row in rows if isinstance(row, Skipped)]
    failed = [c for c in checks if c.passed is False]
    if check.json:
        print(json.dumps({"checks": as_dicts(checks), "skipped": [asdict(row) for row in skipped]}, indent=2))
    else:
        _out.print(_check_table(checks))
        for reason in dict.fromkeys(row.reason for row in skipped):
            places = [f"{r.rule} {r.hyperparameter} ({r.estimator})" for r in skipped if r.reason == reason]
            shown = "; ".join(places[:3]) + (f"; and {len(places) - 3} more" if len(places) > 3 else "")
            _out.print(f"left out: {shown}: {reason}", markup=False, highlight=False)
        claims = sum(c.passed is not None for c in checks)
        _out.print(f"{claims - len(failed)} of {claims} estimates are within what their estimators claim.")
    return 1 if failed else 0


def _check_table(checks: list[Check]) -> Table:
    table = Table(title="Hypergradients against the central difference of the one-step map (float64)")
    for column in ("optimiser", "hyperparameter", "estimator"):
        table.add_column(column)
    for column in ("relative error", "cosine", "scale", "claim"):
        table.add_column(column, justify="right")
    for c in checks:
        verdict = "" if c.passed is None else "[green]holds" if c.passed else "[red]FAILS"
        table.add_row(
            c.rule,
            c.hyperparameter,
            c.estimator,
            f"{c.relative_error:.2g}",
            f"{c.cosine:.3f}",
            f"{c.scale:.3g}",
            f"{verdict} {c.tolerance or ''}",
        )
    return table


def _announce(spec: Spec, preset: Spec, workers: int) -> None:
    if spec.device != "cpu":
        _err.print(f"All starts of a kind of arm train together, as one population on {spec.device}.")
        return
    _err.print(f"Each arm trains in a process of one thread, {workers} at a time.")
    seconds = estimate_seconds(spec, workers)
    if seconds > LONG:
        _err.print(f"The training steps alone will take about {_duration(seconds)} with {workers} workers.")
    whole = estimate_seconds(preset, workers)
    if spec != preset and whole > LONG:
        _err.print(f"The whole preset would take about {_duration(whole)}.")


def _about(spec: Spec) -> str:
    return (
        f"{spec.dataset}, {spec.train} training and {spec.valid} validation images, "
        f"{' and '.join(spec.networks)}, {spec.epochs} epochs, {spec.starts} starts."
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} minutes"


def _fail(sentence: str, code: int) -> None:
    _err.print(f"midflight: {sentence}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
