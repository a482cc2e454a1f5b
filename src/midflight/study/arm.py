"""One arm of the study: train a network once, fixed or tuned, and measure it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midflight.datasets import Shuffled, Split, evaluate, load
from midflight.nn import GaussianNoise
from midflight.space import Float, Space
from midflight.study.spec import DEFAULT, Arm, Spec, SpecError, widths
from midflight.study.store import Result, Row
from midflight.tuner import Every, SignSteps, Tuner

Point = tuple[float, float]
"""(log10 L2, noise)"""


@dataclass(frozen=True)
class Data:
    """T1 trains the weights, T2 tunes the hyperparameters, the test set is only reported."""

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


def run_arm(
    spec: Spec, arm: Arm, start: Point, data: Data, on_epoch: Callable[[int, Point, float], None]
) -> Row:
    """Train one arm from the hyperparameters `start` and measure it.

    Equal arguments give an equal `Result` on the same machine, in any process and any order.

    Args:
        on_epoch: called after each epoch with (epochs done, current point, validation error).
    """
    seed = seed_of(spec, arm)
    torch.manual_seed(seed)
    space = space_of(spec, start)
    model = noisy_mlp(spec, arm, data.t1.x.shape[1], space)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=spec.lr, weight_decay=float(space["weight_decay"]), fused=True
    )
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, spec.lr_end ** (1 / spec.epochs))
    t1, t2 = Shuffled(data.t1, spec.batch, seed), Shuffled(data.t2, spec.batch, seed + 1)
    trajectory: list[list[float]] = []
    tuner = None
    if arm.kind == "tuned":
        tuner = Tuner(
            model, optimizer, space, loss_fn, t1, t2, total_steps=spec.steps(), **_tuner_options(spec, arm),
            on_hyperstep=lambda step, _: trajectory.append([step, *_point(space)]),
        )  # fmt: skip

    valid_errors: list[float] = []
    epoch_seconds: list[float] = []
    for epoch in range(spec.epochs):
        epoch_seconds.append(_train_epoch(spec, model, optimizer, t1))
        decay.step()
        valid_errors.append(evaluate(model, data.t2)[1])
        on_epoch(epoch + 1, _point(space), valid_errors[-1])
    if tuner is not None:
        began = device_time(spec)
        tuner.finish()
        epoch_seconds[-1] += device_time(spec) - began

    valid_loss, valid_error = evaluate(model, data.t2)
    result = Result(
        start=start,
        end=_point(space) if tuner is not None else start,
        valid_loss=valid_loss,
        valid_error=valid_error,
        test_error=None if arm.kind == "landscape" else evaluate(model, data.test)[1],
        valid_errors=valid_errors,
        trajectory=trajectory,
    )
    return Row(arm, result, epoch_seconds)


def _train_epoch(spec: Spec, model: nn.Module, optimizer: torch.optim.Optimizer, t1: Shuffled) -> float:
    """Train one epoch; return its seconds."""
    began = device_time(spec)
    for batch in t1:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return device_time(spec) - began


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


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
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


def _point(space: Space) -> Point:
    return float(space["weight_decay"].value.detach().log10()), float(space["noise"])


def seed_of(spec: Spec, arm: Arm) -> int:
    """Return the seed of weights and batches: one per start, and one for the whole landscape."""
    index = 0 if arm.kind == "landscape" else arm.index
    return int(np.random.default_rng([spec.seed, index, 1]).integers(2**32))


def device_time(spec: Spec) -> float:
    """Wait until the device is idle; return the time in seconds."""
    if spec.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()
