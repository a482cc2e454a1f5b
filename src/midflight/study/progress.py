"""Show a running study in the terminal: arms done, current hyperparameters, time left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from midflight.study.arm import EpochDone
from midflight.study.spec import Arm, Spec, products
from midflight.study.store import Row

COLUMNS = (
    TextColumn("arms"), BarColumn(20), TextColumn("{task.fields[done]}/{task.fields[arms]} ·"),
    TimeElapsedColumn(), TextColumn("· left"), TimeRemainingColumn(),
    TextColumn("· {task.description}", table_column=Column(ratio=1, no_wrap=True)),  # what is left of the line
)  # fmt: skip


class StudyProgress:
    """Update a progress bar from the callbacks of `run_study`.

    The bar counts epochs weighted by the size of the network, because time left is estimated from it.
    """

    def __init__(self, progress: Progress, spec: Spec, done: list[Row]) -> None:
        costs = {arm: products(arm.network) for arm in spec.arms()}
        self._costs, self._progress, self.done = costs, progress, len(done)
        self._bar = progress.add_task(
            "starting the workers", total=spec.epochs * sum(costs.values()), done=self.done, arms=len(costs),
            completed=spec.epochs * sum(costs.get(row.arm, 0) for row in done),
        )  # fmt: skip

    def on_epoch(self, done: EpochDone) -> None:
        """Show the epoch that was just trained."""
        (l2, noise), error = done.point, 100 * done.valid_error
        now = f"epoch {done.epoch}: L2 10^{l2:.2f}, noise {noise:.2f}, T2 error {error:.2f} %"
        self._progress.update(
            self._bar, advance=self._costs[done.arm], description=f"{_label(done.arm)}, {now}"
        )

    def on_row(self, row: Row) -> None:
        """Count an arm that was just stored."""
        self.done += 1
        self._progress.update(self._bar, done=self.done)


@contextmanager
def showing_progress(spec: Spec, done: list[Row], console: Console) -> Iterator[StudyProgress]:
    """Show a progress bar; the arms in `done` are stored already."""
    with Progress(*COLUMNS, console=console, expand=True, refresh_per_second=4) as progress:
        yield StudyProgress(progress, spec, done)


def _label(arm: Arm) -> str:
    return " ".join(part for part in (arm.network, arm.kind, arm.estimator, f"#{arm.index}") if part)
