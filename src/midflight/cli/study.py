"""`midflight study`: run or resume a study."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from midflight._reporting.machine import machine
from midflight._reporting.text import printable
from midflight.cli._console import err, out
from midflight.study.progress import showing_progress
from midflight.study.run import LONG, estimate_seconds, run_study
from midflight.study.spec import PRESETS, Spec, SpecError
from midflight.study.store import Store
from midflight.study.summary import summarise

DEFAULT_STORE = Path("runs/midflight.sqlite")


@dataclass(frozen=True)
class Study:
    """Run a study, or resume an interrupted one.

    Each finished training run is stored at once. The same command resumes the study.
    """

    spec: Annotated[Spec, tyro.conf.arg(name="")]
    run: str | None = None
    """Name of the study in the store; default: the preset's name."""
    store: Path = DEFAULT_STORE
    """SQLite file that stores the results."""
    workers: int | None = None
    """Number of processes on a CPU, one thread each; default: all cores. Results do not depend on it."""
    json: bool = False
    """Print the summary as JSON."""


def run(arguments: list[str]) -> int:
    """Run the study and print its summary; return the exit code."""
    presets = tyro.extras.subcommand_type_from_defaults(
        {name: Study(spec) for name, spec in PRESETS.items()},
        {name: _about(spec) for name, spec in PRESETS.items()},
    )
    study: Study = tyro.cli(presets, args=arguments, prog="midflight study", description=Study.__doc__)
    name = arguments[0] if study.run is None else study.run
    workers = len(os.sched_getaffinity(0)) if study.workers is None else study.workers
    if workers < 1:
        raise SpecError(f"workers >= 1 must hold, but got {workers}.")
    device, gpus = study.spec.device, torch.cuda.device_count()
    if device != "cpu" and int(device.partition(":")[2] or 0) >= gpus:
        raise SpecError(f"device {device} must exist, but torch finds {gpus or 'no'} GPU; use --device cpu.")
    with Store(study.store) as store:
        store.open_run(name, study.spec, machine())
        _announce(study.spec, PRESETS[arguments[0]], workers)
        with showing_progress(study.spec, store.rows(name), err) as progress:
            run_study(study.spec, store, name, workers, progress.on_epoch, progress.on_row)
        from midflight.study.report import as_json, summary_table  # loads matplotlib

        if study.json:
            print(as_json(store, name))
        else:
            out.print(summary_table(summarise(study.spec, store.rows(name))))
            at = [] if study.store == DEFAULT_STORE else ["--store", str(study.store)]
            after = shlex.join(["midflight", "report", name, *at])
            print(printable(f"Stored as {name} in {study.store}. Next: {after}"))
    return 0


def _announce(spec: Spec, preset: Spec, workers: int) -> None:
    if spec.device != "cpu":
        err.print(f"Runs of the same kind train together on {spec.device}.")
        return
    err.print(f"Each run trains in its own process with one thread; {workers} run in parallel.")
    if (seconds := estimate_seconds(spec, workers)) > LONG:
        err.print(f"The training steps alone will take about {_duration(seconds)} with {workers} workers.")
    if spec != preset and (whole := estimate_seconds(preset, workers)) > LONG:
        err.print(f"The whole preset would take about {_duration(whole)}.")


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
