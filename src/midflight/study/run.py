"""All arms of a study, on all cores, each stored the moment it is done."""

import multiprocessing
import queue
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from midflight._processes import begin_worker
from midflight.errors import MidflightError
from midflight.study.arm import Data, Point, mlp, prepare, run_arm
from midflight.study.cohort import cohorts, run_cohort
from midflight.study.spec import Arm, Spec, widths
from midflight.study.store import Row, Store


class WorkerDied(MidflightError, RuntimeError):
    """A worker process ended before its arm did."""

    exit_code = 1


@dataclass(frozen=True)
class Tick:
    """What a worker tells after each epoch of an arm."""

    arm: Arm
    epoch: int
    point: Point
    valid_error: float


def run_study(
    spec: Spec,
    store: Store,
    run: str,
    workers: int,
    on_tick: Callable[[Tick], None] = lambda tick: None,
    on_row: Callable[[Row], None] = lambda row: None,
    together: bool | None = None,
) -> None:
    """Run every arm of `spec` that `store` does not hold yet under the name `run`.

    On a CPU arms run in processes; the rows do not depend on `workers`, nor on how often the study was
    interrupted. On a GPU they run together, see `midflight.study.cohort`, with matrix products in TF32.

    Args:
        workers: processes, one thread each; an arm runs in one of them.
        on_tick: called after each epoch of each arm.
        on_row: called after an arm was stored.
        together: whether arms run together; if None, on a GPU only.

    Raises:
        DatasetUnavailable, SpecError, StoreError, StoreUnavailable: before or between arms;
            what is stored stays.
        WorkerDied: a worker was killed, by the system for want of memory perhaps.
    """
    data = prepare(spec)
    done = {row.arm: row for row in store.rows(run)}
    waiting = [arm for arm in spec.arms() if arm not in done]

    def finish(row: Row) -> None:
        store.add(run, row)
        done[row.arm] = row
        on_row(row)

    if together or (together is None and spec.device != "cpu"):
        _run_together(spec, data, waiting, done, on_tick, finish)
        return
    del data  # each process reads its own
    if waiting:
        _run_in_processes(spec, workers, waiting, done, on_tick, finish)


def _run_together(
    spec: Spec,
    data: Data,
    waiting: list[Arm],
    done: dict[Arm, Row],
    on_tick: Callable[[Tick], None],
    finish: Callable[[Row], None],
) -> None:
    before = torch.get_float32_matmul_precision()
    if spec.device != "cpu":
        torch.set_float32_matmul_precision("high")
    try:
        network = ""
        for cohort in cohorts(spec, waiting, data.t1.x.shape[1]):
            if spec.device != "cpu" and cohort[0].network != network:
                torch.compiler.reset()  # torch compiles for eight kinds of shapes, a network has two
                network = cohort[0].network
            begins = [_begin(spec, arm, done) for arm in cohort]
            for row in run_cohort(spec, cohort, begins, data, lambda *told: on_tick(Tick(*told))):
                finish(row)
    finally:
        torch.set_float32_matmul_precision(before)


def _run_in_processes(
    spec: Spec,
    workers: int,
    waiting: list[Arm],
    done: dict[Arm, Row],
    on_tick: Callable[[Tick], None],
    finish: Callable[[Row], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    ticks: Any = context.Queue()
    running: set[Future[Row]] = set()
    executor = ProcessPoolExecutor(
        min(workers, len(waiting)), mp_context=context, initializer=_begin_worker, initargs=(spec, ticks)
    )
    try:
        while waiting or running:
            while len(running) < workers and (ready := _next_ready(waiting, done)) is not None:
                waiting.remove(ready)
                running.add(executor.submit(_work, ready, _begin(spec, ready, done)))
            finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in finished:
                finish(future.result())
            _drain(ticks, on_tick)
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process ended before its arm did (killed for want of memory?); finished arms are "
            "stored, run the same command again, with fewer --workers if it happens again."
        ) from error
    finally:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown(wait=True, cancel_futures=True)
        ticks.close()


LONG = 3600.0
"""A study that takes more seconds says so beforehand."""


def may_be_long(spec: Spec, workers: int) -> bool:
    """Whether a study would take over an hour on a slow machine; if not, there is nothing to measure."""
    arms = len(list(spec.arms())) / len(spec.networks)
    weights = sum(m * n for network in spec.networks for m, n in pairwise([784, *widths(network), 10]))
    slow = 1e-3 * len(spec.networks) + 3 * spec.batch * weights / 1e9  # seconds of a step of each network
    return slow * spec.steps() * arms / workers > LONG


def estimate_seconds(spec: Spec, workers: int, steps: int = 10) -> float:
    """How long all arms of a study would take here, from a few training steps of each network."""
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
    return next((arm for arm in waiting if arm.kind != "rerun" or _tuned_twin(arm) in done), None)


def _begin(spec: Spec, arm: Arm, done: dict[Arm, Row]) -> Point:
    if arm.kind == "rerun":
        return done[_tuned_twin(arm)].result.end
    return spec.grid_point(arm.index) if arm.kind == "landscape" else spec.start(arm.index)


def _tuned_twin(arm: Arm) -> Arm:
    return replace(arm, kind="tuned")


def _drain(ticks: Any, on_tick: Callable[[Tick], None]) -> None:
    while True:
        try:
            on_tick(ticks.get_nowait())
        except queue.Empty:
            return


_worker: dict[str, Any] = {}
"""What `_begin_worker` prepares for `_work`, in a worker process only."""


def _begin_worker(spec: Spec, ticks: Any) -> None:
    begin_worker()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    _worker.update(spec=spec, ticks=ticks, data=prepare(spec))


def _work(arm: Arm, begin: Point) -> Row:
    data: Data = _worker["data"]

    def report(epoch: int, point: Point, valid_error: float) -> None:
        _worker["ticks"].put(Tick(arm, epoch, point, valid_error))

    return run_arm(_worker["spec"], arm, begin, data, report)
