"""Show a running study in the terminal: arms done, current hyperparameters, time left."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

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


@contextmanager
def showing_progress(spec: Spec, done: list[Row], console: Console) -> Iterator[Any]:
    """Show a progress bar; yields `on_epoch` and `on_row` for `run_study`. The arms in `done` are stored.

    The bar counts epochs weighted by the size of the network, because time left is estimated from it.
    """
    costs = {arm: products(arm.network) for arm in spec.arms()}
    progress, now = Progress(*COLUMNS), Text("starting the workers")
    bar = progress.add_task(
        "study", total=spec.epochs * sum(costs.values()), done=len(done), arms=len(costs),
        completed=spec.epochs * sum(costs.get(row.arm, 0) for row in done),
    )  # fmt: skip

    def on_epoch(done: EpochDone) -> None:
        (l2, noise), error = done.point, 100 * done.valid_error
        shown = f"epoch {done.epoch}: L2 10^{l2:.2f}, noise {noise:.2f}, T2 error {error:.2f} %"
        now.plain = f"{_label(done.arm)}, {shown}"
        progress.update(bar, advance=costs[done.arm])

    def on_row(row: Row) -> None:
        progress.update(bar, done=progress.tasks[0].fields["done"] + 1)

    with Live(Group(progress, now, ""), console=console, refresh_per_second=4):
        yield SimpleNamespace(on_epoch=on_epoch, on_row=on_row)


def _label(arm: Arm) -> str:
    return " ".join(part for part in (arm.network, arm.kind, arm.estimator, f"#{arm.index}") if part)
