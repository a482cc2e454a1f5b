"""Run Ray Tune's population-based training, which trains for real, because no table of fixed runs fits it.

As in Ray's guide, members are compared every 5 reports, of 27 per training. Other options are defaults.
"""

import os
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lattice import CHECKPOINTS
from tasks import HIGH, LOW, Training, one_thread

NAMES = ("l2", "noise")


def pbt(task: str, seed: int, population: int, workers: int) -> tuple[float, float, float]:
    """Return [trainings paid for, validation loss, test error] of the best model of any member so far."""
    warnings.simplefilter("ignore")
    for name in ("RAY_AIR_NEW_OUTPUT", "RAY_USAGE_STATS_ENABLED"):
        os.environ[name] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # Ray's default of 15 nearly stops members when other work runs on the same cores
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    import ray
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    if not ray.is_initialized():
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # inherited by the members' processes
        ray.init(
            "local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )

    class Member(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            one_thread()
            self.reset_config(config)

        def reset_config(self, config: dict[str, Any]) -> bool:
            inside = [min(hi, max(lo, config[n])) for n, lo, hi in zip(NAMES, LOW, HIGH, strict=True)]
            self.run, self.done = Training(task, (inside[0], inside[1])), 0
            self.best = float("inf"), float("nan")
            return True

        def step(self) -> dict[str, Any]:
            for _ in range(self._steps(self.done), self._steps(self.done + 1)):
                self.run.step()
            self.done += 1
            valid = self.run.valid_loss()
            if valid < self.best[0]:
                self.best = valid, self.run.test_error()  # read for the best weights only
            return {"valid": min(valid, 1e6) if valid == valid else 1e6, "test": self.best[1]}

        def save_checkpoint(self, folder: str) -> None:
            torch.save({"run": self.run.state_dict(), "done": self.done}, Path(folder) / "member.pt")

        def load_checkpoint(self, folder: str) -> None:
            state = torch.load(Path(folder) / "member.pt")
            self.run.load_state_dict(state["run"])
            self.done = state["done"]

        def _steps(self, checkpoint: int) -> int:
            return round(self.run.steps * checkpoint / CHECKPOINTS)

    class Watch(tune.Callback):
        best, parts = (float("inf"), float("nan")), 0

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            self.parts += 1
            self.best = min(self.best, (result["valid"], result["test"]))

    random.seed(seed)
    np.random.seed(seed)  # Ray's scheduler uses both generators
    watch = Watch()
    ranges = {name: tune.uniform(low, high) for name, low, high in zip(NAMES, LOW, HIGH, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            tune.with_resources(Member, {"cpu": 1}),
            param_space=ranges,
            tune_config=tune.TuneConfig(
                num_samples=population, reuse_actors=True,
                search_alg=tune.search.BasicVariantGenerator(random_state=seed),
                scheduler=PopulationBasedTraining(
                    time_attr="training_iteration", metric="valid", mode="min", perturbation_interval=5,
                    hyperparam_mutations=ranges,
                ),
            ),
            run_config=tune.RunConfig(
                storage_path=folder, verbose=0, callbacks=[watch], stop={"training_iteration": CHECKPOINTS},
            ),
        ).fit()  # fmt: skip
    return watch.parts / CHECKPOINTS, *watch.best
