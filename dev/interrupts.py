"""Stops a tuned loop at thousands of instants and prints how often something was left as it should not be.

    python dev/interrupts.py [interrupts=5000] [exceptions=500] [seed=0]

Each time a loop with BatchNorm, dropout, a frozen layer, a layer in eval mode, momentum and a scheduler is
trained to a step at which the tuner works, and is stopped there: by Ctrl-C or SIGALRM at a line of Python, by
a timer, by Ctrl-C from another thread, or by an error in one of the user's functions. What it leaves is
compared with a loop without a tuner that was stopped at the same point (tests/faults/worlds.py says what all
is compared).
"""

import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))
from interrupts import (
    Twin,
    after_seconds,
    alarms_stop,
    at_line,
    lines_of_a_step,
    prepared,
    press_control_c,
    ring_alarm,
    stop_now,
    stopped_step,
    traces_left,
)
from worlds import World, differences

STEPS_BEFORE = 2


class Broken(Exception):
    """The error that is injected."""


class Table:
    """Counts by kind, printed as rows."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.stopped: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.what: dict[str, Counter[str]] = {}

    def add(self, kind: str, stopped: bool, wrong: list[str]) -> None:
        self.tried[kind] += 1
        self.stopped[kind] += stopped
        self.wrong[kind] += bool(wrong)
        self.what.setdefault(kind, Counter()).update([", ".join(wrong)] if wrong else [])

    def __str__(self) -> str:
        rows = [f"{'kind':<44} {'tried':>6} {'stopped':>8} {'traces left':>12}"]
        for kind in self.tried:
            rows.append(f"{kind:<44} {self.tried[kind]:>6} {self.stopped[kind]:>8} {self.wrong[kind]:>12}")
            rows += [f"    {count} x {what}" for what, count in self.what[kind].most_common(5)]
        total = [sum(c.values()) for c in (self.tried, self.stopped, self.wrong)]
        return "\n".join([*rows, f"{'all':<44} {total[0]:>6} {total[1]:>8} {total[2]:>12}"])


def put_right() -> None:
    """So that one failure is not counted again and again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, stop_now)
    torch.set_grad_enabled(True)


def interrupts(table: Table, count: int, chosen: random.Random) -> None:
    """In `optimizer.step`, where the tuner works: half at lines of Python, half by the clock."""
    lines = {horizon: lines_of_a_step(STEPS_BEFORE, horizon=horizon) for horizon in ("run", "step")}
    world = prepared(STEPS_BEFORE)
    started = time.perf_counter()
    world.optimizer.step()
    usual = time.perf_counter() - started
    kinds: list[tuple[str, Callable[[str], Any]]] = [
        ("Ctrl-C at a line", lambda h: at_line(chosen.randrange(1, lines[h] + 1), press_control_c)),
        ("SIGALRM at a line", lambda h: at_line(chosen.randrange(1, lines[h] + 1), ring_alarm)),
        (
            "Ctrl-C where hyper-steps begin or end",
            lambda h: at_line(_edge(chosen, lines[h]), press_control_c),
        ),
        ("SIGALRM by a timer", lambda h: after_seconds(chosen.uniform(0, 1.2 * usual), "alarm")),
        ("Ctrl-C from another thread", lambda h: after_seconds(chosen.uniform(0, 1.2 * usual), "control-c")),
    ]
    twin = Twin(STEPS_BEFORE)
    for n in range(count):
        kind, block = kinds[n % len(kinds)]
        horizon = chosen.choice(["run", "step"])
        world = prepared(STEPS_BEFORE, horizon=horizon)
        error = stopped_step(world, block(horizon))
        table.add(f"{kind}, {horizon}", error is not None, traces_left(world, error, twin))
        put_right()


def _edge(chosen: random.Random, lines: int) -> int:
    return chosen.choice([chosen.randrange(1, 400), chosen.randrange(lines - 1500, lines + 1)])


def exceptions(table: Table, count: int, chosen: random.Random) -> None:
    """In a user's function, at one of its calls; the loop is then as before the step that it was in."""
    twins: dict[int, Twin] = {}
    for _ in range(count):
        which, at = chosen.choice(["loss_fn", "valid_loss_fn", "on_hyperstep"]), chosen.randrange(1, 12)
        calls = [0]

        def wrap(name: str, function: Any, which: str = which, at: int = at, calls: list[int] = calls) -> Any:
            def wrapped(*arguments: Any) -> Any:
                calls[0] += name == which
                if name == which and calls[0] == at:
                    raise Broken
                return function(*arguments)

            return wrapped

        world = World(True, wrap, horizon=chosen.choice(["run", "step"]))
        stopped = False
        try:
            for _ in range(4):
                world.step()
        except Broken:
            stopped = True
        moment = (
            "begun" if not stopped else "after the step" if which == "on_hyperstep" else "before the step"
        )
        if world.taken not in twins:
            twins[world.taken] = Twin(world.taken)
        twin = twins[world.taken]
        wrong = differences(world.state(), twin.moments[moment])
        if stopped:
            world.tuner.detach()
            if which != "on_hyperstep":
                world.optimizer.step()
            wrong += [f"later: {name}" for name in differences(world.state(), twin.moments["after the step"])]
        table.add(f"error in {which}", stopped, wrong)
        put_right()


def main(count: int = 5000, errors: int = 500, seed: int = 0) -> int:
    torch.set_num_threads(1)
    chosen, table = random.Random(seed), Table()
    with alarms_stop():
        put_right()
        interrupts(table, count, chosen)
        exceptions(table, errors, chosen)
    print(table)
    return 1 if sum(table.wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
