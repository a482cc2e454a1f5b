"""Show a running search in the terminal: the best trial, running ones and the latest."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from midflight.search.ledger import Record, best
from midflight.search.report import config_text, loss_text

LATEST, RUNNING = 6, 8  # number of finished and of running trials shown


class LiveTrials:
    """A table that a callback of `search.run` updates."""

    def __init__(
        self, epochs: int, trials: int | None, seconds: float | None, live: Live | None = None
    ) -> None:
        self._records: dict[int, Record] = {}
        self._epochs, self._trials, self._seconds = epochs, trials, seconds
        self._began = time.monotonic()
        self._live = live

    def on_record(self, record: Record) -> None:
        """Show a trial that started, reported or ended."""
        self._records[record.number] = record
        if self._live is not None:
            self._live.update(self.table())

    def table(self) -> Table:
        """Return the best trial, running trials, and the last finished ones."""
        records = list(self._records.values())
        chosen = best(records)
        running = [r for r in records if r.state == "unfinished"][-RUNNING:]
        ended = [r for r in records if r.state != "unfinished"]
        shown = {r.number: r for r in [*([chosen] if chosen else []), *ended[-LATEST:], *running]}
        table = Table(title=self._title(len(ended)))
        table.add_column("trial", justify="right")
        table.add_column("configuration")
        table.add_column("tuned values now")
        table.add_column("epoch", justify="right")
        table.add_column("loss", justify="right")
        table.add_column("state")
        for number in sorted(shown):
            r = shown[number]
            is_best = chosen is not None and number == chosen.number
            state = "running" if r.state == "unfinished" else r.state
            table.add_row(
                str(number), config_text(r.config), config_text(r.online), f"{r.epoch}/{self._epochs}",
                loss_text(r.loss), f"{state}{', best' if is_best else ''}", style="bold" if is_best else None,
            )  # fmt: skip
        return table

    def _title(self, ended: int) -> str:
        of = "" if self._trials is None else f" of {self._trials}"
        left = math.inf if self._seconds is None else self._seconds - (time.monotonic() - self._began)
        time_left = "" if math.isinf(left) else f" · {max(0, left):.0f} s left"
        return f"{ended}{of} trials done in this process{time_left}"


@contextmanager
def showing_trials(
    console: Console, epochs: int, trials: int | None, seconds: float | None
) -> Iterator[LiveTrials]:
    """Show a live table on a terminal; show nothing elsewhere."""
    if not console.is_terminal:
        yield LiveTrials(epochs, trials, seconds)
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield LiveTrials(epochs, trials, seconds, live)
