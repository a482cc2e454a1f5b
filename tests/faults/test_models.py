"""Models and losses as users write them: the hypergradient is the central difference of the loop's own
step."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from loops import EXACT, KnownNoise, Loop, data, found, network, noisy_loss, take_step, truth
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, parametrizations, prune
from torch.utils.checkpoint import checkpoint

import midflight as mf

pytestmark = pytest.mark.usefixtures("double")

Loss = Callable[[nn.Module, Any], Tensor]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def loop_of(
    model: nn.Module,
    space: mf.Space,
    loss_fn: Loss = cross_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    train: Any = None,
    valid: Any = None,
    **more: Any,
) -> Loop:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Loop(model, space, optimizer, loss_fn, [train or data(12, 1)], [valid or data(20, 2)], **more)


def noise_space(**more: mf.Float) -> mf.Space:
    return mf.Space(noise=mf.Float(0, 1, init=0.4), **more)


def with_noise(*layers: nn.Module, **more: Any) -> Loop:
    """Layers behind a noise on their inputs."""
    space = noise_space()
    return loop_of(nn.Sequential(KnownNoise(space["noise"], (12, 5)), *layers), space, **more)


# --- layers -------------------------------------------------------------------------------------------------


def sequences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 7, 4, generator=generator), torch.randint(3, (count,), generator=generator)


class LastOf(nn.Module):
    """Classifies a sequence by what a layer says of its last place."""

    def __init__(self, layer: nn.Module, space: mf.Space, outputs: int = 6) -> None:
        super().__init__()
        self.noise = KnownNoise(space["noise"], (12, 7, 4))
        self.layer, self.out = layer, nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.noise(x))
        return self.out((y[0] if isinstance(y, tuple) else y)[:, -1])


class Attention(nn.Module):
    """Self-attention by torch's fused kernels, or by `nn.MultiheadAttention`."""

    def __init__(self, causal: bool = False, multihead: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(4, 12), nn.Linear(4, 6), causal
        self.multihead = nn.MultiheadAttention(4, 2, batch_first=True) if multihead else None

    def forward(self, x: Tensor) -> Tensor:
        if self.multihead is not None:
            return self.out(self.multihead(x, x, x, need_weights=False)[0])
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)[:, 0])


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Loop:
    space = noise_space()
    both = 2 if options.get("bidirectional") else 1
    model = LastOf(kind(4, 6, batch_first=True, **options), space, 6 * both)
    return loop_of(model, space, train=sequences(12, 1), valid=sequences(20, 2))


def attending(layer: Callable[[], nn.Module]) -> Loop:
    space = noise_space()
    return loop_of(LastOf(layer(), space), space, train=sequences(12, 1), valid=sequences(20, 2))


def encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Linear(4, 6))


class Checkpointed(nn.Module):
    """The first layers are computed again in `backward`; the noise before them, or among them."""

    def __init__(self, space: mf.Space, reentrant: bool, noise_inside: bool) -> None:
        super().__init__()
        self.noise = KnownNoise(space["noise"], (12, 5)) if "noise" in space else nn.Identity()
        self.first, self.second = nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 3)
        self.reentrant, self.noise_inside = reentrant, noise_inside

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()  # so that reentrant checkpointing gives its weights a gradient
        if self.noise_inside:
            return self.second(
                checkpoint(lambda x: self.first(self.noise(x)), x, use_reentrant=self.reentrant)
            )
        return self.second(checkpoint(self.first, self.noise(x), use_reentrant=self.reentrant))


def checkpointed(reentrant: bool, noise_inside: bool) -> Loop:
    space = noise_space()
    return loop_of(Checkpointed(space, reentrant, noise_inside), space)


def checkpointed_decay(reentrant: bool) -> Loop:
    space = mf.Space(weight_decay=mf.Float(1e-3, 1, log=True, init=0.1))
    model = Checkpointed(space, reentrant, False)
    return loop_of(model, space, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))


class Masked(nn.Module):
    """Dropout that always drops the same entries."""

    def __init__(self) -> None:
        super().__init__()
        kept = torch.rand(20, 6, generator=torch.Generator().manual_seed(9)) > 0.5
        self.register_buffer("mask", 2.0 * kept)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask[: len(x)] if self.training else x


def checkpointed_dropout(reentrant: bool) -> Loop:
    """What is computed again must be computed in the mode of the first time."""
    space = noise_space()
    model = Checkpointed(space, reentrant, False)
    model.first = nn.Sequential(nn.Linear(5, 6), Masked(), nn.Tanh())
    return loop_of(model, space)


def time_first(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences with a class for each moment."""
    x, _ = sequences(count, seed)
    generator = torch.Generator().manual_seed(seed)
    return x.transpose(0, 1), torch.randint(3, (7, count), generator=generator)


def of_the_last_moment(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1][-1])


class LastInTime(LastOf):
    def forward(self, x: Tensor) -> Tensor:
        z = self.noise.z.transpose(0, 1)[: len(x)]
        y, _ = self.layer(x + self.noise.level * z if self.training else x)
        return self.out(y[-1])


def recurrent_time_first() -> Loop:
    """Dimension 0 of a batch is time, so that the first of it are no examples."""
    space = noise_space()
    model = LastInTime(nn.LSTM(4, 6), space)
    return loop_of(
        model, space, of_the_last_moment, train=time_first(12, 1), valid=time_first(20, 2),
        arguments={"examples": 3},
    )  # fmt: skip


def two_views() -> Loop:
    """The second half of a batch are other views of the first, so that no part of it is like the whole."""
    space = noise_space()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        a, b = model(batch[0]).chunk(2)
        return (a - b).square().mean() - a.std() if model.training else a.square().mean()

    model = network(KnownNoise(space["noise"], (12, 5)))
    return loop_of(model, space, loss_fn, arguments={"examples": None})


def tied_weight() -> Loop:
    loop = with_noise(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    loop.model[3].weight = loop.model[1].weight
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1, momentum=0.9)
    return loop


def tied_layer() -> Loop:
    layer = nn.Linear(5, 5)
    return with_noise(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 3))


def normed_weight(norm: Callable[..., nn.Module], **options: Any) -> Loop:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the older ones
        return with_noise(norm(nn.Linear(5, 5), **options), nn.Tanh(), nn.Linear(5, 3))


def embedded() -> Loop:
    space = noise_space()

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.noise = nn.Embedding(7, 5), KnownNoise(space["noise"], (12, 5))
            self.out = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.noise(self.table(x)))

    generator = torch.Generator().manual_seed(1)
    batches = [tuple(torch.randint(n, (size,), generator=generator) for n in (7, 3)) for size in (12, 20)]
    return loop_of(Embedded(), space, train=batches[0], valid=batches[1])


def batch_normed(where: str) -> Loop:
    norm = [nn.BatchNorm1d(6)] if where == "behind" else []
    loop = with_noise(nn.Linear(5, 6), *norm, nn.Tanh(), nn.Linear(6, 3))
    if where == "before":
        loop.model.insert(0, nn.BatchNorm1d(5))
        loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1, momentum=0.9)
    return loop


LAYERS: dict[str, Callable[[], Loop]] = {
    "LSTM": partial(recurrent, nn.LSTM),
    "GRU, two layers": partial(recurrent, nn.GRU, num_layers=2),
    "RNN, both ways": partial(recurrent, nn.RNN, bidirectional=True),
    "scaled_dot_product_attention": partial(attending, Attention),
    "causal attention": partial(attending, partial(Attention, causal=True)),
    "MultiheadAttention": partial(attending, partial(Attention, multihead=True)),
    "TransformerEncoderLayer": partial(attending, encoder),
    "checkpoint": partial(checkpointed, False, False),
    "checkpoint, reentrant": partial(checkpointed, True, False),
    "checkpoint, noise inside": partial(checkpointed, False, True),
    "checkpoint, reentrant, noise inside": partial(checkpointed, True, True),
    "checkpoint, weight decay": partial(checkpointed_decay, False),
    "checkpoint, reentrant, weight decay": partial(checkpointed_decay, True),
    "checkpoint, dropout": partial(checkpointed_dropout, False),
    "checkpoint, reentrant, dropout": partial(checkpointed_dropout, True),
    "LSTM, time first": recurrent_time_first,
    "two views": two_views,
    "a tied weight": tied_weight,
    "a tied layer": tied_layer,
    "weight_norm": partial(normed_weight, parametrizations.weight_norm),
    "weight_norm, the older": partial(normed_weight, nn.utils.weight_norm),
    # the tuner's pass is one iteration further than the loop's: converged, both are the same
    "spectral_norm": partial(normed_weight, parametrizations.spectral_norm, n_power_iterations=60),
    "spectral_norm, the older": partial(normed_weight, nn.utils.spectral_norm, n_power_iterations=60),
    "orthogonal": partial(normed_weight, parametrizations.orthogonal),
    "LayerNorm": lambda: with_noise(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)),
    "Embedding": embedded,
    "BatchNorm before the noise": partial(batch_normed, "before"),
    "BatchNorm behind the noise": partial(batch_normed, "behind"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_hypergradient_goes_through_the_layer(kind):
    assert found(LAYERS[kind]) == pytest.approx(truth(LAYERS[kind]), rel=EXACT)


def test_a_part_of_a_batch_that_is_no_batch_gives_another_hypergradient():
    """So that whole batches, as in LAYERS, are needed there."""
    assert found(two_views, examples=4)["noise"] != pytest.approx(truth(two_views)["noise"], rel=0.01)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_move_with_the_noise_and_validation_reads_them(momentum):
    def build() -> Loop:
        loop = with_noise(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=momentum), nn.Tanh(), nn.Linear(6, 3))
        loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=1e-6)  # the rest of it is small
        return loop

    assert found(build) == pytest.approx(truth(build), rel=EXACT)


# --- weights that come and go -------------------------------------------------------------------------------


def at_step(n: int, do: Callable[[Loop], None], step: Callable[[Loop, Any], None] = take_step) -> Any:
    def with_change(loop: Loop, batch: Any) -> None:
        loop.taken = getattr(loop, "taken", 0) + 1
        if loop.taken == n:
            do(loop)
        step(loop, batch)

    return with_change


def keep_zeros(loop: Loop, batch: Any) -> None:
    loop.optimizer.zero_grad(set_to_none=False)
    loop.loss_fn(loop.model, batch).backward()
    loop.optimizer.step()


def layered(frozen: bool, step: Callable[[Loop, Any], None] = take_step) -> Loop:
    loop = with_noise(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    loop.model[1].requires_grad_(not frozen)
    loop.step = step
    return loop


def freeze(loop: Loop, flag: bool = False) -> None:
    loop.model[1].requires_grad_(flag)


def unfreeze(loop: Loop) -> None:
    freeze(loop, True)


def with_new_group(**options: Any) -> Loop:
    """The first layer joins the optimiser in mid-run, with decay where the others have it."""
    decay = {"weight_decay": mf.Float(1e-3, 1, log=True, init=0.1)} if "weight_decay" in options else {}
    space = noise_space(**decay)
    model = nn.Sequential(KnownNoise(space["noise"], (12, 5)), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1, momentum=0.9, **options)

    def join(loop: Loop) -> None:
        unfreeze(loop)
        loop.optimizer.add_param_group({"params": list(loop.model[1].parameters()), "lr": 0.05})

    return loop_of(model, space, optimizer=optimizer, step=at_step(3, join))


CHANGES: dict[str, Callable[[], Loop]] = {
    "frozen": partial(layered, True),
    "unfrozen in mid-run": partial(layered, True, at_step(3, unfreeze)),
    "frozen in mid-run": partial(layered, False, at_step(3, freeze)),
    "frozen in mid-run, its zero gradient kept": partial(layered, False, at_step(3, freeze, keep_zeros)),
    "unfrozen at the judged step": partial(layered, True, at_step(4, unfreeze)),
    "a group added in mid-run": with_new_group,
    "a group with decay added in mid-run": partial(with_new_group, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_hypergradient_is_right_when_weights_come_and_go(kind):
    assert found(CHANGES[kind]) == pytest.approx(truth(CHANGES[kind]), rel=EXACT)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_whole_run_judged_at_the_average_goes_through(kind):
    loop = CHANGES[kind]().attach(horizon="run", hyper_optimizer=mf.SignSteps).run(12)
    assert loop.tuner.log()["hypersteps"] == 12
    assert set(loop.tuner.finish()) == {"last", "average", "earlier"}


# --- how a penalty finds the weights ------------------------------------------------------------------------


def squares(weights: Iterable[Tensor]) -> Tensor:
    return sum(w.square().sum() for w in weights)


def penalised(choose: Callable[[nn.Module, torch.optim.Optimizer], Any]) -> Loop:
    """`choose(model, optimizer)` -> what finds the weights of a model, or a list made before the loop."""
    space = mf.Space(l2=mf.Float(1e-4, 1, log=True, init=0.05))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    chosen = choose(model, optimizer)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        loss = cross_entropy(model, batch)
        if not model.training:
            return loss
        return loss + space["l2"] * squares(chosen(model) if callable(chosen) else chosen)

    return loop_of(model, space, loss_fn, optimizer, valid_loss_fn=cross_entropy)


def ids(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters() if p.ndim > 1}


CHOICES: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "a list": lambda model, o: [p for p in model.parameters() if p.ndim > 1],
    "a list of one weight, and an attribute": lambda model, o: lambda m, w=model[0].weight: [w, m[2].weight],
    "the optimiser's groups": lambda model, o: lambda m: [p for g in o.param_groups for p in g["params"]],
    "by type": lambda model, o: lambda m: [p for p in m.parameters() if isinstance(p, nn.Parameter)],
    "by exact type": lambda model, o: lambda m: [p for p in m.parameters() if type(p) is nn.Parameter],
    "by requires_grad": lambda model, o: lambda m: [p for p in m.parameters() if p.requires_grad],
    "by is_leaf": lambda model, o: lambda m: [p for p in m.parameters() if p.is_leaf],
    "by identity": lambda model, o: lambda m, known=ids(model): [p for p in m.parameters() if id(p) in known],  # noqa: B008
    "by name": lambda model, o: lambda m: [p for n, p in m.named_parameters() if n.endswith("weight")],
    "by get_parameter": lambda model, o: lambda m: [m.get_parameter("0.weight")],
    "by module": lambda model, o: lambda m: [k.weight for k in m.modules() if isinstance(k, nn.Linear)],
    "by what has a gradient": lambda model, o: (
        lambda m: [p for p in m.parameters() if p.grad is None or True]  # noqa: SIM222
    ),
    "as a vector": lambda model, o: lambda m: [parameters_to_vector(m.parameters())],
    "of the closed-over model": lambda model, o: lambda m: list(model.parameters()),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_a_penalty_reaches_the_weights_however_it_finds_them(kind):
    build = partial(penalised, CHOICES[kind])
    assert found(build) == pytest.approx(truth(build), rel=EXACT)


def test_a_loss_that_closes_over_the_model_is_differentiated():
    def build() -> Loop:
        space = noise_space()
        model = network()
        inner = noisy_loss(space)
        return loop_of(model, space, lambda _, batch: inner(model, batch))

    assert found(build) == pytest.approx(truth(build), rel=EXACT)


def test_noise_on_weights_that_were_listed_before_the_loop():
    def build() -> Loop:
        space = noise_space()
        model = network()
        listed = list(model.parameters())
        z = [torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) for p in listed]

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            loss = cross_entropy(model, batch)
            if not model.training:
                return loss
            return loss + sum((w + space["noise"] * n).pow(4).sum() for w, n in zip(listed, z, strict=True))

        return loop_of(model, space, loss_fn)

    assert found(build) == pytest.approx(truth(build), rel=EXACT)


# --- compiled models ----------------------------------------------------------------------------------------


def compiled(how: str, backend: str) -> Loop:
    space = noise_space()
    model = network(KnownNoise(space["noise"], (12, 5)))
    if how == "in place":
        model.compile(backend=backend)
        return loop_of(model, space)
    if how == "loss":
        return loop_of(model, space, torch.compile(cross_entropy, backend=backend))
    fast = torch.compile(model, backend=backend)
    if how == "closed over":
        return loop_of(model, space, lambda _, batch: cross_entropy(fast, batch))
    return loop_of(fast, space)


@pytest.mark.parametrize(
    ("how", "backend"),
    [
        ("model", "eager"),
        ("in place", "eager"),
        ("loss", "eager"),
        ("closed over", "eager"),
        ("model", "aot_eager"),
    ],
)
def test_a_compiled_model_has_the_hypergradient_of_the_eager_one(how, backend):
    torch.compiler.reset()
    torch.manual_seed(0)
    eager = partial(compiled, "in place", "eager")
    assert found(partial(compiled, how, backend)) == pytest.approx(truth(eager), rel=EXACT)


@pytest.mark.slow
def test_dropout_of_a_model_compiled_by_inductor_is_tuned():
    """torch's compiled graphs do not know double backward, so the tuner runs the model as it was written."""
    torch.set_default_dtype(torch.float32)
    torch.compiler.reset()
    space = mf.Space(rate=mf.Float(0.05, 0.8, init=0.3))
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), mf.nn.Dropout(space["rate"]), nn.Linear(16, 3))
    fast = torch.compile(model)
    loop = loop_of(fast, space, train=_single(data(12, 1)), valid=_single(data(20, 2)))
    loop.attach(hyper_optimizer=mf.SignSteps).run(6)
    assert loop.tuner.log()["hypersteps"] == 6
    assert float(space["rate"]) != pytest.approx(0.3)


def _single(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.is_floating_point() else t for t in batch)


# --- what a loss may depend on ------------------------------------------------------------------------------


def branching(share: float, seed: int = 0) -> Loop:
    """The hyperparameter is used in a share of the passes."""
    space = mf.Space(l2=mf.Float(1e-4, 1, log=True, init=0.05))
    generator = torch.Generator().manual_seed(seed)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        loss = cross_entropy(model, batch)
        if model.training and float(torch.rand((), generator=generator)) < share:
            loss = loss + space["l2"] * squares(model.parameters())
        return loss

    return loop_of(network(), space, loss_fn)


@pytest.mark.parametrize("share", [0.8, 0.3])
def test_a_hyperparameter_that_is_missed_now_and_then_is_no_error(share):
    loop = branching(share).attach(hyper_optimizer=mf.SignSteps).run(40)
    assert loop.tuner.log()["hypersteps"] == 40
    assert float(loop.space["l2"]) != 0.05


def test_a_hyperparameter_that_is_never_reached_is_an_error_in_a_sentence():
    loop = branching(0.0).attach()
    with pytest.raises(mf.errors.UnreachedHyperparameter, match="l2 did not in 10 hyper-steps"):
        loop.run(11)


def test_a_hyperparameter_that_is_read_as_a_plain_number_is_tuned_all_the_same():
    def build() -> Loop:
        space = mf.Space(l2=mf.Float(1e-4, 1, log=True, init=0.05))

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            return cross_entropy(model, batch) + float(space["l2"]) * squares(model.parameters())

        return loop_of(network(), space, loss_fn, valid_loss_fn=cross_entropy)

    assert found(build) == pytest.approx(truth(build), rel=1e-2)  # a difference in steps of 1 % of the range


def test_the_mean_of_a_random_branch_is_the_mean_hypergradient():
    """Each look differentiates the pass that it draws; over many, the share of the branch comes through."""
    loop = branching(0.5).attach()
    loop.optimizer.param_groups[0].update(lr=0.0, momentum=0.0)  # every step is the same
    loop.optimizer.param_groups[0]["lr"] = 1e-9
    loop.run(150)
    always = branching(1.0)
    always.model.load_state_dict(loop.model.state_dict())
    always.optimizer.param_groups[0].update(lr=1e-9, momentum=0.0)
    whole = always.attach().run(1).hypergradients()["l2"]
    looks = [float(g[0]) if g[0] is not None else 0.0 for g in loop.tuner.hyper_optimizer.given]
    # 150 coins: the standard error of the mean is 0.08 of it
    assert sum(looks) / len(looks) == pytest.approx(0.5 * whole, rel=0.35)
    assert not math.isclose(looks[0], sum(looks) / len(looks))


def pruned(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    prune.l1_unstructured(model[0], "weight", 0.5)


def grown(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A wider hidden layer under the same names."""
    for i, layer in ((0, nn.Linear(4, 9)), (2, nn.Linear(9, 3))):
        model[i] = layer
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.state.clear()


@pytest.mark.parametrize("change", [pruned, grown])
@pytest.mark.parametrize("end", ["at once", "later"])
def test_weights_that_get_other_names_or_shapes_end_no_run(change, end):
    torch.manual_seed(0)
    space = mf.Space(weight_decay=mf.Float(1e-4, 1e-1, log=True))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(16, 4), torch.randint(0, 3, (16,))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    tuner = mf.Tuner(model, optimizer, space, loss_fn, [batch], [batch], schedule=1, total_steps=40)
    for n in range(10 if end == "at once" else 40):
        if n == 9:
            change(model, optimizer)
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    last = float(loss_fn(model.eval(), batch).detach())
    losses = tuner.finish()
    assert losses["last"] == pytest.approx(last)
    assert float(loss_fn(model, batch).detach()) == pytest.approx(min(losses.values()))


@dataclass
class Pair:
    """A batch in an object of the user's."""

    x: Tensor
    y: Tensor
    z: Tensor
    note: str = "kept"


@pytest.mark.parametrize("examples", [1000, 5])
def test_a_batch_that_is_a_dataclass_is_counted_and_cut_as_a_tuple_is(examples):
    def build(kind: Callable[..., Any]) -> Loop:
        space = noise_space(weight_decay=mf.Float(1e-4, 1e-1, log=True, init=1e-2))
        theirs = noisy_loss(space)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            return theirs(model, (batch.x, batch.y, batch.z) if kind is Pair else batch)

        loop = loop_of(network(), space, loss_fn)
        loop.optimizer = torch.optim.Adam(loop.model.parameters(), lr=0.05, weight_decay=0.01)
        loop.train, loop.valid = ([kind(*batch) for batch in batches] for batches in (loop.train, loop.valid))
        return loop

    as_tuples = found(lambda: build(lambda *parts: parts), examples=examples)
    assert found(lambda: build(Pair), examples=examples) == pytest.approx(as_tuples, rel=1e-12)


def test_torchscript_is_refused_in_a_sentence():
    loop = with_noise(nn.Linear(5, 3))
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        loop.model = nn.Sequential(torch.jit.trace(nn.Linear(5, 3), torch.randn(2, 5)))
    with pytest.raises(mf.errors.UnsupportedSetting, match="TorchScript"):
        loop.attach()
