"""Train the arms of a study and measure them.

`train` is the only training loop. It trains a `SingleRun` on a CPU, and many runs as a `Cohort` on a GPU.
A cohort of one would take about 1.5 times as long as a `SingleRun` (one thread, network 300-300-300).
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midflight.datasets import Shuffled, Split, evaluate, load
from midflight.nn import GaussianNoise
from midflight.space import Float, Space
from midflight.study.spec import DEFAULT, Arm, Spec, SpecError, widths
from midflight.study.store import Point, Result, Row
from midflight.tuner import Every, SignSteps, Tuner

Batch: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Hold the splits: T1 trains the weights, T2 tunes the hyperparameters, the test set is only reported."""

    t1: Split
    t2: Split
    test: Split


def prepare(spec: Spec) -> Data:
    """Load the data of a study and split it by the study's seed.

    Raises:
        SpecError: the dataset has fewer than train + valid images.
    """
    arrays = load(spec.dataset)
    if spec.train + spec.valid > len(arrays.train_y):
        raise SpecError(
            f"train + valid must be at most {len(arrays.train_y)} for {spec.dataset}, "
            f"but got {spec.train} + {spec.valid}."
        )
    order = np.random.default_rng(spec.seed).permutation(len(arrays.train_y))
    first, second = order[: spec.train], order[spec.train : spec.train + spec.valid]

    def split(x: Any, y: Any) -> Split:
        return Split(torch.from_numpy(x).to(spec.device), torch.from_numpy(y).to(spec.device))

    return Data(
        split(arrays.train_x[first], arrays.train_y[first]),
        split(arrays.train_x[second], arrays.train_y[second]),
        split(arrays.test_x, arrays.test_y),
    )


@dataclass(frozen=True)
class EpochDone:
    """Report an epoch of an arm, with the point and the validation error after it."""

    arm: Arm
    epoch: int
    point: Point
    valid_error: float


OnEpoch: TypeAlias = Callable[[EpochDone], None]


class Runs(ABC):
    """Advance n training runs together.

    Attributes:
        optimizer: steps the weights; its learning rate applies to all runs.
        batches: batches of T1; an iteration is an epoch.
        path: (training step, `points`) after each hyperparameter step.
    """

    optimizer: torch.optim.Optimizer
    batches: Iterable[Batch]
    path: list[tuple[int, Tensor]]

    @abstractmethod
    def step(self, batch: Batch) -> None:
        """Take a training step, with a hyperparameter step if one is due."""

    @abstractmethod
    def points(self) -> Tensor:
        """Return the current (log10 L2, noise), shape (n, 2)."""

    @abstractmethod
    def evaluate(self, split: Split) -> list[tuple[float, float]]:
        """Return (mean cross-entropy, share misclassified) of each run."""

    @abstractmethod
    def finish(self) -> None:
        """End tuning; this may replace the weights."""

    def train_epoch(self) -> None:
        """Take a step per batch."""
        for batch in self.batches:
            self.step(batch)


def train(
    spec: Spec, arms: Sequence[Arm], starts: Sequence[Point], data: Data, runs: Runs, on_epoch: OnEpoch
) -> list[Row]:
    """Train `runs`, one per arm, and return a row per arm; runs that train together share the seconds."""
    seconds: list[float] = []
    valid_errors: list[list[float]] = []
    for epoch in range(1, spec.epochs + 1):
        seconds.append(_seconds(spec, runs.train_epoch) / len(arms))
        for group in runs.optimizer.param_groups:
            group["lr"] *= spec.lr_end ** (1 / spec.epochs)
        valid_errors.append([error for _, error in runs.evaluate(data.t2)])
        for arm, (l2, noise), error in zip(arms, runs.points().tolist(), valid_errors[-1], strict=True):
            on_epoch(EpochDone(arm, epoch, (l2, noise), error))
    seconds[-1] += _seconds(spec, runs.finish) / len(arms)

    ends = [(l2, noise) for l2, noise in runs.points().tolist()] if arms[0].kind == "tuned" else starts
    valid, path = runs.evaluate(data.t2), [(step, points.tolist()) for step, points in runs.path]
    unread = [(None, None)] * len(arms)  # the landscape leaves the test set alone
    test = unread if arms[0].kind == "landscape" else runs.evaluate(data.test)
    results = [
        Result(
            start=starts[i],
            end=ends[i],
            valid_loss=valid[i][0],
            valid_error=valid[i][1],
            test_error=test[i][1],
            valid_errors=[errors[i] for errors in valid_errors],
            trajectory=[[step, *points[i]] for step, points in path],
        )
        for i in range(len(arms))
    ]
    return [Row(arm, result, list(seconds)) for arm, result in zip(arms, results, strict=True)]


def run_arm(spec: Spec, arm: Arm, start: Point, data: Data, on_epoch: OnEpoch) -> Row:
    """Train one arm from the hyperparameters `start`.

    Equal arguments give an equal `Result` on the same machine, in any process and any order.
    """
    (row,) = train(spec, [arm], [start], data, SingleRun(spec, arm, start, data), on_epoch)
    return row


class SingleRun(Runs):
    """Train one run in a plain loop over an optimiser, beside a `Tuner` if the arm is tuned."""

    def __init__(self, spec: Spec, arm: Arm, start: Point, data: Data) -> None:
        seed = seed_of(spec, arm)
        torch.manual_seed(seed)
        self._space = space_of(spec, start)
        self._model = noisy_mlp(spec, arm, data.t1.x.shape[1], self._space)
        l2 = float(self._space["weight_decay"])
        self.optimizer = torch.optim.Adam(self._model.parameters(), lr=spec.lr, weight_decay=l2, fused=True)
        self.batches, t2 = Shuffled(data.t1, spec.batch, seed), Shuffled(data.t2, spec.batch, seed + 1)
        self.path = []
        self._tuner = None
        if arm.kind == "tuned":
            self._tuner = Tuner(
                self._model, self.optimizer, self._space, loss_fn, self.batches, t2,
                total_steps=spec.steps(), **_tuner_options(spec, arm),
                on_hyperstep=lambda step, _: self.path.append((step, self.points())),
            )  # fmt: skip

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        loss_fn(self._model, batch).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def points(self) -> Tensor:
        l2 = float(self._space["weight_decay"].value.detach().log10())
        return torch.tensor([[l2, float(self._space["noise"])]], dtype=torch.float64)

    def evaluate(self, split: Split) -> list[tuple[float, float]]:
        return [evaluate(self._model, split)]

    def finish(self) -> None:
        if self._tuner is not None:
            self._tuner.finish()


def mlp(inputs: int, hidden: list[int], classes: int) -> nn.Sequential:
    """Return a ReLU network; its last layer gives logits."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def noisy_mlp(spec: Spec, arm: Arm, inputs: int, space: Space) -> nn.Sequential:
    """Return the network of an arm, with the noise of `space` on its inputs."""
    # the floor keeps the derivative from vanishing; low, because the paper draws noise at the tuned level
    noise = GaussianNoise(space["noise"], floor=0.01 * space["noise"].spec.high)
    return nn.Sequential(noise, mlp(inputs, widths(arm.network), classes=10)).to(spec.device)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a batch (x, y)."""
    return F.cross_entropy(model(batch[0]), batch[1])


def _tuner_options(spec: Spec, arm: Arm) -> dict[str, Any]:
    """Return the paper's settings for an estimator: evenly spaced hyper-steps, horizon of one step."""
    if arm.estimator == DEFAULT:
        return {}
    return {
        "schedule": Every(spec.every),
        "estimator": arm.estimator,
        "horizon": "step",
        "hyper_optimizer": hyper_optimizer(spec),
    }


def hyper_optimizer(spec: Spec) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Return the constructor of the optimiser that moves the hyperparameters."""
    if spec.hyper_optimizer == "adam":
        return partial(torch.optim.Adam, lr=spec.hyper_lr)
    return partial(SignSteps, lr=spec.hyper_lr, agreement=0.0)


def space_of(spec: Spec, start: Point) -> Space:
    """Return the two hyperparameters with their values at `start`."""
    (l2_low, l2_high), (noise_low, noise_high) = spec.intervals()
    # a re-run may start on a bound that float32 rounded outwards
    l2, noise = (min(max(x, low), high) for x, (low, high) in zip(start, spec.intervals(), strict=True))
    return Space(
        weight_decay=Float(10**l2_low, 10**l2_high, log=True, init=10**l2),
        noise=Float(noise_low, noise_high, init=noise),
    )


def seed_of(spec: Spec, arm: Arm) -> int:
    """Return the seed of weights and batches: one per start, and one for the whole landscape."""
    index = 0 if arm.kind == "landscape" else arm.index
    return int(np.random.default_rng([spec.seed, index, 1]).integers(2**32))


def _seconds(spec: Spec, work: Callable[[], None]) -> float:
    """Return the seconds of `work`, with what it left running on the GPU."""
    began = time.perf_counter()
    work()
    if spec.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began
