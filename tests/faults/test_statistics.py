"""Running statistics, such as BatchNorm's: the hypergradient is the central difference of the loop's own
step, however often the loop moved them."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from loops import EXACT, KnownNoise, Loop, data, found, take_step, truth
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import midflight as mf

pytestmark = pytest.mark.usefixtures("double")


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


Build = Callable[[mf.Space], nn.Module]


def loop_of(
    build: Build,
    loss_fn: Callable[[nn.Module, Any], Tensor] = cross_entropy,
    step: Callable[[Loop, Any], None] = take_step,
    batches: Any = None,
    lr: float = 0.1,
) -> Loop:
    """A model with noise somewhere, at a level that is tuned."""
    space = mf.Space(noise=mf.Float(0, 1, init=0.4))
    model = build(space)
    train, valid = batches or (data(12, 1), data(20, 2))
    return Loop(
        model, space, torch.optim.SGD(model.parameters(), lr=lr), loss_fn, [train], [valid], step=step
    )


def noise(space: mf.Space) -> nn.Module:
    return KnownNoise(space["noise"], (12, 5))


NORM = partial(nn.BatchNorm1d, 6)


def normed(space: mf.Space, norm: Callable[[], nn.Module] = NORM) -> nn.Module:
    return nn.Sequential(noise(space), nn.Linear(5, 6), norm(), nn.Tanh(), nn.Linear(6, 3))


# --- a layer that is used several times ---------------------------------------------------------------------


class Twice(nn.Module):
    """One layer at two places, behind each other or beside each other."""

    def __init__(self, space: mf.Space, siamese: bool, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.noise, self.first, self.siamese = noise(space), nn.Linear(5, 6), siamese
        self.norm = nn.BatchNorm1d(6, momentum=momentum)
        self.second, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.noise(x))
        if self.siamese:
            return self.out(self.norm(x) * self.norm(self.second(x) * 2 + 1))
        return self.out(self.norm(self.second(self.norm(x).tanh())))


def two_calls(model: nn.Module, batch: Any) -> Tensor:
    x, y, _ = batch
    return F.cross_entropy(model(x), y) + F.mse_loss(model(2 * x + 1), model(x.flip(1)))


USES: dict[str, Callable[[], Loop]] = {
    "twice in a forward": partial(loop_of, partial(Twice, siamese=False)),
    "twice, momentum 0.7": partial(loop_of, partial(Twice, siamese=False, momentum=0.7)),
    "twice, the mean of all": partial(loop_of, partial(Twice, siamese=False, momentum=None)),
    "siamese": partial(loop_of, partial(Twice, siamese=True)),
    "three calls in a loss": partial(loop_of, normed, two_calls),
}


@pytest.mark.parametrize("kind", USES)
def test_each_use_of_a_layer_counts_in_its_order(kind):
    assert found(USES[kind]) == pytest.approx(truth(USES[kind]), rel=EXACT)


@pytest.mark.slow
def test_each_use_counts_in_a_compiled_model():
    def compiled(space: mf.Space) -> nn.Module:
        return torch.compile(Twice(space, siamese=True), backend="aot_eager")

    build = partial(loop_of, compiled)
    assert found(build) == pytest.approx(truth(build), rel=EXACT)


# --- passes of the loop -------------------------------------------------------------------------------------


def backward(loop: Loop, batch: Any, **how: Any) -> None:
    loop.loss_fn(loop.model, batch).backward(**how)


def accumulates(loop: Loop, batch: Any) -> None:
    loop.optimizer.zero_grad()
    for _ in range(3):
        (loop.loss_fn(loop.model, batch) / 3).backward()
    loop.optimizer.step()


def leaves_one_out_before_backward(loop: Loop, batch: Any) -> None:
    loop.optimizer.zero_grad()
    loop.loss_fn(loop.model, batch)  # a guard against NaN
    loop.optimizer.zero_grad()
    take_step(loop, batch)


def leaves_one_out(loop: Loop, batch: Any) -> None:
    loop.optimizer.zero_grad()
    backward(loop, batch)
    take_step(loop, batch)


def leaves_one_out_for_infinity(loop: Loop, batch: Any) -> None:
    if not hasattr(loop, "scaler"):
        loop.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    for infinite in (True, False):
        loop.optimizer.zero_grad()
        loop.scaler.scale(loop.loss_fn(loop.model, batch)).backward()
        if infinite:
            loop.model[-1].bias.grad.fill_(math.inf)
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()


def goes_back_twice(loop: Loop, batch: Any) -> None:
    loop.optimizer.zero_grad()
    loss = loop.loss_fn(loop.model, batch) / 2
    loss.backward(retain_graph=True)
    loss.backward()
    loop.optimizer.step()


def looks_again(loop: Loop, batch: Any) -> None:
    loop.optimizer.zero_grad()
    backward(loop, batch)
    with torch.no_grad():
        loop.model(batch[0])
    loop.optimizer.step()


STEPS: dict[str, Callable[[Loop, Any], None]] = {
    "accumulation": accumulates,
    "a step left out before backward": leaves_one_out_before_backward,
    "a step left out": leaves_one_out,
    "a step left out by GradScaler": leaves_one_out_for_infinity,
    "two backwards of one forward": goes_back_twice,
    "one more forward without gradient": looks_again,
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", STEPS)
def test_each_training_pass_since_the_last_step_counts(kind, momentum):
    norm = partial(nn.BatchNorm1d, 6, momentum=momentum)
    build = partial(loop_of, partial(normed, norm=norm), step=STEPS[kind])
    assert found(build) == pytest.approx(truth(build), rel=EXACT)


def test_a_model_that_is_loaded_is_no_thousand_passes():
    def resumed(loop: Loop, batch: Any) -> None:
        state = loop.model.state_dict()
        loop.model.load_state_dict({n: t + 1000 if "tracked" in n else t.clone() for n, t in state.items()})
        take_step(loop, batch)

    build = partial(loop_of, partial(normed, norm=partial(nn.BatchNorm1d, 6)), step=resumed)
    assert found(build) == pytest.approx(truth(build), rel=EXACT)


# --- other layers -------------------------------------------------------------------------------------------


class NormWithActivation(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class Checkpointed(nn.Module):
    """BatchNorm in a part that is computed again in `backward`, where it moves its statistics again."""

    def __init__(self, space: mf.Space, reentrant: bool) -> None:
        super().__init__()
        self.noise, self.out, self.reentrant = noise(space), nn.Linear(6, 3), reentrant
        self.part = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.noise(x.clone().requires_grad_())
        return self.out(checkpoint(self.part, x, use_reentrant=self.reentrant))


class Own(nn.Module):
    """BatchNorm written by hand."""

    def __init__(self, features: int, name: str = "mean") -> None:
        super().__init__()
        self.name = name
        self.register_buffer(name, torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        mean = getattr(self, self.name)
        if self.training:
            with torch.no_grad():
                mean.lerp_(x.mean(0), 0.1)
            return x - x.mean(0)
        return x - mean


class OwnAnew(Own):
    """The same; each pass makes a new buffer."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
            return x - x.mean(0)
        return x - self.mean


class Copying(nn.BatchNorm1d):
    """Hands copies of its statistics to torch."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.clone(), self.running_var.clone()
        y = F.batch_norm(x, mean, var, self.weight, self.bias, self.training)
        if self.training:
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
        return y


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "in place": (partial(Own, 6), r"2\.mean"),
    "anew": (partial(OwnAnew, 6), r"2\.mean"),
    "by the usual name": (partial(Own, 6, "running_mean"), r"2\.running_mean"),
    "copies": (partial(Copying, 6), r"2\.running_mean, 2\.running_var"),
}


class OwnByTorch(nn.Module):
    """BatchNorm by torch's function, with a counter of nobody's."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training, momentum=0.3)


def sequences(norm: Callable[[], nn.Module]) -> Loop:
    """(n, channels, length)"""
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(n, 4, 7, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in (12, 20)
    ]

    def build(space: mf.Space) -> nn.Module:
        front = KnownNoise(space["noise"], (12, 4, 7)), nn.Conv1d(4, 6, 3), norm()
        return nn.Sequential(*front, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(30, 3))

    return loop_of(build, batches=batches)


LAYERS: dict[str, Callable[[], Loop]] = {
    "activation in a subclass": partial(loop_of, partial(normed, norm=partial(NormWithActivation, 6))),
    "InstanceNorm": partial(sequences, partial(nn.InstanceNorm1d, 6, track_running_stats=True)),
    "InstanceNorm, affine": partial(
        sequences, partial(nn.InstanceNorm1d, 6, affine=True, momentum=0.6, track_running_stats=True)
    ),
    "BatchNorm before an activation in place": partial(sequences, partial(nn.BatchNorm1d, 6)),
    "BatchNorm without weights": partial(sequences, partial(nn.BatchNorm1d, 6, affine=False)),
    "SyncBatchNorm": partial(sequences, partial(nn.SyncBatchNorm, 6)),
    "by torch's function": partial(loop_of, partial(normed, norm=partial(OwnByTorch, 6))),
    "checkpoint": partial(loop_of, partial(Checkpointed, reentrant=False)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_hypergradient_goes_through_the_statistics_of_the_layer(kind):
    assert found(LAYERS[kind]) == pytest.approx(truth(LAYERS[kind]), rel=EXACT)


def test_a_lazy_layer_is_known_once_it_has_a_shape():
    build = partial(loop_of, partial(normed, norm=partial(nn.LazyBatchNorm1d, affine=False)))
    assert found(build) == pytest.approx(truth(build), rel=EXACT)


# --- what is left out ---------------------------------------------------------------------------------------


def behind(space: mf.Space, *layers: nn.Module) -> nn.Module:
    return nn.Sequential(noise(space), *layers, nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("kind", OTHERS)
def test_buffers_of_others_that_validation_reads_are_named_once(kind):
    norm, names = OTHERS[kind]
    loop = loop_of(partial(normed, norm=norm)).attach()
    with pytest.warns(UserWarning, match=rf"training moves {names}, and") as caught:
        loop.run(4)
    assert len(caught) == 1


def test_a_layer_inside_a_reentrant_checkpoint_is_named_once():
    loop = loop_of(partial(Checkpointed, reentrant=True)).attach()
    with pytest.warns(UserWarning, match=r"of part\.1 without a gradient") as caught:
        loop.run(4)
    assert len(caught) == 1


class Counting(nn.Module):
    """Moves buffers that no hyperparameter reaches, or that validation does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
            self.largest = torch.maximum(self.largest, x.detach().max())
        return x * (1 + 1e-3 * self.seen)


HARMLESS: dict[str, Build] = {
    "spectral_norm": lambda space: behind(space, nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6))),
    "counters": lambda space: behind(space, nn.Linear(5, 6), Counting()),
    "its own norm before the noise": lambda space: nn.Sequential(Own(5), behind(space, nn.Linear(5, 6))),
    "BatchNorm": normed,
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_buffers_that_no_hyperparameter_reaches_are_no_reason_to_warn(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop_of(HARMLESS[kind]).attach().run(3)


def test_a_look_at_buffers_leaves_no_trace():
    def run(tuned: bool) -> Loop:
        torch.manual_seed(0)
        loop = loop_of(partial(normed, norm=partial(Own, 6)))
        return (loop.attach() if tuned else loop).run(3)

    with pytest.warns(UserWarning, match="training moves"):
        tuned = run(True)
    plain = run(False).model.state_dict()
    assert all(torch.equal(t, plain[name]) for name, t in tuned.model.state_dict().items())
