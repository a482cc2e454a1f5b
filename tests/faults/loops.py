"""Small training loops in float64 that can be run again step by step, and the truth about their
hypergradients."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import midflight as mf
from midflight.gradcheck.oracles import derivative

STEPS = 4
"""A norm to which the loop clips is known from the second hyper-step on."""
EXACT = 1e-6  # the central difference is itself good to 1e-7 where the derivative is smallest


class Still(torch.optim.Optimizer):
    """A hyper-optimiser that moves nothing and keeps the hypergradients that it was given."""

    def __init__(self, raws: Iterable[Tensor]) -> None:
        super().__init__(raws, {"lr": 1.0})
        self.given: list[list[Tensor | None]] = []

    def step(self, closure: Any = None) -> None:
        raws = [raw for group in self.param_groups for raw in group["params"]]
        self.given.append([None if raw.grad is None else raw.grad.clone() for raw in raws])


class KnownNoise(nn.Module):
    """x + level z while training, where z is the same at each call: a noise layer that can be differenced."""

    def __init__(self, level: mf.Hyperparameter, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.level = level
        self.register_buffer("z", torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.level * self.z[: len(x)].to(x) if self.training and len(x) <= len(self.z) else x


def set_options(loop: "Loop") -> None:
    """What the tuner does with hyperparameters that are options of the optimiser, in the plainest way."""
    for optimizer in loop.optimizers:
        for group in optimizer.param_groups:
            for name in loop.space:
                if group.get(name):
                    group[name] = float(loop.space[name])


def take_step(loop: "Loop", batch: Any) -> None:
    """The training step of a plain loop, with what a user does between `backward` and `step`."""
    for optimizer in loop.optimizers:
        optimizer.zero_grad()
    loop.loss_fn(loop.model, batch).backward()
    loop.between(loop)
    for optimizer in loop.optimizers:
        optimizer.step()


def nothing(_: "Loop") -> None:
    """Happens between `backward` and `step`."""


@dataclass
class Loop:
    """Everything that a training loop needs; `step` is one round of it."""

    model: nn.Module
    space: mf.Space
    optimizer: Any
    loss_fn: Callable[[nn.Module, Any], Tensor]
    train: list[Any]
    valid: list[Any]
    between: Callable[["Loop"], None] = nothing
    step: Callable[["Loop", Any], None] = take_step
    options: Callable[["Loop"], None] = set_options
    valid_loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
    tuner: mf.Tuner | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]

    @torch.no_grad()
    def valid_loss(self) -> float:
        self.model.eval()
        loss = (self.valid_loss_fn or self.loss_fn)(self.model, self.valid[0])
        self.model.train()
        return float(loss)

    def attach(self, **arguments: Any) -> "Loop":
        """Put a tuner on it that moves nothing, with a hyper-step at each step judged right after it."""
        defaults = {"schedule": 1, "horizon": "step", "hyper_optimizer": Still, "examples": 1000}
        self.tuner = mf.Tuner(
            self.model, self.optimizer, self.space, self.loss_fn, self.train, self.valid,
            **{**defaults, "valid_loss_fn": self.valid_loss_fn, **self.arguments, **arguments},
        )  # fmt: skip
        return self

    def run(self, steps: int = STEPS) -> "Loop":
        for n in range(steps):
            self.step(self, self.train[n % len(self.train)])
        return self

    def hypergradients(self) -> dict[str, float]:
        """Those of the last step; of a hyperparameter with a shape the sum of its entries."""
        assert self.tuner is not None
        given = self.tuner.hyper_optimizer.given[-1]
        return {n: float(g.sum()) for n, g in zip(self.space, given, strict=True) if g is not None}


Build = Callable[[], Loop]


def found(build: Build, steps: int = STEPS, **arguments: Any) -> dict[str, float]:
    """What the tuner says of the last of these steps."""
    torch.default_generator.manual_seed(0)
    return build().attach(**arguments).run(steps).hypergradients()


def truth(build: Build, steps: int = STEPS) -> dict[str, float]:
    """The central difference of the last of these steps, taken by the loop itself without a tuner."""

    def validation_loss(name: str, shift: float) -> float:
        torch.default_generator.manual_seed(0)
        loop = build()
        for n in range(steps):
            if n == steps - 1:
                loop.space[name].raw.add_(shift)
            loop.options(loop)
            loop.step(loop, loop.train[n % len(loop.train)])
        return loop.valid_loss()

    return {name: derivative(lambda h, name=name: validation_loss(name, h))[0] for name in build().space}


def data(count: int, seed: int, inputs: int = 5, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, classes and a noise for the inputs that is always the same."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator)
    y = torch.randint(classes, (count,), generator=generator)
    return x, y, torch.randn(count, inputs, generator=generator)


def network(*front: nn.Module, inputs: int = 5, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(*front, nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, classes))


def noisy_loss(space: mf.Space) -> Callable[[nn.Module, Any], Tensor]:
    """Cross-entropy, with the batch's own noise at the level of `space["noise"]` while training."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        x, y, z = batch
        return F.cross_entropy(model(x + space["noise"] * z if model.training else x), y)

    return loss_fn


def noisy_loop(
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    between: Callable[[Loop], None] = nothing,
    step: Callable[[Loop, Any], None] = take_step,
    options: dict[str, Any] | None = None,
    **space: mf.Float,
) -> Loop:
    """A small network that trains with noise on its inputs; further hyperparameters are options."""
    known = mf.Space(noise=mf.Float(0, 1, init=0.4), **space)
    model = network()
    settings = {"lr": 0.1, **(options or {}), **{name: float(known[name]) for name in space}}
    return Loop(
        model, known, optimizer(model.parameters(), **settings), noisy_loss(known),
        [data(12, 1)], [data(20, 2)], between, step,
    )  # fmt: skip
