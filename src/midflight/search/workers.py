"""Run trials in workers; replace a worker that dies, and continue its trial in the next.

A worker runs many trials. It receives a job and sends reports back. The search answers each report with
whether the trial continues. Several processes on one storage would not do instead: only one process asks the
engine, so a search with workers proposes what one without them does, and it needs no storage on a disk.
"""

import os
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from midflight._processes import begin_worker, fresh_processes
from midflight.search.checkpoint import Point
from midflight.search.errors import SearchError
from midflight.search.jobs import Search
from midflight.search.trial import Job, Objective, Outcome, run_job

POLL = 1.0  # seconds between checks of the time limit
ATTEMPTS, PAUSE = 5, 0.2  # to start a process, and seconds between two of them
MAX_FAILED_STARTS = 3  # the search stops when this many workers in a row die before they are ready


class Worker:
    """A process of this machine that runs jobs, one at a time; a subclass runs them elsewhere."""

    job: Job | None = None
    ready = False
    dumps: Callable[[Any], bytes] = staticmethod(pickle.dumps)

    def __init__(self, pickled: bytes, threads: int) -> None:
        context = fresh_processes(__name__)
        self._pipe, other_end = context.Pipe()
        with other_end:
            for attempt in range(ATTEMPTS):
                self._process = context.Process(target=_serve_in_process, args=(other_end, pickled, threads))
                try:
                    self._process.start()
                    return
                except (EOFError, OSError):
                    # somebody killed the server that forks; another start begins a new one
                    if attempt == ATTEMPTS - 1:
                        raise
                    time.sleep(PAUSE)

    @staticmethod
    def wait(workers: Sequence[Any], seconds: float) -> None:
        """Wait until one of the workers has a message or dies."""
        wait([w._pipe for w in workers] + [w._process.sentinel for w in workers], seconds)

    def send(self, message: Job | bool) -> None:
        with suppress(OSError):  # it just died
            self._pipe.send(message)

    def receive(self) -> Any:
        """Return its next message, or None if there is none yet."""
        try:
            return self._pipe.recv() if self._pipe.poll() else None
        except (EOFError, OSError):
            self.end()
            return None

    def is_alive(self) -> bool:
        return bool(self._process.is_alive())

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def run_in_workers(search: Search, objective: Objective, workers: int, kind: type[Worker]) -> None:
    """Run trials, `workers` at a time, until none are left or the time is up.

    Raises:
        SearchError: the objective cannot be pickled, or workers cannot start.
    """
    try:
        pickled = kind.dumps(objective)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SearchError(
            f"with workers={workers} the objective must be a function at the top of a module, but "
            f"{objective!r} cannot be pickled ({error}); move it there, or use workers=1."
        ) from error
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    pool: list[Worker] = []
    failed_starts = 0
    try:
        while True:
            while sum(w.job is not None for w in pool) < workers and (job := search.next_job()) is not None:
                worker = next((w for w in pool if w.job is None), None)
                if worker is None:
                    pool.append(worker := kind(pickled, threads))
                worker.job = job
                worker.send(job)
            busy = [worker for worker in pool if worker.job is not None]
            if not busy or not search.seconds_left:
                return
            kind.wait(busy, min(POLL, search.seconds_left))
            for worker in busy:
                if _hear(worker, search):
                    continue
                worker.end()
                pool.remove(worker)
                failed_starts = 0 if worker.ready else failed_starts + 1
                if failed_starts >= MAX_FAILED_STARTS:
                    raise SearchError(
                        f"worker processes must be able to start, but the last {MAX_FAILED_STARTS} ended at "
                        'once; a script must call search.run(workers=...) under `if __name__ == "__main__":`.'
                    )
    finally:
        for worker in pool:
            worker.end()


def _hear(worker: Worker, search: Search) -> bool:
    """Pass the worker's messages to the search and answer them; return whether the worker is alive."""
    while worker.job is not None and (message := worker.receive()) is not None:
        number = worker.job.number
        if isinstance(message, Outcome):
            worker.job = None
            search.on_end(number, message)
        elif isinstance(message, list):
            worker.send(search.on_report(number, message))
        elif message == "ready":
            worker.ready = True
        else:
            raise SearchError(message)
    alive = worker.is_alive()
    if not alive and worker.job is not None:
        search.on_death(worker.job.number, counts=worker.ready)
    return alive


def _serve_in_process(pipe: Connection, pickled: bytes, threads: int) -> None:
    begin_worker()
    serve(pipe, pickled, threads)


def serve(pipe: Connection, pickled: bytes, threads: int) -> None:
    """Run jobs from the pipe until this process is killed."""
    torch.set_num_threads(threads)
    try:
        objective: Callable[[Any], Any] = pickle.loads(pickled)
    except Exception as error:
        pipe.send(f"the objective must be importable in a worker, but {type(error).__name__}: {error}")
        return
    pipe.send("ready")

    def send(points: list[Point]) -> bool:
        pipe.send(points)
        return bool(pipe.recv())

    while True:
        outcome = run_job(pipe.recv(), objective, send)
        # the exception stays here, because some cannot be pickled
        pipe.send(Outcome(outcome.how, outcome.message))
