"""A time limit on a block of code that was not written to be stopped."""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

AGAIN = 2.0
"""Seconds after which the alarm rings once more: Python drops what is raised in a destructor, for one."""


class OutOfTime(Exception):
    """The block took too long."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block once so many seconds are over, where a signal can; infinity is no limit.

    A signal reaches the main thread of a Unix process between two steps of Python code, so a long call into
    compiled code ends first. In other threads, on Windows, or where somebody else has set the alarm, there
    is no limit.
    """
    if seconds <= 0:
        raise OutOfTime("no time was left")
    if math.isinf(seconds) or not _can_alarm():
        yield
        return

    def ring(*_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        raise OutOfTime(f"not done within {seconds:.3g} s")

    grad = torch.is_grad_enabled()
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(grad)  # an alarm while torch.no_grad() is entered would leave it off for good


def _can_alarm() -> bool:
    return (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getitimer(signal.ITIMER_REAL)[0] == 0
        and signal.getsignal(signal.SIGALRM) is not None
    )
