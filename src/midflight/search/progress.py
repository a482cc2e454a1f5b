"""Show a running search in the terminal: the best trial, running ones and the latest."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from midflight.search.jobs import Callback
from midflight.search.ledger import Record, best
from midflight.search.report import trials_table

LATEST, RUNNING = 6, 8  # number of finished and of running trials shown


@contextmanager
def showing_trials(console: Console, trials: int | None, seconds: float | None) -> Iterator[list[Callback]]:
    """Show a live table on a terminal, nothing elsewhere; yields the callbacks for `search.run`."""
    if not console.is_terminal:
        yield []
        return
    chosen: Record | None = None
    running: dict[int, Record] = {}
    latest: list[Record] = []
    count, began = 0, time.monotonic()

    def table() -> Table:
        left = "" if seconds is None else f", {max(0.0, seconds - time.monotonic() + began):.0f} s left"
        title = f"{count}{f' of {trials}' if trials else ''} trials done in this process{left}"
        shown = [*([chosen] if chosen else []), *latest, *list(running.values())[-RUNNING:]]
        rows = {record.number: record for record in shown}
        return trials_table(title, [rows[number] for number in sorted(rows)], chosen)

    def on_record(record: Record) -> None:
        nonlocal chosen, count
        chosen = best([record, *([chosen] if chosen and chosen.number != record.number else [])])
        if record.state == "unfinished":
            running[record.number] = record
        else:
            running.pop(record.number, None)
            latest[:], count = [*latest, record][-LATEST:], count + 1
        live.update(table())

    with Live(console=console, refresh_per_second=4) as live:
        yield [on_record]
