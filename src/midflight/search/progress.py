"""Show a running search in the terminal: the best trial, running ones and the latest."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

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
    known: dict[int, Record] = {}
    began = time.monotonic()

    def on_record(record: Record) -> None:
        known.pop(record.number, None)
        known[record.number] = record
        chosen = best(list(known.values()))
        running = [r for r in known.values() if r.state == "unfinished"]
        done = [r for r in known.values() if r.state != "unfinished"]
        left = "" if seconds is None else f", {max(0.0, seconds - time.monotonic() + began):.0f} s left"
        title = f"{len(done)}{f' of {trials}' if trials else ''} trials done in this process{left}"
        shown = {r.number: r for r in (*done[-LATEST:], *running[-RUNNING:], *([chosen] if chosen else []))}
        live.update(trials_table(title, [shown[number] for number in sorted(shown)], chosen))

    with Live(console=console, refresh_per_second=4) as live:
        yield [on_record]
