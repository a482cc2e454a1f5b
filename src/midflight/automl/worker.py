"""Call a function in a child process that is killed after a time limit, which compiled code keeps, too."""

import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

FORKS = sys.platform == "linux"
"""Whether a process that has used compiled libraries can be forked; on macOS, Accelerate may crash then."""


class OutOfTime(Exception):
    """The call exceeded its time limit."""


class CallFailed(Exception):
    """The call raised an exception in the child, or the child ended."""


def limited(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, computed by a child process.

    The child is a fork, so it needs no start-up and shares the memory. It cannot change this process. Where
    processes cannot fork, and for code that refuses to run in a fork, the call runs here, without a limit.

    Raises:
        OutOfTime: `seconds` are over; the child was killed.
        CallFailed: the function raised an exception, which is in the message.
    """
    if seconds <= 0:
        raise OutOfTime("no time is left")
    if not FORKS:
        return function(*args)
    until = time.monotonic() + seconds
    here, there = Pipe(duplex=False)
    pid = _forked(lambda: _answer(there, seconds, function, args))
    there.close()
    try:
        if not here.poll(max(0.0, until - time.monotonic())):
            raise OutOfTime(f"not done within {seconds:.3g} s")
        failed, value = pickle.loads(here.recv_bytes())
    except EOFError:
        if time.monotonic() >= until:
            raise OutOfTime(f"not done within {seconds:.3g} s") from None
        raise CallFailed("the process of the fit ended; it may have run out of memory") from None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        here.close()
    if failed and "fork" in value:  # torch's autograd cannot run in a fork of a process that used a GPU
        return function(*args)
    if failed:
        raise CallFailed(value)
    return value


def _forked(run: Callable[[], None]) -> int:
    """Run a function in a fork; return its process id.

    A new thread forks, because the child's OpenMP would wait for the threads that the old one had started.
    """

    def fork() -> int:
        # Ctrl-C goes to all processes of a terminal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks with threads
            pid = os.fork()
        if not pid:
            try:
                run()
            finally:
                os._exit(0)
        return pid

    with ThreadPoolExecutor(1) as new_thread:
        return new_thread.submit(fork).result()


def _answer(pipe: Connection, seconds: float, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # the system ends this process if its parent was killed
    try:
        answer = cloudpickle.dumps((False, function(*args)))
    except BaseException as error:  # the child must not go on with the work of its parent
        answer = pickle.dumps((True, f"{type(error).__name__}: {error}"))
    pipe.send_bytes(answer)
