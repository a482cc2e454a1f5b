"""Show a running study in the terminal: arms done, current hyperparameters, time left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from midflight.study.arm import EpochDone
from midflight.study.spec import Arm, Spec, products
from midflight.study.store import Row


class StudyProgress:
    """Update a rich progress bar from the callbacks of `run_study`.

    The bar counts epochs weighted by the size of the network, because time left is estimated from it.
    """

    def __init__(self, progress: Progress, spec: Spec, done: list[Row]) -> None:
        self._progress = progress
        self._epochs = dict.fromkeys(spec.arms(), 0) | {row.arm: spec.epochs for row in done}
        self._bar = progress.add_task(
            "study",
            total=spec.epochs * sum(map(_cost, self._epochs)),
            done=len(done),
            arms=len(self._epochs),
        )
        self._update()
        self.now = Text("starting the workers")

    def on_epoch(self, done: EpochDone) -> None:
        """Show the epoch that was just trained."""
        self._epochs[done.arm] = done.epoch
        l2, noise = done.point
        self.now.plain = (
            f"{_label(done.arm)}, epoch {done.epoch}: L2 10^{l2:.2f}, noise {noise:.2f}, "
            f"T2 error {100 * done.valid_error:.2f} %"
        )
        self._update()

    def on_row(self, row: Row) -> None:
        """Count an arm that was just stored."""
        self._progress.update(self._bar, done=self._progress.tasks[0].fields["done"] + 1)

    def _update(self) -> None:
        done = sum(epochs * _cost(arm) for arm, epochs in self._epochs.items())
        self._progress.update(self._bar, completed=done)


@contextmanager
def showing_progress(spec: Spec, done: list[Row], console: Console) -> Iterator[StudyProgress]:
    """Show a progress bar; the arms in `done` are stored already."""
    progress = Progress(
        TextColumn("arms"),
        BarColumn(),
        TextColumn("{task.fields[done]}/{task.fields[arms]} ·"),
        TimeElapsedColumn(),
        TextColumn("· left"),
        TimeRemainingColumn(),
    )
    shown = StudyProgress(progress, spec, done)
    with Live(Group(progress, shown.now), console=console, refresh_per_second=4):
        yield shown


def _cost(arm: Arm) -> float:
    return products(arm.network) / 1e6


def _label(arm: Arm) -> str:
    return " ".join(part for part in (arm.network, arm.kind, arm.estimator, f"#{arm.index}") if part)
