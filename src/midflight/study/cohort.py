"""Train all starts of one kind of arm together, as one `Population`; a GPU study runs this way.

Such a group of arms is a cohort. Each member has the initial weights, data order and hyper-steps of the arm
run alone. The noise is drawn for all members together. Rows therefore agree with arms run alone in
distribution, but differ bit by bit; so do the remaining arms of an interrupted cohort.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midflight.datasets import ShuffledForEach, Split
from midflight.errors import NoCompiler, warn
from midflight.study.arm import (
    Batch,
    Data,
    OnEpoch,
    Runs,
    hyper_optimizer,
    noisy_mlp,
    seed_of,
    space_of,
    train,
)
from midflight.study.spec import Arm, Spec, widths
from midflight.study.store import Point, Row
from midflight.tuner import Population

MEMORY_PER_WEIGHT = 16
"""Memory of a member, in copies of its weights: optimiser state, gradients, graph, hyper-step."""
EVALUATION_BATCH = 1000
"""Images per batch of an evaluation."""


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


class Cohort(Runs):
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
        self.path = []
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
    """Return the cross-entropy; written out, because vmap decomposes F.cross_entropy slowly."""
    return _cross_entropy(model(batch[0]), batch[1])


def _loss_and_error(model: nn.Module, batch: Batch) -> Tensor:
    """Return (cross-entropy, share misclassified), shape (2,)."""
    logits = model(batch[0])
    error = (logits.argmax(1) != batch[1]).float().mean()
    return torch.stack([_cross_entropy(logits, batch[1]), error])


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return -F.log_softmax(logits, 1).gather(1, y[:, None]).mean()


def _largest_cohort(spec: Spec, network: str, inputs: int) -> int:
    """Return how many members fit into the GPU's free memory; on a CPU, the number of starts."""
    if not spec.device.startswith("cuda"):
        return max(1, spec.starts)
    sizes = [inputs, *widths(network), 10]
    member_bytes = 4 * MEMORY_PER_WEIGHT * sum(a * b + b for a, b in pairwise(sizes))
    return max(1, int(torch.cuda.mem_get_info(spec.device)[0] * 0.8 / member_bytes))
