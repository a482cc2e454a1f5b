"""Train the arms of a study and measure them.

`train` is the only training loop. It trains a `SingleRun` on a CPU, and many runs as a `Cohort` on a GPU.
A cohort of one would take about 1.5 times as long as a `SingleRun` (one thread, network 300-300-300).
Each member of a cohort has the initial weights, data order and hyper-steps of the arm run alone. The noise is
drawn for all members together. Rows therefore agree with arms run alone in distribution, but differ bit by
bit; so do the remaining arms of an interrupted cohort.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midflight.datasets import Shuffled, ShuffledForEach, Split, evaluate, load
from midflight.errors import NoCompiler, warn
from midflight.nn import GaussianNoise
from midflight.space import Float, Space
from midflight.study.spec import DEFAULT, Arm, Spec, widths
from midflight.study.store import Point, Result, Row
from midflight.tuner import Every, Population, SignSteps, Tuner

Batch: TypeAlias = tuple[Tensor, Tensor]

MEMORY_PER_WEIGHT = 16
"""Memory of a member of a cohort, in copies of its weights: optimiser state, gradients, graph, hyper-step."""
EVALUATION_BATCH = 1000
"""Images per batch of an evaluation of a cohort."""


class Data(NamedTuple):
    """Hold the splits: T1 trains the weights, T2 tunes the hyperparameters, the test set is only reported."""

    t1: Split
    t2: Split
    test: Split


def prepare(spec: Spec) -> Data:
    """Load the data of a study and split it by the study's seed."""
    arrays = load(spec.dataset)
    order = np.random.default_rng(spec.seed).permutation(len(arrays.train_y))
    first, second = order[: spec.train], order[spec.train : spec.train + spec.valid]

    def split(x: Any, y: Any) -> Split:
        return Split(torch.from_numpy(x).to(spec.device), torch.from_numpy(y).to(spec.device))

    return Data(
        split(arrays.train_x[first], arrays.train_y[first]),
        split(arrays.train_x[second], arrays.train_y[second]),
        split(arrays.test_x, arrays.test_y),
    )


class EpochDone(NamedTuple):
    """Report an epoch of an arm, with the point and the validation error after it."""

    arm: Arm
    epoch: int
    point: Point
    valid_error: float


OnEpoch: TypeAlias = Callable[[EpochDone], None]


def train(
    spec: Spec,
    arms: Sequence[Arm],
    starts: Sequence[Point],
    data: Data,
    runs: "SingleRun | Cohort",
    on_epoch: OnEpoch,
) -> list[Row]:
    """Train `runs`, one per arm, and return a row per arm; runs that train together share the seconds.

    An object of runs has an `optimizer`, whose learning rate applies to all of them; `batches`, of which an
    iteration is an epoch; a `path` of (training step, `points`) after each hyperparameter step; and four
    methods: `step` takes a training step, with a hyperparameter step if one is due; `points` returns the
    current (log10 L2, noise), shape (n, 2); `evaluate` returns (mean cross-entropy, share misclassified) of
    each run; `finish` ends tuning and may replace the weights.
    """
    seconds: list[float] = []
    valid_errors: list[list[float]] = []
    for epoch in range(1, spec.epochs + 1):
        seconds.append(_seconds(spec, partial(train_epoch, runs)) / len(arms))
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
    rows = []
    for i, arm in enumerate(arms):
        result = Result(
            start=starts[i],
            end=ends[i],
            valid_loss=valid[i][0],
            valid_error=valid[i][1],
            test_error=test[i][1],
            valid_errors=[errors[i] for errors in valid_errors],
            trajectory=[[step, *points[i]] for step, points in path],
        )
        rows.append(Row(arm, result, list(seconds)))
    return rows


def train_epoch(runs: "SingleRun | Cohort") -> None:
    """Take a step per batch."""
    for batch in runs.batches:
        runs.step(batch)


def run_arm(spec: Spec, arm: Arm, start: Point, data: Data, on_epoch: OnEpoch) -> Row:
    """Train one arm from the hyperparameters `start`.

    Equal arguments give an equal `Result` on the same machine, in any process and any order.
    """
    (row,) = train(spec, [arm], [start], data, SingleRun(spec, arm, start, data), on_epoch)
    return row


class SingleRun:
    """Train one run in a plain loop over an optimiser, beside a `Tuner` if the arm is tuned."""

    def __init__(self, spec: Spec, arm: Arm, start: Point, data: Data) -> None:
        seed = seed_of(spec, arm)
        torch.manual_seed(seed)
        self._space = space_of(spec, start)
        self._model = noisy_mlp(spec, arm, data.t1.x.shape[1], self._space)
        l2 = float(self._space["weight_decay"])
        self.optimizer = torch.optim.Adam(self._model.parameters(), lr=spec.lr, weight_decay=l2, fused=True)
        self.batches, t2 = Shuffled(data.t1, spec.batch, seed), Shuffled(data.t2, spec.batch, seed + 1)
        self.path: list[tuple[int, Tensor]] = []
        self._tuner = None
        if arm.kind == "tuned":
            paper: dict[str, Any] = {
                "schedule": Every(spec.every), "estimator": arm.estimator, "horizon": "step",
                "hyper_optimizer": hyper_optimizer(spec),
            }  # fmt: skip
            self._tuner = Tuner(
                self._model, self.optimizer, self._space, loss_fn, self.batches, t2,
                total_steps=spec.steps(), **{} if arm.estimator == DEFAULT else paper,
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


def cohorts(spec: Spec, arms: Sequence[Arm], inputs: int) -> Iterator[list[Arm]]:
    """Group the arms into cohorts that fit into memory; re-runs come after their tuned arms."""
    order = ("initial", "tuned", "rerun", "landscape")

    def kind(arm: Arm) -> tuple[int, int, int]:
        estimator = spec.estimator.index(arm.estimator) if arm.estimator else 0
        return spec.networks.index(arm.network), order.index(arm.kind), estimator

    for _, group in groupby(sorted(arms, key=kind), kind):
        members = list(group)
        size = _largest_cohort(spec, members[0].network, inputs)
        yield from (members[i : i + size] for i in range(0, len(members), size))


def run_cohort(
    spec: Spec, arms: Sequence[Arm], starts: Sequence[Point], data: Data, on_epoch: OnEpoch
) -> list[Row]:
    """Train arms of one network, kind and estimator together, each from its own hyperparameters."""
    return train(spec, arms, starts, data, Cohort(spec, arms, starts, data), on_epoch)


class Cohort:
    """Train one run per arm, as the members of a `Population`."""

    def __init__(self, spec: Spec, arms: Sequence[Arm], starts: Sequence[Point], data: Data) -> None:
        first, seeds = arms[0], [seed_of(spec, arm) for arm in arms]
        torch.manual_seed(seeds[0])
        spaces = [space_of(spec, start) for start in starts]
        self._every = spec.every if first.kind == "tuned" else spec.steps() + 1
        self._population = _compiled_if_possible(
            spec,
            len(starts),
            partial(noisy_mlp, spec, first, data.t1.x.shape[1]),
            spaces[0],
            partial(torch.optim.Adam, lr=spec.lr),
            loss_fn=_loss,
            valid_loader=ShuffledForEach(data.t2, spec.batch, [seed + 1 for seed in seeds]),
            starts={name: [float(space[name]) for space in spaces] for name in spaces[0]},
            seeds=seeds,
            schedule=self._every,
            estimator=first.estimator or "one_step",
            total_steps=spec.steps(),
            hyper_optimizer=hyper_optimizer(spec),
        )
        self.optimizer = self._population.optimizer
        self.batches = ShuffledForEach(data.t1, spec.batch, seeds)
        self.path: list[tuple[int, Tensor]] = []
        self._steps = 0

    def step(self, batch: Batch) -> None:
        self._population.step(batch)
        self._steps += 1
        if self._steps % self._every == 0:
            self.path.append((self._steps, self.points()))

    def points(self) -> Tensor:
        values = self._population.values
        return torch.stack([values["weight_decay"].log10(), values["noise"]], 1)

    def evaluate(self, split: Split) -> list[tuple[float, float]]:
        n = self._population.n
        total = torch.zeros(n, 2, device=split.x.device, dtype=torch.float64)
        for start in range(0, len(split), EVALUATION_BATCH):
            x, y = split.x[start : start + EVALUATION_BATCH], split.y[start : start + EVALUATION_BATCH]
            batch = x.expand(n, *x.shape), y.expand(n, *y.shape)
            total += len(y) * self._population.evaluate(_loss_and_error, batch)
        return [(loss, error) for loss, error in (total / len(split)).tolist()]

    def finish(self) -> None:
        """Keep the weights; only a `Tuner` replaces them."""


def _compiled_if_possible(spec: Spec, *args: Any, **options: Any) -> Population:
    """Compile on a GPU, which is two to three times faster; needs Triton and a C++ compiler."""
    if spec.device != "cpu":
        try:
            return Population(*args, **options, compile=True)
        except NoCompiler as error:
            warn(f"the study continues without compilation, so it is slower: {error}")
    return Population(*args, **options)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return _cross_entropy(model(batch[0]), batch[1])


def _loss_and_error(model: nn.Module, batch: Batch) -> Tensor:
    """Return (cross-entropy, share misclassified), shape (2,)."""
    logits = model(batch[0])
    error = (logits.argmax(1) != batch[1]).float().mean()
    return torch.stack([_cross_entropy(logits, batch[1]), error])


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean, written out, because vmap decomposes F.cross_entropy slowly."""
    return -F.log_softmax(logits, 1).gather(1, y[:, None]).mean()


def _largest_cohort(spec: Spec, network: str, inputs: int) -> int:
    """Return how many members fit into the GPU's free memory; on a CPU, the number of starts."""
    if not spec.device.startswith("cuda"):
        return max(1, spec.starts)
    sizes = [inputs, *widths(network), 10]
    member_bytes = 4 * MEMORY_PER_WEIGHT * sum(a * b + b for a, b in pairwise(sizes))
    return max(1, int(torch.cuda.mem_get_info(spec.device)[0] * 0.8 / member_bytes))


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
