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

COLUMNS = (
    TextColumn("arms"), BarColumn(), TextColumn("{task.fields[done]}/{task.fields[arms]} ·"),
    TimeElapsedColumn(), TextColumn("· left"), TimeRemainingColumn(),
)  # fmt: skip


class StudyProgress:
    """Update a progress bar from the callbacks of `run_study`.

    The bar counts epochs weighted by the size of the network, because time left is estimated from it.
    """

    def __init__(self, progress: Progress, spec: Spec, done: list[Row]) -> None:
        costs = {arm: products(arm.network) for arm in spec.arms()}
        self._costs, self._progress, self.done = costs, progress, len(done)
        self.now = Text("starting the workers")
        self._bar = progress.add_task(
            "study", total=spec.epochs * sum(costs.values()), done=self.done, arms=len(costs),
            completed=spec.epochs * sum(costs.get(row.arm, 0) for row in done),
        )  # fmt: skip

    def on_epoch(self, done: EpochDone) -> None:
        """Show the epoch that was just trained."""
        (l2, noise), error = done.point, 100 * done.valid_error
        now = f"epoch {done.epoch}: L2 10^{l2:.2f}, noise {noise:.2f}, T2 error {error:.2f} %"
        self.now.plain = f"{_label(done.arm)}, {now}"
        self._progress.update(self._bar, advance=self._costs[done.arm])

    def on_row(self, row: Row) -> None:
        """Count an arm that was just stored."""
        self.done += 1
        self._progress.update(self._bar, done=self.done)


@contextmanager
def showing_progress(spec: Spec, done: list[Row], console: Console) -> Iterator[StudyProgress]:
    """Show a progress bar; the arms in `done` are stored already."""
    progress = Progress(*COLUMNS)
    shown = StudyProgress(progress, spec, done)
    with Live(Group(progress, shown.now, ""), console=console, refresh_per_second=4):
        yield shown


def _label(arm: Arm) -> str:
    return " ".join(part for part in (arm.network, arm.kind, arm.estimator, f"#{arm.index}") if part)
