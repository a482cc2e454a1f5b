"""Run trials in worker processes; replace a worker that dies, and continue its trial in the next.

A worker runs many trials. It receives a job through a pipe and sends reports back. The search answers each
report with whether the trial continues.
"""

import os
import pickle
from collections.abc import Callable
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
MAX_FAILED_STARTS = 3  # the search stops when this many workers in a row die before they are ready


def run_in_workers(search: Search, objective: Objective, workers: int) -> None:
    """Run trials, `workers` at a time, until none are left or the time is up.

    Raises:
        SearchError: the objective cannot be pickled, or workers cannot start.
    """
    try:
        pickled = pickle.dumps(objective)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SearchError(
            f"with workers={workers} the objective must be a function at the top of a module, but "
            f"{objective!r} cannot be pickled ({error}); move it there, or use workers=1."
        ) from error
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    pool: list[_Worker] = []
    failed_starts = 0
    try:
        while True:
            while _has_room(pool, workers) and (job := search.next_job()) is not None:
                worker = next((w for w in pool if w.job is None), None)
                if worker is None:
                    worker = _Worker(pickled, threads)
                    pool.append(worker)
                worker.start(job)
            busy = [worker for worker in pool if worker.job is not None]
            if not busy or search.is_over:
                return
            wait([w.pipe for w in busy] + [w.process.sentinel for w in busy], min(POLL, search.seconds_left))
            for worker in busy:
                if worker.answer(search):
                    continue
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


def _has_room(pool: list["_Worker"], workers: int) -> bool:
    return sum(worker.job is not None for worker in pool) < workers


class _Worker:
    """A process and its current job."""

    def __init__(self, pickled: bytes, threads: int) -> None:
        context = fresh_processes(__name__)
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(other_end, pickled, threads))
        self.process.start()
        other_end.close()
        self.job: Job | None = None
        self.ready = False

    def start(self, job: Job) -> None:
        self.job = job
        with suppress(OSError):  # the process just died; `answer` notices
            self.pipe.send(job)

    def answer(self, search: Search) -> bool:
        """Pass the worker's messages to the search and answer them; return whether the worker is alive."""
        assert self.job is not None
        number = self.job.number
        try:
            while self.job is not None and self.pipe.poll():
                message: str | list[Point] | Outcome = self.pipe.recv()
                if isinstance(message, Outcome):
                    self.job = None
                    search.on_end(number, message)
                elif isinstance(message, list):
                    self.pipe.send(search.on_report(number, message))
                elif message == "ready":
                    self.ready = True
                else:
                    raise SearchError(message)
            alive = bool(self.process.is_alive())
        except (EOFError, OSError):
            alive = False
        if not alive and self.job is not None:
            self.end()
            search.on_death(number, counts=self.ready)
        return alive

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, pickled: bytes, threads: int) -> None:
    """Run jobs from the pipe until this process is killed."""
    begin_worker()
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
