"""Train a network and tune its weight decay, input noise and dropout during training.

T1 trains the weights. T2 tunes, stops the training early, and chooses the weights to keep. A second network
may then train on all rows with the tuned values, for the best number of passes (Luketina et al. 2016,
section 4).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch import Tensor, nn

from midflight.datasets import Shuffled, Split
from midflight.nn import Dropout, GaussianNoise
from midflight.space import Space, default_range
from midflight.tuner import Averaged, Replay, Trajectory, Tuner
from midflight.tuner.live import evaluating, weights_at

Loss = Callable[[Tensor, Tensor], Tensor]
EVALUATIONS = 50
"""Number of evaluations on all of T2 in a run."""
VALID_BATCH = 256
"""Maximal number of rows of T2 in a hyperparameter step."""
MIN_EXAMPLES = 32
"""Minimal number of rows of T1 in a hyperparameter step; default: the batch size of the training loop."""


@dataclass(frozen=True)
class Recipe:
    """The network and its training.

    Attributes:
        hidden: units of each hidden layer.
        lr: learning rate of Adam.
        batch: maximal number of rows per batch.
        steps: maximal number of steps of the tuned run.
        patience: share of `steps` without a new lowest loss on T2 after which the run ends.
        starts: initial values of weight_decay, noise and dropout.
        seed: seed of weights, batches and noise.
    """

    hidden: tuple[int, ...]
    lr: float
    batch: int
    steps: int
    patience: float
    starts: dict[str, float]
    seed: int


def space_at(starts: dict[str, float]) -> Space:
    """Return weight_decay, noise and dropout in their default ranges, with these initial values."""
    return Space({name: default_range(name, init=start) for name, start in starts.items()})


@contextmanager
def plain_torch() -> Iterator[None]:
    """Use gradients, float32 and the CPU, and keep the random state, whatever the caller has set in torch."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    # a default device slows each call, so it is set only where the caller has set another
    on_cpu = nullcontext() if device.type == "cpu" else torch.device("cpu")
    try:
        with (
            on_cpu,
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


class Training:
    """A training of the network on some rows, step by step; uses torch's global generator."""

    def __init__(self, rows: Split, outputs: int, loss: Loss, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.rows, self.loss, self.recipe = rows, loss, recipe
        self.space = space_at(recipe.starts)
        layers: list[nn.Module] = [GaussianNoise(self.space["noise"])]
        inputs = rows.x.shape[1]
        for units in recipe.hidden:
            layers += [nn.Linear(inputs, units), nn.ReLU(), Dropout(self.space["dropout"])]
            inputs = units
        self.model = nn.Sequential(*layers, nn.Linear(inputs, outputs))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.lr, fused=True)
        batch = min(recipe.batch, len(rows))
        self.pass_steps = len(rows) // batch
        self._batches = chain.from_iterable(repeat(Shuffled(rows, batch, recipe.seed + 1)))

    def step(self) -> None:
        """Take one optimiser step."""
        self.optimizer.zero_grad()
        self.loss_on(self.model, next(self._batches)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def loss_on(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of `model` on a batch."""
        return self.loss(model(batch[0]), batch[1])

    def plain(self) -> nn.Sequential:
        """Return the trained network without noise and dropout."""
        layers = (m for m in self.model if isinstance(m, nn.Linear | nn.ReLU))
        return nn.Sequential(*layers).requires_grad_(False).eval()


@dataclass(frozen=True)
class Tuned:
    """The result of a tuned run.

    Attributes:
        network: the network with the weights that T2 chose, in eval mode.
        trajectory: trajectory of weight decay, noise and dropout.
        values: their final values.
        losses: losses on T2, the lowest first; see `Tuner.finish`.
        passes: passes through T1.
        best_passes: passes through T1 until the loss on T2 was lowest.
    """

    network: nn.Sequential
    trajectory: Trajectory
    values: dict[str, float]
    losses: dict[str, float]
    passes: float
    best_passes: float


def tuned(t1: Split, t2: Split, outputs: int, loss: Loss, recipe: Recipe) -> Tuned:
    """Train on T1 and tune on T2, until the loss of the averaged weights on T2 stops falling."""
    run = Training(t1, outputs, loss, recipe)
    tuner = Tuner(
        run.model, run.optimizer, run.space, run.loss_on,
        Shuffled(t1, min(max(recipe.batch, MIN_EXAMPLES), len(t1)), recipe.seed + 3),
        Shuffled(t2, min(VALID_BATCH, len(t2)), recipe.seed + 2),
        total_steps=recipe.steps,
    )  # fmt: skip
    params = dict(run.model.named_parameters())
    between = max(1, recipe.steps // EVALUATIONS)
    best, best_step, step = math.inf, 0, 0
    while step < recipe.steps and step - best_step <= recipe.patience * recipe.steps:
        run.step()
        step += 1
        if step % between == 0:
            with torch.no_grad(), evaluating(run.model), weights_at(params, tuner.horizon.average()):
                valid_loss = float(run.loss_on(run.model, (t2.x, t2.y)))
            if valid_loss < best:
                best, best_step = valid_loss, step
    losses = tuner.finish()
    return Tuned(
        run.plain(), tuner.trajectory, run.space.as_dict(), losses,
        step / run.pass_steps, (best_step or step) / run.pass_steps,
    )  # fmt: skip


def followed(
    rows: Split, outputs: int, loss: Loss, recipe: Recipe, trajectory: Trajectory, passes: float, stop: float
) -> nn.Sequential:
    """Train for `stop` passes along a trajectory of `passes` passes; return the averaged network."""
    run = Training(rows, outputs, loss, recipe)
    steps = max(1, round(stop * run.pass_steps))
    total = max(steps, round(passes * run.pass_steps))
    replay = Replay(trajectory, run.space, run.optimizer, total_steps=total)
    average, params = Averaged(), dict(run.model.named_parameters())
    for step in range(1, steps + 1):
        run.step()
        average.follow(params, step, step / total)
    replay.detach()
    with torch.no_grad():
        for name, value in average.average().items():
            params[name].copy_(value)
    return run.plain()
