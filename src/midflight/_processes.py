"""Worker processes of this process."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait
from typing import Any


def fresh_processes(preload: str) -> Any:
    """Return a context that starts fresh processes, from a server that has imported `preload` if possible."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload, "torch._dynamo"])  # torch imports it at the first optimiser
    return context


def begin_worker() -> None:
    """Make this worker process ignore Ctrl-C and end when its parent does; call it first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent ends, because a parent killed by SIGKILL cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
