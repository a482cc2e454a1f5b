"""Ray: run the trials on a cluster, in actors that take jobs as worker processes do.

Optuna proposes the trials and ends them early; `population` moves them. Ray starts the actors and notices
when a machine dies. The checkpoints' folder must be shared by all machines.
"""

import logging
import os
import socket
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import Pipe
from typing import Any

import optuna
from optuna.pruners import BasePruner

from midflight.errors import UnknownName
from midflight.search.engine import Engine, Task
from midflight.search.engines.optuna import random, tpe
from midflight.search.engines.population import Population
from midflight.search.errors import SearchError
from midflight.search.workers import Worker, serve

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about a future default
# Ray's default of 15 nearly stops trials when other work runs on the same cores
os.environ.setdefault("RAY_worker_niceness", "0")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray as ray_core

CONNECT_TIMEOUT = 5.0  # seconds for a cluster's address to answer
REDUCTION = 4  # the default of Ray's and of Optuna's asynchronous successive halving
PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION),
    "median": optuna.pruners.MedianPruner,
    "pbt": optuna.pruners.NopPruner,
    "fifo": optuna.pruners.NopPruner,
}


def ray(task: Task, address: str | None = None, scheduler: str = "asha") -> Engine:
    """Run trials on the Ray cluster at `address`, or on a local one that is started for the search."""
    if str(scheduler) not in PRUNERS:
        raise UnknownName("a scheduler of Ray", scheduler, PRUNERS)
    if not isinstance(address, str | None):
        raise SearchError(f"the address of a Ray cluster must be auto or host:port, but got {address!r}.")
    if scheduler == "pbt" and task.trials is None:
        raise SearchError("population-based training needs trials=, which is its population size.")
    population = Population(task) if scheduler == "pbt" else None
    return Engine(
        (random if population else tpe)(task).sampler, PRUNERS[scheduler](),
        hire=partial(_cluster, address), explore=population.explore if population else None,
        interval=population.interval if population else 0,
    )  # fmt: skip


class Host:
    """An actor of Ray that runs jobs; a thread does, because an actor answers one call at a time."""

    def __init__(self, pickled: bytes) -> None:
        self._here, there = Pipe()
        threading.Thread(target=serve, args=(there, pickled, 1), daemon=True).start()

    def exchange(self, message: Any) -> Any:
        """Pass a message to the thread, None for none, and return its next one."""
        if message is not None:
            self._here.send(message)
        return self._here.recv()


class RayWorker(Worker):
    """An actor and its current job."""

    dumps = staticmethod(ray_core.cloudpickle.dumps)

    def __init__(self, pickled: bytes, threads: int) -> None:
        self._actor: Any = ray_core.remote(num_cpus=1)(Host).remote(pickled)
        self._answers: deque[Any] = deque()
        self.send(None)
        self._died = False

    @staticmethod
    def wait(workers: Sequence[Any], seconds: float) -> None:
        ray_core.wait([w._answers[0] for w in workers if w._answers], timeout=seconds)

    def send(self, message: Any) -> None:
        self._answers.append(self._actor.exchange.remote(message))

    def receive(self) -> Any:
        if not self._answers or not ray_core.wait([self._answers[0]], timeout=0)[0]:
            return None
        try:
            return ray_core.get(self._answers.popleft())
        except ray_core.exceptions.RayError:
            self._died = True
            return None

    def is_alive(self) -> bool:
        return not self._died

    def end(self) -> None:
        ray_core.kill(self._actor)


@contextmanager
def _cluster(address: str | None, workers: int) -> Iterator[type[RayWorker]]:
    if ray_core.is_initialized():
        yield RayWorker
        return
    if address is not None:
        _check_address(address)
    local = {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    options: dict[str, Any] = local if address is None else {}
    try:
        ray_core.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        refused = "token authentication" in str(error.__cause__)
        raise SearchError(
            f"the address must be that of a running Ray cluster, but {address} is not: "
            + f"{str(error).splitlines()[0]}."
            + " It requires a token: set RAY_AUTH_MODE=token and write the token to ~/.ray/auth_token."
            * refused
        ) from error
    try:
        yield RayWorker
    finally:
        ray_core.shutdown()


def _check_address(address: str) -> None:
    """Raise `SearchError` unless a server listens at host:port; Ray itself would wait for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), CONNECT_TIMEOUT):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise SearchError(
            f"the address of a Ray cluster must be auto or host:port, but {address} does not answer: {error}."
        ) from error
