"""Show a running study in the terminal: arms done, current hyperparameters, time left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from midflight.study.arm import EpochDone
from midflight.study.spec import Arm, Spec, products
from midflight.study.store import Row


class StudyProgress:
    """Update a rich progress bar from the callbacks of `run_study`."""

    def __init__(self, progress: Progress, spec: Spec, done: list[Row]) -> None:
        self._progress = progress
        self._spec = spec
        self._epochs: dict[Arm, int] = {row.arm: spec.epochs for row in done}
        arms = list(spec.arms())
        self._work = progress.add_task("work", total=sum(map(self._cost, arms)) * spec.epochs, visible=False)
        work = next(task for task in progress.tasks if task.id == self._work)
        self._arms = progress.add_task("arms", total=len(arms), completed=len(done), work=work)
        self.now = Text("starting the workers")
        self._update_work()

    def on_epoch(self, done: EpochDone) -> None:
        """Show the epoch that was just trained."""
        self._epochs[done.arm] = done.epoch
        l2, noise = done.point
        self.now.plain = (
            f"{_label(done.arm)}, epoch {done.epoch}: L2 10^{l2:.2f}, noise {noise:.2f}, "
            f"T2 error {100 * done.valid_error:.2f} %"
        )
        self._update_work()

    def on_row(self, row: Row) -> None:
        """Count an arm that was just stored."""
        self._progress.advance(self._arms)

    def _update_work(self) -> None:
        done = sum(self._cost(arm) * epochs for arm, epochs in self._epochs.items())
        self._progress.update(self._work, completed=done)

    def _cost(self, arm: Arm) -> float:
        return products(arm.network) / 1e6


@contextmanager
def showing_progress(spec: Spec, done: list[Row], console: Console) -> Iterator[StudyProgress]:
    """Show a progress bar; the arms in `done` are stored already."""
    progress = Progress(
        TextColumn("arms"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("·"),
        TimeElapsedColumn(),
        TextColumn("· left"),
        _TimeLeft(),
    )
    shown = StudyProgress(progress, spec, done)
    with Live(Group(progress, shown.now), console=console, refresh_per_second=4):
        yield shown


class _TimeLeft(TimeRemainingColumn):
    """Time left, estimated from epochs weighted by network size, which is finer than whole arms."""

    max_refresh = 1.0

    def render(self, task: Task) -> Text:
        return super().render(task.fields["work"])


def _label(arm: Arm) -> str:
    return " ".join(part for part in (arm.network, arm.kind, arm.estimator, f"#{arm.index}") if part)
