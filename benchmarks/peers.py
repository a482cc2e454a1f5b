"""Implement the paper's workload in each library: training steps, and a hyperparameter step every k-th.

ReLU MLP, batch 100, Adam with rate 1e-3. L2 (log10) and input noise are tuned on validation batches of 100.
L2 is in the optimiser if the library can differentiate it, else in the loss. Each class follows its
library's examples; `PEERS` lists them. betty-ml, TorchOpt and higher are optional.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import midflight as mf

BATCH = 100
START = -4.0, 0.3  # log10 L2, noise


def mlp(widths: Sequence[int]) -> nn.Sequential:
    sizes = [784, *widths]
    hidden = [[nn.Linear(a, b), nn.ReLU()] for a, b in pairwise(sizes)]
    return nn.Sequential(*(layer for pair in hidden for layer in pair), nn.Linear(sizes[-1], 10))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Draw random images in advance, because drawing must not be timed."""
    generator = torch.Generator().manual_seed(1)
    drawn = [
        (torch.rand(BATCH, 784, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator))
        for _ in range(10)
    ]
    while True:
        yield from drawn


def l2(params: Any, log10: Tensor | float) -> Tensor:
    return 0.5 * 10**log10 * sum(p.square().sum() for p in params)


class Training:
    """A training without tuning; base class of the others."""

    def __init__(self, widths: Sequence[int], k: int, fused: bool | None = None) -> None:
        torch.manual_seed(0)
        self.net, self.k, self.n = mlp(widths), k, 0
        self.fused = fused
        self.train, self.valid = batches(), batches()
        self.log10_l2, self.noise = (torch.tensor(x, requires_grad=True) for x in START)
        self.hyper_optimizer = torch.optim.Adam([self.log10_l2, self.noise], lr=0.01)
        self.optimizer = torch.optim.Adam(self.net.parameters(), weight_decay=10 ** START[0], fused=fused)
        self.set_up()

    def set_up(self) -> None:
        """Prepare a subclass."""

    def step(self) -> None:
        self.n += 1
        (self.hyper_step if self.k and self.n % self.k == 0 else self.plain_step)()

    def plain_step(self) -> None:
        x, y = next(self.train)
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(x + START[1] * torch.randn_like(x)), y).backward()
        self.optimizer.step()

    def hyper_step(self) -> None:
        self.plain_step()

    def move(self, grads: Sequence[Tensor]) -> None:
        self.log10_l2.grad, self.noise.grad = grads
        self.hyper_optimizer.step()
        self.optimizer.param_groups[0]["weight_decay"] = 10 ** float(self.log10_l2.detach())


class Midflight(Training):
    """midflight, with variants of horizon, estimator, tuned hyperparameters and budget.

    The tuner does not know the run's length, so hyperparameter steps are evenly spaced; k = 0: one per 20.
    """

    def __init__(
        self, widths: Sequence[int], k: int, fused: bool | None = None, *, horizon: str = "run",
        estimator: str = "one_step", noise: bool = True, budget: float | None = None,
    ) -> None:  # fmt: skip
        self.horizon, self.estimator = horizon, estimator
        self.tunes_noise, self.budget = noise, budget
        super().__init__(widths, k, fused)

    def set_up(self) -> None:
        ranges = {"weight_decay": mf.Float(10**-5.5, 10**-2.5, log=True, init=10 ** START[0])}
        if self.tunes_noise:
            ranges["noise"] = mf.Float(0.0, 0.8, init=START[1])
        space = mf.Space(ranges)
        level = space["noise"] if self.tunes_noise else START[1]
        self.model = nn.Sequential(mf.nn.GaussianNoise(level), self.net)
        mf.Tuner(
            self.model, self.optimizer, space, self.loss, Endless(), Endless(), horizon=self.horizon,
            estimator=self.estimator, schedule=mf.TimeBudget(self.budget) if self.budget else self.k or None,
        )  # fmt: skip

    @staticmethod
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def step(self) -> None:
        batch = next(self.train)
        self.optimizer.zero_grad()
        self.loss(self.model, batch).backward()
        self.optimizer.step()


class Endless:
    """An endless loader."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches()


class Higher(Training):
    """higher 0.2.1: one step with a differentiable copy of model and Adam, then the plain step."""

    def set_up(self) -> None:
        import higher

        self.higher = higher

    def hyper_step(self) -> None:
        (x, y), (xv, yv) = next(self.train), next(self.valid)
        decay = {"weight_decay": [10**self.log10_l2]}
        context = self.higher.innerloop_ctx(self.net, self.optimizer, override=decay)
        with context as (net, optimizer):
            optimizer.step(F.cross_entropy(net(x + self.noise * torch.randn_like(x)), y))
            loss = F.cross_entropy(net(xv), yv)
            grads = torch.autograd.grad(loss, [self.log10_l2, self.noise])
        self.plain_step()
        self.move(grads)


class TorchOpt(Training):
    """TorchOpt 0.7.3: functional Adam, in place for plain steps, with a graph for hyperparameter steps."""

    def set_up(self) -> None:
        import torchopt

        self.torchopt = torchopt
        self.adam = torchopt.adam(lr=1e-3)
        self.params = {n: p.detach().clone().requires_grad_() for n, p in self.net.named_parameters()}
        self.state = self.adam.init(self.params)

    def loss(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(self.net, params, (x,)), y)

    def grads(self, create_graph: bool) -> dict[str, Tensor]:
        x, y = next(self.train)
        loss = self.loss(self.params, x + self.noise * torch.randn_like(x), y)
        grads = torch.autograd.grad(loss, list(self.params.values()), create_graph=create_graph)
        decay = 10**self.log10_l2
        return {n: g + decay * p for (n, p), g in zip(self.params.items(), grads, strict=True)}

    def plain_step(self) -> None:
        with torch.no_grad():
            with torch.enable_grad():
                self.log10_l2.requires_grad_(False), self.noise.requires_grad_(False)
                grads = self.grads(create_graph=False)
                self.log10_l2.requires_grad_(), self.noise.requires_grad_()
            updates, self.state = self.adam.update(grads, self.state, inplace=True)
            self.params = self.torchopt.apply_updates(self.params, updates, inplace=True)
        self.params = {n: p.detach().requires_grad_() for n, p in self.params.items()}

    def hyper_step(self) -> None:
        updates, state = self.adam.update(self.grads(create_graph=True), self.state, inplace=False)
        params = self.torchopt.apply_updates(self.params, updates, inplace=False)
        grads = torch.autograd.grad(self.loss(params, *next(self.valid)), [self.log10_l2, self.noise])
        self.state = self.torchopt.pytree.tree_map(lambda t: t.detach() if torch.is_tensor(t) else t, state)
        self.params = {n: p.detach().requires_grad_() for n, p in params.items()}
        self.move(grads)


class Betty(Training):
    """betty-ml 0.2.1: two problems and an engine; L2 is in the loss."""

    kind = "darts"

    def set_up(self) -> None:
        import logging

        logging.disable(logging.INFO)
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem

        class Levels(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.log10_l2, self.noise = (nn.Parameter(torch.tensor(x)) for x in START)

            def forward(self) -> tuple[Tensor, Tensor]:
                return self.log10_l2, self.noise

        class Outer(ImplicitProblem):
            def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
                return F.cross_entropy(self.inner(batch[0]), batch[1])

        class Inner(ImplicitProblem):
            def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
                log10, noise = self.outer()
                outputs = self(batch[0] + noise * torch.randn_like(batch[0]))
                return F.cross_entropy(outputs, batch[1]) + l2(self.trainable_parameters(), log10)

        levels = Levels()
        optimizer = torch.optim.Adam(self.net.parameters(), fused=self.fused)
        outer = Outer(
            "outer", config=Config(), module=levels, optimizer=torch.optim.Adam(levels.parameters(), lr=0.01),
            train_data_loader=_some(self.valid),
        )  # fmt: skip
        inner = Inner(
            "inner", config=Config(type=self.kind, unroll_steps=self.k, neumann_iterations=1),
            module=self.net, optimizer=optimizer, train_data_loader=_some(self.train),
        )  # fmt: skip
        self.engine = Engine(
            [outer, inner], EngineConfig(train_iters=1, valid_step=10**9, logger_type="none"),
            {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        )  # fmt: skip
        self.engine.train()

    def step(self) -> None:
        self.engine.global_step += 1
        self.engine.train_step()


class BettySama(Betty):
    kind = "sama"


class BettyNeumann(Betty):
    kind = "neumann"


def _some(stream: Iterator[Any]) -> list[Any]:
    return [next(stream) for _ in range(10)]


PEERS: dict[str, Callable[..., Training]] = {
    "higher (exact)": Higher,
    "TorchOpt, functional (exact)": TorchOpt,
    "Betty DARTS": Betty,
    "Betty SAMA": BettySama,
    "Betty Neumann, 1 term": BettyNeumann,
}
