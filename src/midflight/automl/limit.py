"""A time limit for code that has no time limit of its own."""

import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

REPEAT = 2.0
"""Seconds until the alarm repeats; Python drops an exception that is raised in a destructor, for example."""


class OutOfTime(Exception):
    """The block exceeded its time limit."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after `seconds`, by a signal; infinity: no limit.

    Python handles a signal between two bytecode instructions, so a call into compiled code ends first. There
    is no limit outside the main thread, on Windows, or if other code has already set the alarm.
    """
    if seconds <= 0:
        raise OutOfTime("no time is left")
    if math.isinf(seconds) or not _can_alarm():
        yield
        return

    def ring(*_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, REPEAT)
        raise OutOfTime(f"not done within {seconds:.3g} s")

    def not_ours(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, OutOfTime):  # the next alarm comes in `REPEAT` seconds
            report_dropped(dropped)

    grad = torch.is_grad_enabled()
    report_dropped, sys.unraisablehook = sys.unraisablehook, not_ours
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = report_dropped
        torch.set_grad_enabled(grad)  # an alarm inside torch.no_grad().__enter__ would leave it off


def _can_alarm() -> bool:
    return (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getitimer(signal.ITIMER_REAL)[0] == 0
        and signal.getsignal(signal.SIGALRM) is not None
    )
