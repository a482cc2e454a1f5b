"""Loops and models as they are found in other people's repositories: merged adapters, momentum encoders, own
backward passes, hooks, batches changed in place."""

import copy
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from loops import EXACT, KnownNoise, Loop, data, found, network, noisy_loop, noisy_loss, take_step, truth
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import midflight as mf
from once_only import OnceOnly

pytestmark = pytest.mark.usefixtures("double")

BY_DIFFERENCE = 2e-3
"""What a difference over 1 % of a range leaves of the hypergradient."""


def penalised(model: nn.Module, change: Callable[[Tensor], Tensor] | None = None) -> Loop:
    """A model with a penalty whose weight is tuned; `change` is a hook on the gradients."""
    space = mf.Space(penalty=mf.Float(1e-4, 1, log=True, init=0.05))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) + space["penalty"] * sum(
            p.square().sum() for p in model.parameters()
        )

    if change:
        for p in model.parameters():
            p.register_hook(change)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Loop(model, space, optimizer, loss_fn, [data(12, 1)], [data(20, 2)], valid_loss_fn=cross_entropy)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def behind_noise(*layers: nn.Module, step: Callable[[Loop, Any], None] = take_step) -> Loop:
    space = mf.Space(noise=mf.Float(0, 1, init=0.4))
    model = nn.Sequential(KnownNoise(space["noise"], (12, 5)), *layers)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return Loop(model, space, optimizer, cross_entropy, [data(12, 1)], [data(20, 2)], step=step)


# --- the gradient -------------------------------------------------------------------------------------------


def scale_loss(by: float, loop: Loop, batch: Any) -> None:
    loop.optimizer.zero_grad()
    (loop.loss_fn(loop.model, batch) * by).backward()
    for p in loop.model.parameters():
        p.grad.div_(by)
    loop.optimizer.step()


def scale_gradient(by: float, loop: Loop) -> None:
    for p in loop.model.parameters():
        if p.grad is not None:
            p.grad.mul_(by)


@pytest.mark.parametrize("by", [2, 8, 15, 17, 128])
def test_a_loss_scaled_by_hand_is_told_from_a_gradient_scaled_by_hand(by):
    for build in (
        partial(noisy_loop, step=partial(scale_loss, by)),
        partial(noisy_loop, between=partial(scale_gradient, 1 / by)),
    ):
        assert found(build)["noise"] == pytest.approx(truth(build)["noise"], rel=EXACT)


def clamp(g: Tensor) -> Tensor:
    return g.clamp(-0.02, 0.02)


def mask(g: Tensor) -> Tensor:
    return g * (torch.arange(g.numel()).view_as(g) % 2)


@pytest.mark.parametrize("change", [clamp, mask])
def test_hooks_that_change_gradients_are_part_of_the_step(change):
    build = lambda: penalised(network(), change)  # noqa: E731
    assert found(build) == pytest.approx(truth(build), rel=EXACT)


def clip(loop: Loop) -> None:
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)


@pytest.mark.parametrize(("between", "norm"), [(clip, 0.1), (partial(scale_gradient, 0.5), None)])
def test_a_layer_unfrozen_just_before_a_hyper_step_leaves_this_one_out(between, norm):
    """Its own backward pass was not watched, so what the loop did to its gradient is not known."""

    def step(loop: Loop, batch: Any) -> None:
        loop.model[0].requires_grad_(step.count == 3)
        step.count += 1
        loop.optimizer.zero_grad()
        loop.loss_fn(loop.model, batch).backward()
        between(loop)
        loop.optimizer.step()

    step.count = 0
    loop = noisy_loop(step=step).attach(max_grad_norm=norm).run(3)
    known = loop.tuner.log()["undecided"]
    assert known == (0 if norm else 1)
    assert loop.run(1).tuner.log()["undecided"] == known + 1


def test_a_step_without_gradients_leaves_the_hyper_step_out():
    def step(loop: Loop, batch: Any) -> None:
        step.count += 1
        if step.count == 2:
            loop.optimizer.zero_grad()
            loop.optimizer.step()
        else:
            take_step(loop, batch)

    step.count = 0
    loop = noisy_loop(step=step).attach().run()
    assert (loop.tuner.log()["hypersteps"], loop.tuner.log()["undecided"]) == (3, 1)


# --- backward passes of the user's own ----------------------------------------------------------------------


class Numpy(OnceOnly):
    """Its backward pass leaves torch, as kernels in Triton do, and does not say that it has no derivative."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * (1 - np.tanh(x.detach().numpy()) ** 2))


class SavesIntermediate(torch.autograd.Function):
    """Its backward pass reads a value that its forward pass computed outside the graph."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.slope = 1 - y**2
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.slope


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class Applied(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize("function", [Numpy, SavesIntermediate, OnceOnly])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.Adam, lr=0.01)])
def test_a_backward_pass_that_autograd_cannot_differentiate_is_differenced(function, optimizer):
    def build() -> Loop:
        loop = behind_noise(nn.Linear(5, 6), Applied(function), nn.Linear(6, 3))
        loop.optimizer = optimizer(loop.model.parameters())
        return loop

    assert found(build) == pytest.approx(truth(build), rel=BY_DIFFERENCE)


class Domains(nn.Module):
    """Two heads; gradients of the second one are reversed in the body (DANN)."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), Applied(OnceOnly) if once else nn.Tanh())
        self.classes, self.domain = nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.classes(h), self.domain(Reversed.apply(h))


@pytest.mark.parametrize("once", [False, True])
def test_gradient_reversal_is_right_by_double_backward_and_by_difference(once):
    def build() -> Loop:
        space, model = mf.Space(weight=mf.Float(0.01, 10, log=True, init=0.5)), Domains(once)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            classes, domain = model(batch[0])
            return F.cross_entropy(classes, batch[1]) + space["weight"] * domain.square().mean()

        return Loop(
            model, space, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, [data(12, 1)], [data(20, 2)],
            valid_loss_fn=lambda m, b: F.cross_entropy(m(b[0])[0], b[1]),
        )  # fmt: skip

    assert found(build) == pytest.approx(truth(build), rel=BY_DIFFERENCE if once else EXACT)


def test_a_validation_gradient_that_is_not_the_slope_is_said_once():
    def build() -> Loop:
        loop = noisy_loop()
        loop.model[2].register_full_backward_pre_hook(lambda _, grads: tuple(0.3 * g for g in grads))
        return loop

    with pytest.warns(UserWarning, match="times as fast along its gradient") as said:
        build().attach().run()
    assert sum("along its gradient" in str(w.message) for w in said) == 1


# --- what a forward pass writes -----------------------------------------------------------------------------


class LoRA(nn.Linear):
    """Merges its low-rank part into its frozen weight in eval mode, as loralib does."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = (
            nn.Parameter(0.3 * torch.randn(*shape)) for shape in ((rank, inputs), (outputs, rank))
        )
        self.weight.requires_grad_(False)
        self.merged = False

    def train(self, mode: bool = True) -> "LoRA":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        plain = super().forward(x)
        return plain if self.merged else plain + x @ self.a.T @ self.b.T


class Momentum(nn.Module):
    """A frozen copy of its layer follows it, written by `.data` in the forward pass (MoCo, DINO)."""

    def __init__(self, rebinds: bool) -> None:
        super().__init__()
        self.query, self.key, self.rebinds = nn.Linear(5, 5), nn.Linear(5, 5), rebinds
        self.key.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
            if self.rebinds:
                k.data = 0.9 * k.data + 0.1 * q.data
            else:
                k.data.mul_(0.9).add_(q.detach(), alpha=0.1)
        return self.query(x) + self.key(x)


class Meter:
    def __init__(self) -> None:
        self.seen, self.total = 0, torch.zeros(())


class Keeps(nn.Module):
    """Keeps state in containers, arrays and objects of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.queues = {"a": deque(maxlen=3)}
        self.nested = [[torch.zeros(2)]]
        self.tables = [{"n": 0}]
        self.lists: defaultdict[str, list[float]] = defaultdict(list)
        self.pair = (torch.zeros(2), torch.zeros(2))
        self.counts: Counter[str] = Counter()
        self.array = np.zeros(3)
        self.meter = Meter()

    def forward(self, x: Tensor) -> Tensor:
        mean = float(x.detach().mean())
        self.queues["a"].append(mean)
        self.nested[0][0] += 1
        self.nested[0].append(torch.ones(1))
        self.tables[0]["n"] += 1
        self.lists["x"].append(mean)
        self.pair[0].add_(1)
        self.counts["x"] += 1
        self.array += 1
        self.meter.seen += 1
        self.meter.total += 1
        return x


@pytest.mark.parametrize("horizon", ["step", "run"])
@pytest.mark.parametrize(
    "layer", [partial(LoRA, 5, 5), partial(Momentum, True), partial(Momentum, False), Keeps]
)
def test_what_a_forward_pass_or_a_change_of_mode_writes_is_put_back(layer, horizon):
    def build() -> Loop:
        torch.manual_seed(0)
        return behind_noise(layer(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    plain, tuned = build().run(), build().attach(horizon=horizon).run()
    for one, other in zip(plain.model.parameters(), tuned.model.parameters(), strict=True):
        assert torch.equal(one, other)
    if layer is Keeps:
        meters = [loop.model[1].__dict__.pop("meter") for loop in (plain, tuned)]
        assert vars(meters[0]) == vars(meters[1])
        assert repr(vars(plain.model[1])) == repr(vars(tuned.model[1]))


def test_the_hypergradient_of_a_merged_adapter_is_right():
    def build() -> Loop:
        torch.manual_seed(0)
        return behind_noise(LoRA(5, 6), nn.Tanh(), nn.Linear(6, 3))

    assert found(build) == pytest.approx(truth(build), rel=EXACT)


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", ["step", "run"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_loss_may_change_its_batch_in_place(norm, horizon):
    def build(in_place: bool) -> Loop:
        loop = noisy_loop()
        if norm:
            loop.model.insert(1, nn.BatchNorm1d(6))
            loop.optimizer.add_param_group({"params": loop.model[1].parameters()})
        inner = noisy_loss(loop.space)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            x, y, z = batch
            return inner(model, (x.sub_(0.5).div_(2) if in_place else (x - 0.5) / 2, y, z))

        def step(loop: Loop, batch: Any) -> None:
            take_step(loop, copy.deepcopy(batch))  # a loader gives new tensors each time

        loop.loss_fn, loop.step = loss_fn, step
        return loop

    assert found(lambda: build(True), horizon=horizon) == found(lambda: build(False), horizon=horizon)


def test_a_loss_may_be_an_object_without_a_hash():
    @dataclass
    class Weighted:
        weight: float

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            return self.weight * inner(model, batch)

    loop = noisy_loop()
    inner, loop.loss_fn = noisy_loss(loop.space), Weighted(1.0)
    assert loop.attach().run().hypergradients() == found(noisy_loop)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", ["dense", "coo", "csr", "nested"])
def test_sparse_and_nested_batches_are_not_cut(layout):
    """200 examples, of which the default would use 128."""
    generator = torch.Generator().manual_seed(0)
    adjacency = (torch.rand(200, 200, generator=generator) < 0.05).double() + torch.eye(200)
    adjacency = adjacency / adjacency.sum(1, keepdim=True)
    sparse = {"coo": adjacency.to_sparse(), "csr": adjacency.to_sparse_csr()}.get(layout, adjacency)
    parts = torch.nested.nested_tensor([torch.ones(n % 3 + 1) for n in range(200)])

    def build() -> Loop:
        loop = noisy_loop()
        inner = noisy_loss(loop.space)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            x, y, z, more = batch
            x = x * torch.stack([p.sum() for p in more.unbind()])[:, None] if layout == "nested" else more @ x
            return inner(model, (x, y, z))

        more = parts if layout == "nested" else sparse
        loop.loss_fn, loop.train, loop.valid = loss_fn, [(*data(200, 1), more)], [(*data(200, 2), more)]
        return loop

    assert found(build, examples=128) == pytest.approx(truth(build), rel=EXACT)


# --- around the loss ----------------------------------------------------------------------------------------


def forces(create_graph: bool, model: nn.Module, batch: Any) -> Tensor:
    """A loss of derivatives, as of an energy by the places of atoms."""
    x = batch[0].requires_grad_()
    with torch.enable_grad():
        energy = model(x).logsumexp(1).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=create_graph or model.training)
    return (force - 1).square().mean()


def test_a_validation_loss_may_compute_derivatives():
    space = mf.Space(noise=mf.Float(0, 1, init=0.4))
    model = nn.Sequential(KnownNoise(space["noise"], (12, 5)), *network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_fn, train, valid = partial(forces, True), [data(12, 1)], [data(20, 2), data(20, 3)]
    loop = Loop(model, space, optimizer, loss_fn, train, valid).attach(horizon="run").run()
    assert len(loop.tuner.finish()) == 3
    assert loop.tuner.report(third=[data(20, 4), data(20, 5)]) is not None


def test_a_derivative_without_its_graph_is_refused_in_a_sentence():
    loop = behind_noise(*network())
    loop.loss_fn = partial(forces, False)
    with pytest.raises(mf.errors.InvalidLoss, match="create_graph=True, in eval mode too"):
        loop.attach().run()


def test_batch_norm_beside_the_model_counts():
    def build() -> Loop:
        loop = noisy_loop()
        head = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
        loop.optimizer.add_param_group({"params": head.parameters()})
        inner, body = noisy_loss(loop.space), loop.model

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            head.train(body.training)
            both = lambda x: head(model(x))  # noqa: E731
            both.training = model.training
            return inner(both, batch)

        loop.loss_fn = loss_fn
        return loop

    assert found(build) == pytest.approx(truth(build), rel=EXACT)


@pytest.mark.parametrize("around", [torch.inference_mode, parametrize.cached])
def test_a_step_may_stand_in_a_context_of_torch(around):
    def build() -> Loop:
        def step(loop: Loop, batch: Any) -> None:
            loop.optimizer.zero_grad()
            if around is torch.inference_mode:
                loop.loss_fn(loop.model, batch).backward()
                with around():
                    loop.optimizer.step()
            else:
                with around():
                    loop.loss_fn(loop.model, batch).backward()
                    loop.optimizer.step()

        return behind_noise(
            parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 3), step=step
        )

    assert found(build) == pytest.approx(truth(build), rel=EXACT)
