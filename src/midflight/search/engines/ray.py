"""Ray Tune: run trials on a cluster; one of Ray's schedulers ends or clones them.

Optuna proposes trials by TPE, or at random for population-based training. Ray runs and schedules them. This
process keeps the ledger: a searcher gives Ray the jobs; a stopper and a callback receive their reports. A
trial that Ray moves, pauses or restarts continues from Ray's checkpoint.

Population-based training (Jaderberg et al. 2017) replaces a bad trial by a copy of a good one and perturbs
its searched `Float`s by Ray's default rule. An `Int` or `Categorical` stays the same, because a network
cannot change it during training.
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
from midflight.search.engine import Engine, Task
from midflight.search.engines.optuna import tpe
from midflight.search.errors import SearchError
from midflight.search.jobs import Search
from midflight.search.space import Config, Space
from midflight.search.trial import Job, Objective, Outcome, run_job
from midflight.space import Float

for _name in ("RAY_USAGE_STATS_ENABLED", "RAY_AIR_NEW_OUTPUT"):
    os.environ.setdefault(_name, "0")
# otherwise Ray writes its own logs, intercepts Ctrl-C, and warns about a future default
for _name in ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_DISABLE_SIGINT_HANDLER"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray's default of 15 nearly stops trials when other work runs on the same cores
os.environ.setdefault("RAY_worker_niceness", "0")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray as ray_core
    from ray import tune
    from ray.tune import schedulers
    from ray.tune.search import Searcher

FILE = "training.pt"
WORST = 1e30  # replaces a loss that is not finite for Ray's schedulers
RETRIES = 2  # restarts of a trial, as `jobs.MAX_DEATHS - 1`
CONNECT_TIMEOUT = 5.0  # seconds for a cluster's address to answer
RESAMPLE, FACTORS = 0.25, (1.2, 0.8)  # Ray's defaults for population-based training
SCHEDULERS = ("asha", "median", "pbt", "fifo")


def ray(task: Task, address: str | None = None, scheduler: str = "asha") -> Engine:
    """Ray Tune on the cluster at `address`, or on a local one that is started for the search."""
    if scheduler not in SCHEDULERS:
        raise UnknownName("a scheduler of Ray", scheduler, SCHEDULERS)
    if scheduler == "pbt" and task.trials is None:
        raise SearchError("population-based training needs trials=, which is its population size.")

    def drive(search: Search, objective: Objective, workers: int) -> None:
        with _cluster(address, workers), tempfile.TemporaryDirectory() as folder:
            # the machines of a cluster exchange checkpoints through a shared folder
            storage = Path(folder) if address is None else search.ledger.folder.resolve() / "ray"
            _fit(search, objective, workers, task, scheduler, storage)

    sampler = optuna.samplers.RandomSampler(seed=task.seed) if scheduler == "pbt" else tpe(task).sampler
    return Engine(sampler, optuna.pruners.NopPruner(), drive=drive)


def _fit(
    search: Search, objective: Objective, workers: int, task: Task, scheduler: str, storage: Path
) -> None:
    random.seed(task.seed)  # Ray's schedulers use it
    trials = RayTrials(search)
    how: dict[str, Any] = {"search_alg": JobSearcher(trials), "num_samples": -1}
    how["max_concurrent_trials"] = workers
    space: dict[str, Any] = {}
    if scheduler == "pbt":  # the whole population starts at once
        jobs = trials.next_jobs(task.trials or 0)
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
            name=uuid.uuid4().hex, storage_path=str(storage), verbose=0, stop=ReportStopper(trials),
            callbacks=[TrialCallback(trials)], failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )  # fmt: skip
    tuner.fit()
    if trials.error is not None:
        raise trials.error


def train(config: dict[str, Any], objective: Objective) -> None:
    """Run a trial in an actor of Ray."""
    job: Job = config["job"]
    with tempfile.TemporaryDirectory() as folder:
        file, reported = Path(folder) / FILE, 0
        given = tune.get_checkpoint()
        if given is not None:
            with given.as_directory() as of_ray:
                shutil.copy(Path(of_ray) / FILE, file)
            saved = checkpoint.load(file)
            reported = saved.points[-1].epoch if saved else 0
        elif job.checkpoint.is_file():
            shutil.copy(job.checkpoint, file)

        def send(points: list[Point]) -> bool:
            for point in points:
                if point.epoch > reported:
                    state = tune.Checkpoint.from_directory(folder) if file.is_file() else None
                    tune.report(_metrics(point, job), checkpoint=state)
            return True

        outcome = run_job(replace(job, checkpoint=file), objective, send)
        if outcome.how == "failed":
            tune.report({"loss": WORST, "epoch": job.epochs, "failed": outcome.message})


def _metrics(point: Point, job: Job) -> dict[str, Any]:
    loss = point.loss if abs(point.loss) < WORST else WORST
    return {"loss": loss, "epoch": point.epoch, "midflight": asdict(point), "chosen": job.config}


class RayTrials:
    """Maps Ray's trials to the jobs of the search."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.jobs: dict[str, Job] = {}
        self.failed: dict[str, str] = {}
        self.error: Exception | None = None
        """The first error in this process, which Ray would only log."""

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing when Ray saves its state, because the ledger stores the trials."""
        return {}

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep an error of the block until Ray has stopped."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def next_jobs(self, most: int) -> list[Job]:
        """Return up to `most` jobs."""
        jobs = (self.search.next_job() for _ in range(most))
        return [job for job in jobs if job is not None]

    def on_report(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Store a report; return whether the trial continues."""
        job = self.jobs[trial_id]
        if "failed" in result:
            self.failed[trial_id] = result["failed"]
            return False
        point = Point(**result["midflight"])
        if result["chosen"] != job.config:  # cloned from another trial
            self.search.on_new_config(job.number, result["chosen"])
            moved = {n: v for n, v in result["chosen"].items() if isinstance(v, float)}
            point = replace(point, online={**moved, **point.online})
        return self.search.on_report(job.number, [point])

    def on_end(self, trial_id: str, epoch: int, error: bool) -> None:
        """Store how a trial ended."""
        job = self.jobs.pop(trial_id)
        outcome = Outcome("complete")
        if error:
            outcome = Outcome("failed", f"its worker process died {RETRIES + 1} times")
        elif trial_id in self.failed:
            outcome = Outcome("failed", self.failed[trial_id])
        elif 0 < epoch < job.epochs:
            outcome = Outcome("stopped", f"stopped by Ray after epoch {epoch}")
        self.search.on_end(job.number, outcome)


class JobSearcher(Searcher):
    """Gives Ray the jobs of the search, one by one."""

    def __init__(self, trials: RayTrials) -> None:
        super().__init__(metric="loss", mode="min")
        self._trials = trials

    def suggest(self, trial_id: str) -> Any:
        job = None
        with self._trials.guarded():
            job = None if self._trials.error else self._trials.search.next_job()
        return Searcher.FINISHED if job is None else {"job": job}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing; `TrialCallback` handles it."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing; the ledger stores the trials."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""


class ReportStopper(tune.Stopper):
    """Passes each report to the search; ends single trials, and all of them when the time is up."""

    def __init__(self, trials: RayTrials) -> None:
        self._trials = trials

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        continues = False
        with self._trials.guarded():
            continues = self._trials.on_report(trial_id, result)
        return not continues

    def stop_all(self) -> bool:
        return self._trials.error is not None or self._trials.search.is_over


class TrialCallback(tune.Callback):
    """Records starts and ends of trials, and copies their checkpoints to the search's folder."""

    def __init__(self, trials: RayTrials) -> None:
        self._trials = trials

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._trials.jobs.setdefault(trial.trial_id, trial.config["job"])

    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **_: Any) -> None:
        job = self._trials.jobs.get(trial.trial_id)
        if job is not None:
            job.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            part = job.checkpoint.with_suffix(".part")
            with checkpoint.as_directory() as of_ray:
                shutil.copy(Path(of_ray) / FILE, part)
            part.replace(job.checkpoint)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        with self._trials.guarded():
            self._trials.on_end(trial.trial_id, (trial.last_result or {}).get("epoch", 0), error=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        with self._trials.guarded():
            self._trials.on_end(trial.trial_id, 0, error=True)


def _scheduler(name: str, task: Task) -> Any:
    common: dict[str, Any] = {"time_attr": "epoch", "metric": "loss", "mode": "min"}
    if name == "asha":
        return schedulers.ASHAScheduler(max_t=task.epochs, grace_period=1, **common)
    if name == "median":
        return schedulers.MedianStoppingRule(grace_period=1, **common)
    if name == "pbt":
        return schedulers.PopulationBasedTraining(
            perturbation_interval=max(1, task.epochs // 5),
            custom_explore_fn=_perturbation(task.space),
            **common,
        )
    return schedulers.FIFOScheduler()  # type: ignore[no-untyped-call]


def _perturbation(space: Space) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def explore(config: dict[str, Any]) -> dict[str, Any]:
        job: Job = config["job"]
        moved: Config = dict(job.config)
        for name, value in job.config.items():
            spec = space[name]
            if isinstance(spec, Float):
                moved[name] = _perturbed(spec, value)
        return {**config, "job": replace(job, config=moved)}

    return explore


def _perturbed(spec: Float, value: float) -> float:
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
        _check_address(address)
    try:
        ray_core.init(
            address=address or "local", num_cpus=workers if address is None else None,
            include_dashboard=False if address is None else None, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        refused = "token authentication" in str(error.__cause__)
        raise SearchError(
            f"the address must be that of a running Ray cluster, but {address} is not: "
            + f"{str(error).splitlines()[0]}."
            + " It requires a token: set RAY_AUTH_MODE=token and write the token to ~/.ray/auth_token."
            * refused
        ) from error
    try:
        yield
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
    except (OSError, ValueError) as error:
        raise SearchError(
            f"the address of a Ray cluster must be auto or host:port, but {address} does not answer: {error}."
        ) from error
