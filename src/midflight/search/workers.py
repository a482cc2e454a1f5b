"""Trials in processes of their own; one that dies is replaced, and its trial goes on in the next.

Workers stay alive from trial to trial. Each has a pipe to the process that searches: a job goes one way,
reports come the other, and each report is answered by whether to go on.
"""

import multiprocessing
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from midflight._processes import begin_worker
from midflight.search.checkpoint import Point
from midflight.search.errors import SearchError
from midflight.search.search import Search
from midflight.search.trial import Job, Objective, Outcome, run_job

TICK = 1.0  # seconds after which the clock is looked at
STILLBORN = 3  # processes in a row that may end before they are ready


def run_in_workers(search: Search, objective: Objective, workers: int) -> None:
    """Run trials, `workers` at a time, until there are none left or the time is up.

    Raises:
        SearchError: the objective cannot be sent to a process, or processes cannot start.
    """
    try:
        parcel = pickle.dumps(objective)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SearchError(
            f"with workers={workers} the objective must be a function at the top of a module, but "
            f"{objective!r} cannot be sent to another process ({error}); move it there, or use workers=1."
        ) from error
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    pool: list[_Worker] = []
    stillborn = 0
    try:
        while True:
            while _has_room(pool, workers) and (job := search.next_job()) is not None:
                worker = next((w for w in pool if w.job is None), None)
                if worker is None:
                    worker = _Worker(parcel, threads)
                    pool.append(worker)
                worker.begin(job)
            busy = [worker for worker in pool if worker.job is not None]
            if not busy or search.is_over:
                return
            wait([w.pipe for w in busy] + [w.process.sentinel for w in busy], min(TICK, search.seconds_left))
            for worker in busy:
                if worker.attend(search):
                    continue
                pool.remove(worker)
                stillborn = 0 if worker.ready else stillborn + 1
                if stillborn >= STILLBORN:
                    raise SearchError(
                        "worker processes must be able to start, but the last "
                        f"{STILLBORN} ended at once; a script that calls search.run with workers needs "
                        'its call under `if __name__ == "__main__":`.'
                    )
    finally:
        for worker in pool:
            worker.end()


def _has_room(pool: list["_Worker"], workers: int) -> bool:
    return sum(worker.job is not None for worker in pool) < workers


class _Worker:
    """A process and what it is doing."""

    def __init__(self, parcel: bytes, threads: int) -> None:
        context = _context()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, parcel, threads))
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.ready = False

    def begin(self, job: Job) -> None:
        self.job = job
        with suppress(OSError):  # it just died, which `attend` finds
            self.pipe.send(job)

    def attend(self, search: Search) -> bool:
        """Answer what it has to say; False if it is dead."""
        assert self.job is not None
        number = self.job.number
        try:
            while self.job is not None and self.pipe.poll():
                message: str | list[Point] | Outcome = self.pipe.recv()
                if isinstance(message, Outcome):
                    self.job = None
                    search.ended(number, message)
                elif isinstance(message, list):
                    self.pipe.send(search.heard(number, message))
                elif message == "ready":
                    self.ready = True
                else:
                    raise SearchError(message)
            alive = bool(self.process.is_alive())
        except (EOFError, OSError):
            alive = False
        if not alive and self.job is not None:
            self.end()
            search.died(number, counts=self.ready)
        return alive

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _context() -> Any:
    """Fresh processes; where the system can, forked from one that has imported torch and nothing else."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _serve(pipe: Connection, parcel: bytes, threads: int) -> None:
    """A worker's life."""
    begin_worker()
    torch.set_num_threads(threads)
    try:
        objective: Callable[[Any], Any] = pickle.loads(parcel)
    except Exception as error:
        pipe.send(
            f"the objective must be importable in a worker process, but {type(error).__name__}: {error}"
        )
        return
    pipe.send("ready")

    def send(points: list[Point]) -> bool:
        pipe.send(points)
        return bool(pipe.recv())

    while True:
        outcome = run_job(pipe.recv(), objective, send)
        # an exception of another process is told in words; some cannot be pickled
        pipe.send(Outcome(outcome.how, outcome.message))
