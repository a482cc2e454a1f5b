"""A network whose weight decay, input noise and dropout are tuned while it trains.

The rows are split in two. T1 updates the weights; T2 tunes, says how long to train, and chooses the
weights to keep. A second network may then follow the tuned values on all rows, for as many passes as
were best (Luketina et al. 2016, section 4).
"""

import math
from collections.abc import Callable
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
LOOKS = 50
"""So often in a run the loss on all of T2 is looked at."""
VALID_BATCH = 256
"""Rows of T2 in a hyper-step, at most."""
EXAMPLES = 32
"""Rows of T1 in a hyper-step, at least. Otherwise as many as in a step of the loop, which the tuner takes for
granted: it counts its examples for their share of that step's gradient."""


@dataclass(frozen=True)
class Recipe:
    """What the network is and how it is trained.

    Attributes:
        hidden: units of each hidden layer.
        lr: learning rate of Adam.
        batch: rows of a step, at most.
        steps: of the tuned run, at most.
        patience: share of the steps that T2's loss may go without a new best before the run ends.
        starts: weight_decay, noise and dropout, from which they are tuned.
        seed: of weights, batches and noise.
    """

    hidden: tuple[int, ...]
    lr: float
    batch: int
    steps: int
    patience: float
    starts: dict[str, float]
    seed: int


def space_at(starts: dict[str, float]) -> Space:
    """weight_decay, noise and dropout in their default ranges, each at its start."""
    return Space({name: default_range(name, init=start) for name, start in starts.items()})


def warm_up() -> None:
    """Have torch import what it leaves until its first optimiser: an alarm in the middle would break it."""
    torch.optim.Adam([torch.zeros(1)])


class Training:
    """One training of the network on some rows, a step at a time; draws from torch's global generator."""

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
        """One optimiser step."""
        self.optimizer.zero_grad()
        self.loss_on(self.model, next(self._batches)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def loss_on(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of `model` on a batch."""
        return self.loss(model(batch[0]), batch[1])

    def plain(self) -> nn.Sequential:
        """The trained network without what only training needs."""
        kept = (m for m in self.model if isinstance(m, nn.Linear | nn.ReLU))
        return nn.Sequential(*kept).requires_grad_(False).eval()


@dataclass(frozen=True)
class Tuned:
    """What a tuned run leaves.

    Attributes:
        network: with the weights that T2 chose, in eval mode.
        trajectory: of weight decay, noise and dropout.
        values: where they ended.
        losses: on T2, the best first; see `Tuner.finish`.
        passes: through T1 in the whole run.
        best_passes: after which the loss on T2 was least.
    """

    network: nn.Sequential
    trajectory: Trajectory
    values: dict[str, float]
    losses: dict[str, float]
    passes: float
    best_passes: float


def tuned(t1: Split, t2: Split, outputs: int, loss: Loss, recipe: Recipe) -> Tuned:
    """Train on T1 while T2 tunes, until T2's loss at the averaged weights has had no new best for a while."""
    run = Training(t1, outputs, loss, recipe)
    tuner = Tuner(
        run.model, run.optimizer, run.space, run.loss_on,
        Shuffled(t1, min(max(recipe.batch, EXAMPLES), len(t1)), recipe.seed + 3),
        Shuffled(t2, min(VALID_BATCH, len(t2)), recipe.seed + 2),
        total_steps=recipe.steps,
    )  # fmt: skip
    params = dict(run.model.named_parameters())
    between = max(1, recipe.steps // LOOKS)
    best, best_step, step = math.inf, 0, 0
    while step < recipe.steps and step - best_step <= recipe.patience * recipe.steps:
        run.step()
        step += 1
        if step % between == 0:
            with torch.no_grad(), evaluating(run.model), weights_at(params, tuner.horizon.average()):
                now = float(run.loss_on(run.model, (t2.x, t2.y)))
            if now < best:
                best, best_step = now, step
    losses = tuner.finish()
    return Tuned(
        run.plain(), tuner.trajectory, run.space.as_dict(), losses,
        step / run.pass_steps, (best_step or step) / run.pass_steps,
    )  # fmt: skip


def followed(
    rows: Split, outputs: int, loss: Loss, recipe: Recipe, trajectory: Trajectory, passes: float, stop: float
) -> nn.Sequential:
    """A network trained along a trajectory of `passes` passes, for `stop` of them; its averaged weights."""
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
