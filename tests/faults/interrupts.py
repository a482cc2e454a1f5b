"""Stops a training step at a chosen line or at a chosen time, and says what is not as it would be without a
tuner."""

import _thread
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from worlds import World, differences, random_numbers_kept

UPDATE = "_use_grad"
"""The function of torch that runs an optimiser's own update: whoever stops torch within it finds weights and
momenta half moved, or gradients switched off, tuner or not."""


class Stopped(Exception):
    """Raised by the handler of SIGALRM."""


def stop_now(number: int, frame: Any) -> None:
    raise Stopped


class Twin:
    """A loop without a tuner: what each moment of a step looks like."""

    @random_numbers_kept()
    def __init__(self, steps: int) -> None:
        world = World(False).run(steps)
        self.moments = {"begun": world.state()}
        world.forward_and_backward()
        self.moments["before the step"] = world.state()
        world.optimizer.step()
        self.moments["after the step"] = world.state()


def prepared(steps: int, **arguments: Any) -> World:
    """A loop with a tuner, just before the optimiser steps."""
    world = World(True, **arguments).run(steps)
    world.forward_and_backward()
    return world


def lines_of_a_step(steps: int, **arguments: Any) -> int:
    """Lines of Python from the beginning to the end of `optimizer.step`, torch's included."""
    world = prepared(steps, **arguments)
    with counted_lines() as count:
        world.optimizer.step()
    return count[0]


@contextmanager
def counted_lines(file: str = "") -> Iterator[list[int]]:
    """How many lines of Python are run within the block, torch's included, as the one entry of a list."""
    count = [0]

    def trace(frame: Any, event: str, _: Any) -> Any:
        count[0] += event == "line" and frame.f_code.co_filename.endswith(file)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


@contextmanager
def at_line(n: int, do: Callable[[], Any], file: str = "") -> Iterator[None]:
    """`do()` at the n-th line of Python that is run within the block; of the files whose name ends so."""
    left = [n]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if event == "line" and frame.f_code.co_filename.endswith(file):
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                do()
                return None
        return trace if left[0] > 0 else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def press_control_c() -> None:
    signal.raise_signal(signal.SIGINT)


def ring_alarm() -> None:
    signal.raise_signal(signal.SIGALRM)


@contextmanager
def after_seconds(seconds: float, how: str) -> Iterator[None]:
    """SIGALRM by a timer of the system, or Ctrl-C from another thread."""
    if how == "alarm":
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return
    timer = threading.Timer(seconds, _thread.interrupt_main)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def alarms_stop() -> Iterator[None]:
    """SIGALRM raises `Stopped` within the block."""
    before = signal.signal(signal.SIGALRM, stop_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def in_torchs_update(error: BaseException) -> bool:
    return any(entry.name == UPDATE for entry in traceback.extract_tb(error.__traceback__))


def stopped_step(world: World, block: Any) -> BaseException | None:
    """Take the optimiser's step within a block that stops it; what stopped it."""
    try:
        with block:
            world.optimizer.step()
    except (KeyboardInterrupt, Stopped) as error:
        return error
    return None


def traces_left(world: World, error: BaseException | None, twin: Twin) -> list[str]:
    """What is neither as before the step nor as after it; each weight for itself, once torch has begun to
    move them."""
    now = world.state()
    before, after = twin.moments["before the step"], twin.moments["after the step"]
    wrong = [name for name in now if now[name] not in (before[name], after[name])]
    if error is not None and in_torchs_update(error):
        wrong = [name for name in wrong if not name.startswith(("weight", "momentum", "grad mode"))]
    elif now["weight 1.weight"] == before["weight 1.weight"]:
        wrong = sorted({*wrong, *differences(now, before)})
    return wrong
