"""All starts of one kind of arm as one `Population`: how a study runs on a GPU.

A member has the initial weights, the order of the data and the hyper-steps of the arm when it runs alone.
Only the noise is drawn for all members together, so that rows agree in distribution and not bit by bit, and
after an interruption the rest of a cohort draws anew.
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
from midflight.study.arm import Data, Point, hyper_optimizer, noisy_mlp, now, seed_of, space_of
from midflight.study.spec import Arm, Spec, widths
from midflight.study.store import Result, Row
from midflight.tuner import Population

COPIES = 16
"""Memory of a member in units of its weights: state, gradients, graph, and what a hyper-step holds."""
CHUNK = 1000
"""Images evaluated at once."""


def cohorts(spec: Spec, arms: Sequence[Arm], inputs: int) -> Iterator[list[Arm]]:
    """The arms, in groups that fit into memory; re-runs after what they follow."""
    order = ("initial", "tuned", "rerun", "landscape")

    def kind(arm: Arm) -> tuple[int, int, int]:
        estimator = spec.estimator.index(arm.estimator) if arm.estimator else 0
        return spec.networks.index(arm.network), order.index(arm.kind), estimator

    for _, group in groupby(sorted(arms, key=kind), kind):
        members = list(group)
        most = _most(spec, members[0].network, inputs)
        yield from (members[i : i + most] for i in range(0, len(members), most))


def run_cohort(
    spec: Spec,
    arms: Sequence[Arm],
    begins: Sequence[Point],
    data: Data,
    report: Callable[[Arm, int, Point, float], None],
) -> list[Row]:
    """Train arms of one network, kind and estimator together, each from its own hyperparameters.

    Args:
        report: called after each epoch for each arm: (arm, epochs done, current point, validation error).

    Returns:
        a row for each arm; its seconds are an equal part of the cohort's.
    """
    first, n = arms[0], len(arms)
    tuned = first.kind == "tuned"
    seeds = [seed_of(spec, arm) for arm in arms]
    torch.manual_seed(seeds[0])
    spaces = [space_of(spec, begin) for begin in begins]
    population = _compiled_if_possible(
        spec,
        n,
        partial(noisy_mlp, spec, first, data.t1.x.shape[1]),
        spaces[0],
        partial(torch.optim.Adam, lr=spec.lr),
        loss_fn=_loss,
        valid_loader=ShuffledForEach(data.t2, spec.batch, [seed + 1 for seed in seeds]),
        starts={name: [float(space[name]) for space in spaces] for name in spaces[0]},
        seeds=seeds,
        schedule=spec.every if tuned else spec.steps() + 1,
        estimator=first.estimator or "one_step",
        total_steps=spec.steps(),
        hyper_optimizer=hyper_optimizer(spec),
    )
    batches = ShuffledForEach(data.t1, spec.batch, seeds)
    paths: list[tuple[int, Tensor]] = []
    valid_errors: list[list[float]] = []
    seconds: list[float] = []
    step = 0
    for epoch in range(spec.epochs):
        began = now(spec)
        for batch in batches:
            population.step(batch)
            step += 1
            if tuned and step % spec.every == 0:
                paths.append((step, _points(population)))
        seconds.append((now(spec) - began) / n)
        for group in population.optimizer.param_groups:
            group["lr"] *= spec.lr_end ** (1 / spec.epochs)
        valid_errors.append(_mean(population, _wrong, data.t2))
        for arm, point, error in zip(arms, _points(population).tolist(), valid_errors[-1], strict=True):
            report(arm, epoch + 1, (point[0], point[1]), error)

    ends = _points(population).tolist()
    losses = _mean(population, _loss, data.t2)
    tests = [None] * n if first.kind == "landscape" else _mean(population, _wrong, data.test)
    told = [(at, points.tolist()) for at, points in paths]
    return [
        Row(
            arm,
            Result(
                start=begins[i],
                end=(ends[i][0], ends[i][1]) if tuned else begins[i],
                valid_loss=losses[i],
                valid_error=valid_errors[-1][i],
                test_error=tests[i],
                valid_errors=[of_all[i] for of_all in valid_errors],
                trajectory=[[at, *points[i]] for at, points in told],
            ),
            seconds,
        )
        for i, arm in enumerate(arms)
    ]


def _compiled_if_possible(spec: Spec, *args: Any, **options: Any) -> Population:
    """Two to three times faster on a GPU, where Triton and a C++ compiler are there."""
    if spec.device != "cpu":
        try:
            return Population(*args, **options, compile=True)
        except NoCompiler as error:
            warnings.warn(f"the study goes on uncompiled and slower: {error}", stacklevel=2)
    return Population(*args, **options)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """F.cross_entropy, which vmap takes apart in Python, in two operations that it knows."""
    return -F.log_softmax(model(batch[0]), 1).gather(1, batch[1][:, None]).mean()


def _wrong(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    wrong: Tensor = model(batch[0]).argmax(1) != batch[1]
    return wrong.float().mean()


def _mean(population: Population, function: Callable[..., Tensor], split: Split) -> list[float]:
    """The mean of a function over all images, for each member."""
    total = torch.zeros(population.n, device=split.x.device, dtype=torch.float64)
    for x, y in zip(torch.split(split.x, CHUNK), torch.split(split.y, CHUNK), strict=True):
        batch = x.expand(population.n, *x.shape), y.expand(population.n, *y.shape)
        total += len(y) * population.evaluate(function, batch)
    means: list[float] = (total / len(split)).tolist()
    return means


def _points(population: Population) -> Tensor:
    """(log10 L2, noise) of each member, shape (n, 2)."""
    values = population.values
    return torch.stack([values["weight_decay"].log10(), values["noise"]], 1)


def _most(spec: Spec, network: str, inputs: int) -> int:
    """How many members fit into the memory of the GPU."""
    if not spec.device.startswith("cuda"):
        return max(1, spec.starts)
    sizes = [inputs, *widths(network), 10]
    bytes_of_one = 4 * COPIES * sum(a * b + b for a, b in pairwise(sizes))
    return max(1, int(torch.cuda.mem_get_info(spec.device)[0] * 0.8 / bytes_of_one))
