"""Ray Tune: trials on the machines of a cluster, ended or cloned by one of its schedulers.

Optuna proposes (TPE; at random for population-based training), Ray runs and schedules. This process keeps
the ledger as for every engine: a searcher hands Ray the jobs, a stopper and a callback hear what becomes of
them. A trial that Ray moves, pauses or restarts goes on from the checkpoint that Ray keeps.

Population-based training (Jaderberg et al. 2017) clones a good trial over a bad one and moves its searched
`Float`s, by Ray's default rule; whole numbers and categories are inherited, for a network cannot change them
while it trains.
"""

import logging
import os
import random
import shutil
import socket
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna

from midflight.errors import UnknownName
from midflight.search import checkpoint
from midflight.search.checkpoint import Point
from midflight.search.engines import Engine, Task
from midflight.search.engines.optuna import tpe
from midflight.search.errors import SearchError
from midflight.search.search import Search
from midflight.search.space import Config, Space
from midflight.search.trial import Job, Objective, Outcome, run_job
from midflight.space import Float

for _name in ("RAY_USAGE_STATS_ENABLED", "RAY_AIR_NEW_OUTPUT"):
    os.environ.setdefault(_name, "0")
# Ray would write its own logs beside the ledger, take Ctrl-C for itself, and warn about a default to come
for _name in ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_DISABLE_SIGINT_HANDLER"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# by default 15: beside other work on the same cores trials would all but stand still
os.environ.setdefault("RAY_worker_niceness", "0")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray as ray_core
    from ray import tune
    from ray.tune import schedulers
    from ray.tune.search import Searcher

FILE = "training.pt"
WORST = 1e30  # what Ray's schedulers see of a loss that is not finite
RETRIES = 2  # as often as the workers of `midflight.search.workers` may die
PATIENCE = 5.0  # seconds for a cluster's address to answer
RESAMPLE, FACTORS = 0.25, (1.2, 0.8)  # Ray's defaults for population-based training
SCHEDULERS = ("asha", "median", "pbt", "fifo")


def ray(task: Task, address: str | None = None, scheduler: str = "asha") -> Engine:
    """Ray Tune on the cluster at `address`, or on one that is started here for the search."""
    if scheduler not in SCHEDULERS:
        raise UnknownName("a scheduler of Ray", scheduler, SCHEDULERS)
    if scheduler == "pbt" and task.trials is None:
        raise SearchError("population-based training needs trials=, the size of its population.")

    def drive(search: Search, objective: Objective, workers: int) -> None:
        with _cluster(address, workers), tempfile.TemporaryDirectory() as folder:
            # a cluster of several machines hands checkpoints round through a folder that all of them see
            storage = Path(folder) if address is None else search.ledger.folder.resolve() / "ray"
            _fit(search, objective, workers, task, scheduler, storage)

    sampler = optuna.samplers.RandomSampler(seed=task.seed) if scheduler == "pbt" else tpe(task).sampler
    return Engine(sampler, optuna.pruners.NopPruner(), drive=drive)


def _fit(
    search: Search, objective: Objective, workers: int, task: Task, scheduler: str, storage: Path
) -> None:
    random.seed(task.seed)  # drives Ray's schedulers
    book = Book(search)
    how: dict[str, Any] = {"search_alg": Jobs(book), "num_samples": -1, "max_concurrent_trials": workers}
    space: dict[str, Any] = {}
    if scheduler == "pbt":  # the whole population is there from the beginning
        jobs = book.next_jobs(task.trials or 0)
        if not jobs:
            return
        how, space = {}, {"job": tune.grid_search(jobs)}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(train, objective=objective), {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            scheduler=_scheduler(scheduler, task), reuse_actors=True,
            trial_dirname_creator=lambda trial: str(trial.trial_id), **how,
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex, storage_path=str(storage), verbose=0, stop=Stops(book),
            callbacks=[Watch(book)], failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )  # fmt: skip
    tuner.fit()
    if book.error is not None:
        raise book.error


def train(config: dict[str, Any], objective: Objective) -> None:
    """A trial in an actor of Ray."""
    job: Job = config["job"]
    with tempfile.TemporaryDirectory() as folder:
        file, heard = Path(folder) / FILE, 0
        given = tune.get_checkpoint()
        if given is not None:
            with given.as_directory() as of_ray:
                shutil.copy(Path(of_ray) / FILE, file)
            saved = checkpoint.load(file)
            heard = saved.points[-1].epoch if saved else 0
        elif job.checkpoint.is_file():
            shutil.copy(job.checkpoint, file)

        def send(points: list[Point]) -> bool:
            for point in points:
                if point.epoch > heard:
                    state = tune.Checkpoint.from_directory(folder) if file.is_file() else None
                    tune.report(_metrics(point, job), checkpoint=state)
            return True

        outcome = run_job(replace(job, checkpoint=file), objective, send)
        if outcome.how == "failed":
            tune.report({"loss": WORST, "epoch": job.epochs, "failed": outcome.message})


def _metrics(point: Point, job: Job) -> dict[str, Any]:
    loss = point.loss if abs(point.loss) < WORST else WORST
    return {"loss": loss, "epoch": point.epoch, "midflight": asdict(point), "chosen": job.config}


class Book:
    """Which trial of Ray's is which of the ledger's."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.jobs: dict[str, Job] = {}
        self.failed: dict[str, str] = {}
        self.error: Exception | None = None
        """What went wrong in this process; Ray would only log it."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray writes itself down to be restored, but what is kept is the ledger."""
        return {}

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep an error of the block for later; Ray is then told to stop."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def next_jobs(self, most: int) -> list[Job]:
        """Up to so many jobs at once."""
        made = (self.search.next_job() for _ in range(most))
        return [job for job in made if job is not None]

    def heard(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Store a report; whether the trial shall go on."""
        job = self.jobs[trial_id]
        if "failed" in result:
            self.failed[trial_id] = result["failed"]
            return False
        point = Point(**result["midflight"])
        if result["chosen"] != job.config:  # cloned from another trial
            self.search.became(job.number, result["chosen"])
            moved = {n: v for n, v in result["chosen"].items() if isinstance(v, float)}
            point = replace(point, online={**moved, **point.online})
        return self.search.heard(job.number, [point])

    def ended(self, trial_id: str, epoch: int, error: bool) -> None:
        """A trial of Ray's is over."""
        job = self.jobs.pop(trial_id)
        outcome = Outcome("complete")
        if error:
            outcome = Outcome("failed", f"its worker process died {RETRIES + 1} times")
        elif trial_id in self.failed:
            outcome = Outcome("failed", self.failed[trial_id])
        elif 0 < epoch < job.epochs:
            outcome = Outcome("stopped", f"stopped by Ray after epoch {epoch}")
        self.search.ended(job.number, outcome)


class Jobs(Searcher):
    """Hands Ray the jobs of the search, one by one."""

    def __init__(self, book: Book) -> None:
        super().__init__(metric="loss", mode="min")
        self._book = book

    def suggest(self, trial_id: str) -> Any:
        job = None
        with self._book.guarded():
            job = None if self._book.error else self._book.search.next_job()
        return Searcher.FINISHED if job is None else {"job": job}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: `Watch` hears of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is what is saved."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class Stops(tune.Stopper):
    """Passes on each report; ends a trial, or when the time is up all of them."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        goes_on = False
        with self._book.guarded():
            goes_on = self._book.heard(trial_id, result)
        return not goes_on

    def stop_all(self) -> bool:
        return self._book.error is not None or self._book.search.is_over


class Watch(tune.Callback):
    """Follows the trials, and keeps their checkpoints where those of every engine are."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._book.jobs.setdefault(trial.trial_id, trial.config["job"])

    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **_: Any) -> None:
        job = self._book.jobs.get(trial.trial_id)
        if job is not None:
            job.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            part = job.checkpoint.with_suffix(".part")
            with checkpoint.as_directory() as of_ray:
                shutil.copy(Path(of_ray) / FILE, part)
            part.replace(job.checkpoint)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        with self._book.guarded():
            self._book.ended(trial.trial_id, (trial.last_result or {}).get("epoch", 0), error=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        with self._book.guarded():
            self._book.ended(trial.trial_id, 0, error=True)


def _scheduler(name: str, task: Task) -> Any:
    common: dict[str, Any] = {"time_attr": "epoch", "metric": "loss", "mode": "min"}
    if name == "asha":
        return schedulers.ASHAScheduler(max_t=task.epochs, grace_period=1, **common)
    if name == "median":
        return schedulers.MedianStoppingRule(grace_period=1, **common)
    if name == "pbt":
        return schedulers.PopulationBasedTraining(
            perturbation_interval=max(1, task.epochs // 5), custom_explore_fn=_explore(task.space), **common
        )
    return schedulers.FIFOScheduler()  # type: ignore[no-untyped-call]


def _explore(space: Space) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def explore(config: dict[str, Any]) -> dict[str, Any]:
        job: Job = config["job"]
        moved: Config = dict(job.config)
        for name, value in job.config.items():
            spec = space[name]
            if isinstance(spec, Float):
                moved[name] = _moved(spec, value)
        return {**config, "job": replace(job, config=moved)}

    return explore


def _moved(spec: Float, value: float) -> float:
    import torch

    if random.random() < RESAMPLE:
        return float(spec.transform.value(torch.tensor(random.random(), dtype=torch.float64)))
    return min(max(value * random.choice(FACTORS), spec.low), spec.high)


@contextmanager
def _cluster(address: str | None, workers: int) -> Iterator[None]:
    if ray_core.is_initialized():
        yield
        return
    if address is not None:
        _answers(address)
    try:
        ray_core.init(
            address=address or "local", num_cpus=workers if address is None else None,
            include_dashboard=False if address is None else None, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        refused = "token authentication" in str(error.__cause__)
        raise SearchError(
            f"the address must be that of a running Ray cluster, but {address}: {str(error).splitlines()[0]}."
            + " It asks for a token: set RAY_AUTH_MODE=token, and have the token in ~/.ray/auth_token."
            * refused
        ) from error
    try:
        yield
    finally:
        ray_core.shutdown()


def _answers(address: str) -> None:
    """Raise `SearchError` unless somebody listens at host:port; Ray itself would wait for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), PATIENCE):
            return
    except (OSError, ValueError) as error:
        raise SearchError(
            f"the address of a Ray cluster must be auto or host:port, but at {address} is none: {error}."
        ) from error
