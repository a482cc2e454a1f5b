"""Run all arms of a study and store each one as soon as it is done."""

import queue
import time
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import torch

from midflight._processes import begin_worker, fresh_processes
from midflight.datasets import Split
from midflight.errors import MidflightError
from midflight.study.arm import Data, OnEpoch, SingleRun, cohorts, prepare, run_arm, run_cohort, train_epoch
from midflight.study.spec import Arm, Spec
from midflight.study.store import Point, Row, Store

LONG = 3600.0
"""Seconds from which the command announces a study's duration."""


class WorkerDied(MidflightError, RuntimeError):
    """A worker process ended before its arm did."""

    exit_code = 1


def run_study(
    spec: Spec,
    store: Store,
    run: str,
    workers: int,
    on_epoch: OnEpoch = lambda done: None,
    on_row: Callable[[Row], None] = lambda row: None,
    together: bool | None = None,
) -> None:
    """Run every arm of `spec` that `store` does not hold yet under the name `run`.

    On a CPU, each arm runs in a process. The rows depend neither on `workers` nor on interruptions.
    On a GPU, arms run together (`midflight.study.arm.Cohort`), with matrix products in TF32.

    Args:
        workers: number of processes, one thread each.
        on_epoch: called after each epoch of each arm.
        on_row: called after an arm was stored.
        together: whether arms run together; None: on a GPU only.

    Raises:
        DatasetUnavailable, SpecError, StoreError, StoreUnavailable: before or between arms. Stored arms stay.
        WorkerDied: a worker was killed, for example because memory ran out.
    """
    data = prepare(spec)
    done = {row.arm: row for row in store.rows(run)}
    waiting = [arm for arm in spec.arms() if arm not in done]
    if not waiting:
        return
    if together or (together is None and spec.device != "cpu"):
        rows = _run_together(spec, data, waiting, done, on_epoch)
    else:
        del data  # each process loads its own
        rows = _run_in_processes(spec, workers, waiting, done, on_epoch)
    with closing(rows):  # ends the processes if a row cannot be stored
        for row in rows:
            store.add(run, row)
            done[row.arm] = row
            on_row(row)


def _run_together(
    spec: Spec, data: Data, waiting: list[Arm], done: dict[Arm, Row], on_epoch: OnEpoch
) -> Generator[Row, None, None]:
    """Yield each row when its cohort is done; the caller adds the row to `done`."""
    before = torch.get_float32_matmul_precision()
    if spec.device != "cpu":
        torch.set_float32_matmul_precision("high")
    try:
        network = ""
        for cohort in cohorts(spec, waiting, data.t1.x.shape[1]):
            if spec.device != "cpu" and cohort[0].network != network:
                torch.compiler.reset()  # torch compiles at most eight shapes; a network needs two
                network = cohort[0].network
            starts = [_start(spec, arm, done) for arm in cohort]
            yield from run_cohort(spec, cohort, starts, data, on_epoch)
    finally:
        torch.set_float32_matmul_precision(before)


def _run_in_processes(
    spec: Spec, workers: int, waiting: list[Arm], done: dict[Arm, Row], on_epoch: OnEpoch
) -> Generator[Row, None, None]:
    """Yield each row when its arm is done; the caller adds the row to `done`."""
    context = fresh_processes(__name__)
    messages: Any = context.Queue()
    running: set[Future[Row]] = set()
    executor = ProcessPoolExecutor(
        min(workers, len(waiting)), mp_context=context, initializer=_begin_worker, initargs=(spec, messages)
    )
    try:
        while waiting or running:
            while len(running) < workers and (ready := _next_ready(waiting, done)) is not None:
                waiting.remove(ready)
                running.add(executor.submit(_work, ready, _start(spec, ready, done)))
            finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
            with suppress(queue.Empty):
                while True:
                    on_epoch(messages.get_nowait())
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process was killed before it finished its arm, perhaps because memory ran out. "
            "Finished arms are stored: run the same command again, with fewer --workers if this recurs."
        ) from error
    finally:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown(wait=True, cancel_futures=True)
        messages.close()


def estimate_seconds(spec: Spec, workers: int, steps: int = 10) -> float:
    """Estimate the time of all arms on this machine, from a few training steps of each network."""
    arms = len(list(spec.arms())) / len(spec.networks)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        per_step = sum(_seconds_per_step(spec, network, steps) for network in spec.networks)
    torch.set_num_threads(threads)
    return per_step * spec.steps() * arms / workers


def _seconds_per_step(spec: Spec, network: str, steps: int) -> float:
    x = torch.rand(spec.batch, 64 if spec.dataset == "digits" else 784)
    batch = Split(x, torch.zeros(spec.batch, dtype=torch.int64))
    run = SingleRun(spec, Arm(network, "initial", "", 0), spec.start(0), Data(batch, batch, batch))
    for _ in range(2):  # torch allocates memory in the first steps
        train_epoch(run)
    began = time.perf_counter()
    for _ in range(steps):
        train_epoch(run)
    return (time.perf_counter() - began) / steps


def _next_ready(waiting: list[Arm], done: dict[Arm, Row]) -> Arm | None:
    return next((arm for arm in waiting if arm.kind != "rerun" or _tuned(arm) in done), None)


def _start(spec: Spec, arm: Arm, done: dict[Arm, Row]) -> Point:
    if arm.kind == "rerun":
        return done[_tuned(arm)].result.end
    return spec.grid_point(arm.index) if arm.kind == "landscape" else spec.start(arm.index)


def _tuned(rerun: Arm) -> Arm:
    """Return the tuned arm whose final values a re-run takes."""
    return replace(rerun, kind="tuned")


_worker: dict[str, Any] = {}
"""Arguments of `run_arm`, set by `_begin_worker` in worker processes only."""


def _begin_worker(spec: Spec, messages: Any) -> None:
    begin_worker()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    _worker.update(spec=spec, data=prepare(spec), on_epoch=messages.put)


def _work(arm: Arm, start: Point) -> Row:
    return run_arm(arm=arm, start=start, **_worker)
