"""Run all arms of a study and store each one as soon as it is done."""

import queue
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from midflight._processes import begin_worker, fresh_processes
from midflight.errors import MidflightError
from midflight.study.arm import Data, Point, mlp, prepare, run_arm
from midflight.study.cohort import cohorts, run_cohort
from midflight.study.spec import Arm, Spec, products, widths
from midflight.study.store import Row, Store


class WorkerDied(MidflightError, RuntimeError):
    """A worker process ended before its arm did."""

    exit_code = 1


@dataclass(frozen=True)
class EpochDone:
    """A worker's message after each epoch of an arm."""

    arm: Arm
    epoch: int
    point: Point
    valid_error: float


def run_study(
    spec: Spec,
    store: Store,
    run: str,
    workers: int,
    on_epoch: Callable[[EpochDone], None] = lambda done: None,
    on_row: Callable[[Row], None] = lambda row: None,
    together: bool | None = None,
) -> None:
    """Run every arm of `spec` that `store` does not hold yet under the name `run`.

    On a CPU, each arm runs in a process. The rows depend neither on `workers` nor on interruptions.
    On a GPU, arms run together (`midflight.study.cohort`), with matrix products in TF32.

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

    def finish(row: Row) -> None:
        store.add(run, row)
        done[row.arm] = row
        on_row(row)

    if together or (together is None and spec.device != "cpu"):
        _run_together(spec, data, waiting, done, on_epoch, finish)
        return
    del data  # each process loads its own
    if waiting:
        _run_in_processes(spec, workers, waiting, done, on_epoch, finish)


def _run_together(
    spec: Spec,
    data: Data,
    waiting: list[Arm],
    done: dict[Arm, Row],
    on_epoch: Callable[[EpochDone], None],
    finish: Callable[[Row], None],
) -> None:
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
            for row in run_cohort(spec, cohort, starts, data, lambda *told: on_epoch(EpochDone(*told))):
                finish(row)
    finally:
        torch.set_float32_matmul_precision(before)


def _run_in_processes(
    spec: Spec,
    workers: int,
    waiting: list[Arm],
    done: dict[Arm, Row],
    on_epoch: Callable[[EpochDone], None],
    finish: Callable[[Row], None],
) -> None:
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
            for future in finished:
                finish(future.result())
            _drain(messages, on_epoch)
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


LONG = 3600.0
"""Seconds from which the command announces a study's duration."""


def may_be_long(spec: Spec, workers: int) -> bool:
    """Whether a study could take over an hour on a slow machine; if so, measure it."""
    arms = len(list(spec.arms())) / len(spec.networks)
    # one step of each network: 1 ms of overhead each, and 3 passes at 10^9 multiply-adds per second
    slow = 1e-3 * len(spec.networks) + 3 * spec.batch * sum(map(products, spec.networks)) / 1e9
    return slow * spec.steps() * arms / workers > LONG


def estimate_seconds(spec: Spec, workers: int, steps: int = 10) -> float:
    """Estimate the seconds that all arms take on this machine, from a few training steps per network."""
    total = 0.0
    per_network = len(list(spec.arms())) / len(spec.networks)
    with torch.random.fork_rng(devices=[]):
        for network in spec.networks:
            total += _seconds_per_step(spec, network, steps) * spec.steps() * per_network
    return total / workers


def _seconds_per_step(spec: Spec, network: str, steps: int) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.rand(spec.batch, 64 if spec.dataset == "digits" else 784, device=spec.device)
    y = torch.zeros(spec.batch, dtype=torch.int64, device=spec.device)
    model = mlp(x.shape[1], widths(network), 10).to(spec.device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    began = 0.0
    for step in range(steps + 2):
        if step == 2:
            began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    seconds = (time.perf_counter() - began) / steps
    torch.set_num_threads(threads)
    return seconds


def _next_ready(waiting: list[Arm], done: dict[Arm, Row]) -> Arm | None:
    return next((arm for arm in waiting if arm.kind != "rerun" or _tuned(arm) in done), None)


def _start(spec: Spec, arm: Arm, done: dict[Arm, Row]) -> Point:
    if arm.kind == "rerun":
        return done[_tuned(arm)].result.end
    return spec.grid_point(arm.index) if arm.kind == "landscape" else spec.start(arm.index)


def _tuned(rerun: Arm) -> Arm:
    """Return the tuned arm whose final values a re-run takes."""
    return replace(rerun, kind="tuned")


def _drain(messages: Any, on_epoch: Callable[[EpochDone], None]) -> None:
    while True:
        try:
            on_epoch(messages.get_nowait())
        except queue.Empty:
            return


_worker: dict[str, Any] = {}
"""Set by `_begin_worker` and read by `_work`, in worker processes only."""


def _begin_worker(spec: Spec, messages: Any) -> None:
    begin_worker()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    _worker.update(spec=spec, messages=messages, data=prepare(spec))


def _work(arm: Arm, start: Point) -> Row:
    data: Data = _worker["data"]

    def on_epoch(epoch: int, point: Point, valid_error: float) -> None:
        _worker["messages"].put(EpochDone(arm, epoch, point, valid_error))

    return run_arm(_worker["spec"], arm, start, data, on_epoch)
