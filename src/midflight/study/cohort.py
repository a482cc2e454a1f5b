"""Train all starts of one kind of arm together, as one `Population`; a GPU study runs this way.

Such a group of arms is a cohort. Each member has the initial weights, data order and hyper-steps of the arm
run alone. The noise is drawn for all members together. Rows therefore agree with arms run alone in
distribution, but differ bit by bit; so do the remaining arms of an interrupted cohort.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midflight.datasets import ShuffledForEach, Split
from midflight.errors import NoCompiler
from midflight.study.arm import Data, Point, device_time, hyper_optimizer, noisy_mlp, seed_of, space_of
from midflight.study.spec import Arm, Spec, widths
from midflight.study.store import Result, Row
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
    spec: Spec,
    arms: Sequence[Arm],
    starts: Sequence[Point],
    data: Data,
    on_epoch: Callable[[Arm, int, Point, float], None],
) -> list[Row]:
    """Train arms of one network, kind and estimator together, each from its own hyperparameters.

    Args:
        on_epoch: called per epoch and arm with (arm, epochs done, current point, validation error).

    Returns:
        One row per arm. The seconds of the cohort are shared equally.
    """
    first, n = arms[0], len(arms)
    tuned = first.kind == "tuned"
    seeds = [seed_of(spec, arm) for arm in arms]
    population = _population(spec, first, starts, data, seeds)
    batches = ShuffledForEach(data.t1, spec.batch, seeds)
    paths: list[tuple[int, Tensor]] = []
    valid_errors: list[list[float]] = []
    seconds: list[float] = []
    step = 0
    for epoch in range(spec.epochs):
        began = device_time(spec)
        for batch in batches:
            population.step(batch)
            step += 1
            if tuned and step % spec.every == 0:
                paths.append((step, _points(population)))
        seconds.append((device_time(spec) - began) / n)
        for group in population.optimizer.param_groups:
            group["lr"] *= spec.lr_end ** (1 / spec.epochs)
        valid_errors.append(_mean(population, _error, data.t2))
        for arm, point, error in zip(arms, _points(population).tolist(), valid_errors[-1], strict=True):
            on_epoch(arm, epoch + 1, (point[0], point[1]), error)

    ends = [(l2, noise) for l2, noise in _points(population).tolist()] if tuned else starts
    losses = _mean(population, _loss, data.t2)
    test_errors = [None] * n if first.kind == "landscape" else _mean(population, _error, data.test)
    results = [
        Result(start, end, loss, errors[-1], test_error, list(errors), [])
        for start, end, loss, test_error, *errors in zip(
            starts, ends, losses, test_errors, *valid_errors, strict=True
        )
    ]
    for step, points in paths:
        for result, point in zip(results, points.tolist(), strict=True):
            result.trajectory.append([step, *point])
    return [Row(arm, result, seconds) for arm, result in zip(arms, results, strict=True)]


def _population(
    spec: Spec, first: Arm, starts: Sequence[Point], data: Data, seeds: Sequence[int]
) -> Population:
    """Return one member per start, with the networks and the estimator of `first`."""
    torch.manual_seed(seeds[0])
    spaces = [space_of(spec, start) for start in starts]
    return _compiled_if_possible(
        spec,
        len(starts),
        partial(noisy_mlp, spec, first, data.t1.x.shape[1]),
        spaces[0],
        partial(torch.optim.Adam, lr=spec.lr),
        loss_fn=_loss,
        valid_loader=ShuffledForEach(data.t2, spec.batch, [seed + 1 for seed in seeds]),
        starts={name: [float(space[name]) for space in spaces] for name in spaces[0]},
        seeds=seeds,
        schedule=spec.every if first.kind == "tuned" else spec.steps() + 1,
        estimator=first.estimator or "one_step",
        total_steps=spec.steps(),
        hyper_optimizer=hyper_optimizer(spec),
    )


def _compiled_if_possible(spec: Spec, *args: Any, **options: Any) -> Population:
    """Compile on a GPU, which is two to three times faster; needs Triton and a C++ compiler."""
    if spec.device != "cpu":
        try:
            return Population(*args, **options, compile=True)
        except NoCompiler as error:
            warnings.warn(f"the study continues without compilation, so it is slower: {error}", stacklevel=2)
    return Population(*args, **options)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy; written out, because vmap decomposes F.cross_entropy slowly."""
    return -F.log_softmax(model(batch[0]), 1).gather(1, batch[1][:, None]).mean()


def _error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    wrong: Tensor = model(batch[0]).argmax(1) != batch[1]
    return wrong.float().mean()


def _mean(population: Population, function: Callable[..., Tensor], split: Split) -> list[float]:
    """Return the mean of `function` over all images, for each member."""
    total = torch.zeros(population.n, device=split.x.device, dtype=torch.float64)
    pieces = zip(torch.split(split.x, EVALUATION_BATCH), torch.split(split.y, EVALUATION_BATCH), strict=True)
    for x, y in pieces:
        batch = x.expand(population.n, *x.shape), y.expand(population.n, *y.shape)
        total += len(y) * population.evaluate(function, batch)
    means: list[float] = (total / len(split)).tolist()
    return means


def _points(population: Population) -> Tensor:
    """Return (log10 L2, noise) of each member, shape (n, 2)."""
    values = population.values
    return torch.stack([values["weight_decay"].log10(), values["noise"]], 1)


def _largest_cohort(spec: Spec, network: str, inputs: int) -> int:
    """Return how many members fit into the GPU's free memory; on a CPU, the number of starts."""
    if not spec.device.startswith("cuda"):
        return max(1, spec.starts)
    sizes = [inputs, *widths(network), 10]
    member_bytes = 4 * MEMORY_PER_WEIGHT * sum(a * b + b for a, b in pairwise(sizes))
    return max(1, int(torch.cuda.mem_get_info(spec.device)[0] * 0.8 / member_bytes))
