"""The hypergradient of a live loop against a central difference of the step as that loop takes it.

The truth needs nothing of midflight but the map from raw coordinate to value: the run is copied just before
a hyper-step, and the loop takes that step from the copy with the raw coordinate shifted, in float64, with
torch's own optimiser, clipping, `GradScaler` and scheduler. Options are written into the groups by hand.

The table is optimisers x loops, and each cell compares all kinds of hyperparameters. Each loop that changes
a gradient or an option also has a wrong twin: a tuner that does not know of it, which the comparison must
reject.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import pytest
import torch
from recording import Recorder, schedule_free
from strangers import (
    Belief,
    ByAttribute,
    ByCount,
    ClipsLater,
    Joint,
    Late,
    Momentum,
    NeedsClosure,
    Noisy,
    Norm,
    OnSelf,
    Sign,
    ThreeBetas,
    UnderAnotherKey,
    Wraps,
)
from torch import nn

import midflight as mf
from midflight.errors import UnsupportedOptimizer
from midflight.gradcheck.oracles import derivative
from midflight.tuner import gradient
from midflight.tuner.binding import Binding
from midflight.tuner.gradient import ReceivedGradient
from midflight.tuner.hyperstep import HyperStep
from midflight.updates import SGD, BlackBox

FEATURES, HIDDEN, CLASSES, EXAMPLES, MICRO = 8, 6, 3, 24, 4
STEPS, EVERY = 6, 3  # the second hyper-step is compared; the first may teach the tuner how the loop clips
LR, DECAY = 0.03, 0.02  # of the user's groups
MAX_NORM, MAX_ENTRY = 0.05, 0.02  # what clips at each step of every loop below; the loops assert it
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
EXACT = 1e-6  # relative; twice what the truth may be off by
SURE = 5e-7  # relative uncertainty of the truth, by rounding; at SEED no derivative is too small for it
SEED = 7
WRONG = 1e-2  # relative; the least that a wrong twin is off by

KINDS = {
    "noise": mf.Float(0.0, 1.0, init=0.4),
    "l2": mf.Float(1e-3, 1.0, log=True, init=0.05),
    "smoothing": mf.Float(0.0, 0.5, init=0.2),
    "weight_decay": mf.Float(1e-3, 1.0, log=True, init=0.05),
    "lr": mf.Float(1e-3, 1e-1, log=True, init=0.02),
}
IN_THE_LOSS = ("noise", "l2", "smoothing")

Optimizer = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "SGD momentum": lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "fused AdamW": lambda p, **o: torch.optim.AdamW(p, fused=True, **o),
    "RMSprop": torch.optim.RMSprop,
    "NAdam": torch.optim.NAdam,
}


if find_spec("schedulefree"):
    OPTIMIZERS["schedule-free AdamW"] = schedule_free
OPTIMIZERS["a stranger"] = Belief
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    OPTIMIZERS["Muon"] = torch.optim.Muon


@dataclass
class Run:
    """What a step of the loop changes; copied as one, the optimisers hold the copied weights."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler

    def groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


def plain(run, loss, batch):
    run.zero_grad()
    loss(run.model, batch).backward()
    run.step()


def accumulated(run, loss, batch):
    run.zero_grad()
    for micro in zip(*(array.chunk(MICRO) for array in batch), strict=True):
        (loss(run.model, micro) / MICRO).backward()
    run.step()


def averaged_by_hand(run, loss, batch):
    run.zero_grad()
    for micro in zip(*(array.chunk(MICRO) for array in batch), strict=True):
        loss(run.model, micro).backward()
    for p in run.model.parameters():
        p.grad /= MICRO
    run.step()


def clip_by_norm(weights):
    assert nn.utils.clip_grad_norm_(weights, MAX_NORM) > 1.1 * MAX_NORM


def clipped_by_norm(run, loss, batch):
    run.zero_grad()
    loss(run.model, batch).backward()
    clip_by_norm(run.model.parameters())
    run.step()


def accumulated_and_clipped(run, loss, batch):
    run.zero_grad()
    for micro in zip(*(array.chunk(MICRO) for array in batch), strict=True):
        (loss(run.model, micro) / MICRO).backward()
    clip_by_norm(run.model.parameters())
    run.step()


def clipped_by_optimizer(run, loss, batch):
    run.zero_grad()
    loss(run.model, batch).backward()
    for optimizer in run.optimizers:
        clip_by_norm([p for group in optimizer.param_groups for p in group["params"]])
    run.step()


def clipped_by_value(run, loss, batch):
    run.zero_grad()
    loss(run.model, batch).backward()
    entries = torch.cat([p.grad.reshape(-1) for p in run.model.parameters()]).abs()
    assert 0 < int((entries > MAX_ENTRY).sum()) < len(entries)
    nn.utils.clip_grad_value_(run.model.parameters(), MAX_ENTRY)
    run.step()


def scaled(run, loss, batch):
    run.zero_grad()
    run.scaler.scale(loss(run.model, batch)).backward()
    for optimizer in run.optimizers:
        run.scaler.step(optimizer)
    run.scaler.update()


def scaled_and_clipped(run, loss, batch):
    run.zero_grad()
    run.scaler.scale(loss(run.model, batch)).backward()
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    clip_by_norm(run.model.parameters())
    for optimizer in run.optimizers:
        run.scaler.step(optimizer)
    run.scaler.update()


def by_closure(run, loss, batch):
    def closure():
        run.zero_grad()
        value = loss(run.model, batch)
        value.backward()
        return value

    (optimizer,) = run.optimizers
    optimizer.step(closure)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (n + 1) / (2 * STEPS))


@dataclass(frozen=True)
class Loop:
    """A user's loop.

    Attributes:
        step: (run, loss, batch): from `zero_grad` to `optimizer.step`.
        layout: "one" group; two "groups" of one optimiser, the second without decay and at another learning
            rate; or a "pair" of optimisers.
        scheduler: optimiser -> its scheduler, which steps after it.
        factor: what that scheduler makes of the learning rate at the hyper-step.
        options: of the tuner.
    """

    step: Callable[..., None]
    layout: str = "one"
    scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None
    factor: float = 1.0
    options: dict[str, float] = field(default_factory=dict)


CLIP = {"max_grad_norm": MAX_NORM}
HALFWAY = (1 + math.cos(math.pi * (STEPS - 1) / (2 * STEPS))) / 2
COMMON = {
    "plain": Loop(plain),
    "clip by norm": Loop(clipped_by_norm, options=CLIP),
    "scaler and clip by norm": Loop(scaled_and_clipped, options=CLIP),
    "groups": Loop(plain, "groups"),
    "two optimisers": Loop(plain, "pair"),
}
VARIANTS = {  # with a few optimisers only, whose rules do not see what happens before the step
    "accumulation": Loop(accumulated),
    "accumulation, mean by hand": Loop(averaged_by_hand),
    "accumulation and clip by norm": Loop(accumulated_and_clipped, options=CLIP),
    "clip by norm, detected": Loop(clipped_by_norm),
    "clip by value": Loop(clipped_by_value),
    "scaler": Loop(scaled),
    "closure": Loop(by_closure),
    "cosine": Loop(plain, scheduler=cosine, factor=HALFWAY),
    "warm-up": Loop(plain, scheduler=warm_up, factor=0.5),
    "groups and cosine": Loop(plain, "groups", cosine, HALFWAY),
    "two optimisers, joint clip by norm": Loop(clipped_by_norm, "pair", options=CLIP),
    "two optimisers, each clipped by norm": Loop(clipped_by_optimizer, "pair", options=CLIP),
    "two optimisers, scaler": Loop(scaled, "pair"),
    "two optimisers, scaler and joint clip by norm": Loop(scaled_and_clipped, "pair", options=CLIP),
}
LOOPS = COMMON | VARIANTS
FEW = ("SGD momentum", "fused AdamW")


def batch(seed, device):
    """Inputs, their standard normal noise and their classes, as a function of the inputs."""
    rng = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, EXAMPLES, FEATURES, dtype=torch.float64, generator=rng).to(device)
    return x, noise, (x[:, :CLASSES] + 0.5 * noise[:, :CLASSES]).argmax(1)


T1, T2 = ({device: batch(2 * SEED + n, device) for device in DEVICES} for n in (1, 2))


def network(bias):
    """Smooth, so that a central difference has no kinks to cross."""
    layers = nn.Linear(FEATURES, HIDDEN, bias=bias), nn.Tanh(), nn.Linear(HIDDEN, CLASSES, bias=bias)
    return nn.Sequential(*layers).double()


def cross_entropy(model, batch):
    x, _, y = batch
    return nn.functional.cross_entropy(model(x), y)


def training_loss(space):
    """Whatever of the space is no option of the optimiser, at its place in the loss."""

    def loss(model, batch):
        x, noise, y = batch
        if "noise" in space:
            x = x + space["noise"].value * noise
        log_p = model(x).log_softmax(1)
        value = -log_p.gather(1, y[:, None]).mean()
        if "smoothing" in space:
            s = space["smoothing"].value
            value = (1 - s) * value - s * log_p.mean()
        if "l2" in space:
            value = value + space["l2"] * sum(w.square().sum() for w in model.parameters())
        return value

    return loss


def begin(optimizer, loop, device):
    """A run before its first step. Muon takes matrices only, and its partner in a pair is AdamW."""
    make = OPTIMIZERS[optimizer]
    torch.manual_seed(SEED)
    model = network(bias=optimizer != "Muon").to(device)
    first, second = list(model[0].parameters()), list(model[2].parameters())
    options = {"lr": LR, "weight_decay": DECAY}
    if loop.layout == "pair":
        partner = torch.optim.SGD if optimizer == "AdamW" else torch.optim.AdamW
        optimizers = [make(first, **options), partner(second, lr=0.4 * LR, weight_decay=0.5 * DECAY)]
    elif loop.layout == "groups":
        groups = [{"params": first}, {"params": second, "lr": 0.4 * LR, "weight_decay": 0.0}]
        optimizers = [make(groups, **options)]
    else:
        optimizers = [make([*first, *second], **options)]
    # a scale that grows at each step: one that was read too early or too late is wrong
    return Run(model, optimizers, torch.amp.GradScaler(device, init_scale=2.0**6, growth_interval=1))


SHARES = {  # of the largest group's setting, as `begin` makes the groups
    "one": {"lr": [1.0], "weight_decay": [1.0]},
    "groups": {"lr": [1.0, 0.4], "weight_decay": [1.0, 0.0]},
    "pair": {"lr": [1.0, 0.4], "weight_decay": [1.0, 0.5]},
}


def loss_after_the_step(run, loop, space, name, device):
    """The validation loss after the loop's next step, as a function of a shift of one raw coordinate."""

    def after(shift):
        twin = copy.deepcopy(run)  # without the tuner's hooks, which torch does not copy
        with space.seeing(space.values({name: space[name].raw + shift})):
            for option in {"lr", "weight_decay"} & set(space):
                factor = loop.factor if option == "lr" else 1.0
                for group, share in zip(twin.groups(), SHARES[loop.layout][option], strict=True):
                    group[option] = float(space[option].value) * share * factor
            loop.step(twin, training_loss(space), T1[device])
        with torch.no_grad():
            return float(cross_entropy(twin.model, T2[device]))

    return after


TRUTHS = {}
"""(optimiser, loop, its kinds, device) -> (truths, loss after the step); a wrong twin takes the same step."""


def tuned(optimizer, loop, kinds, options=None, device="cpu"):
    """(hypergradient by the tuner, truth) of each kind, at the hyper-step of step STEPS."""
    case = optimizer, id(loop), tuple(kinds), device  # the loops of the table live as long as the module
    space = mf.Space({kind: KINDS[kind] for kind in kinds}, dtype=torch.float64)
    run, at = begin(optimizer, loop, device), []
    tuner = mf.Tuner(
        run.model, run.optimizers, space, training_loss(space), [T1[device]], [T2[device]],
        valid_loss_fn=cross_entropy, schedule=EVERY, horizon="step", hyper_optimizer=Recorder,
        on_hyperstep=lambda n, _: at.append(n),
        **{"examples": EXAMPLES, **loop.options, **(options or {})},
    )  # fmt: skip
    schedulers = [loop.scheduler(o) for o in run.optimizers] if loop.scheduler else []
    for step in range(1, STEPS + 1):
        if step == STEPS and case not in TRUTHS:
            losses = [loss_after_the_step(run, loop, space, kind, device) for kind in kinds]
            TRUTHS[case] = [truth_of(f) for f in losses], losses[0](0.0)
        loop.step(run, training_loss(space), T1[device])
        for scheduler in schedulers:
            scheduler.step()
    assert at[-1] == STEPS
    truths, expected = TRUTHS[case]
    with torch.no_grad():  # the truth differentiates the step that was taken
        assert float(cross_entropy(run.model, T2[device])) == pytest.approx(expected, rel=1e-13)
    return list(zip(tuner.hyper_optimizer.last, truths, strict=True))


def truth_of(f):
    value, uncertainty = derivative(f)
    assert uncertainty < SURE * abs(value)  # so each can be compared relative to itself
    return value


def known_to(optimizer):
    """The kinds of hyperparameters that a tuner finds under this optimiser."""
    return [kind for kind in KINDS if optimizer != "Muon" or kind not in IN_THE_LOSS]


def apart(pairs):
    """By how much each found value is off, relative to the truth."""
    return [abs(found / truth - 1) for found, truth in pairs]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("optimizer", "loop"), [(o, n) for o in OPTIMIZERS for n in LOOPS if n in COMMON or o in FEW]
)
def test_the_hypergradient_is_the_derivative_of_the_step_as_the_loop_takes_it(optimizer, loop, device):
    assert max(apart(tuned(optimizer, LOOPS[loop], known_to(optimizer), device=device))) < EXACT


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["lr", "noise"])  # one that the loss does not read, one that it does
def test_so_it_is_of_a_hyperparameter_alone(kind, loop, device):
    assert max(apart(tuned("AdamW", LOOPS[loop], [kind], device=device))) < EXACT


@pytest.mark.skipif("Muon" not in OPTIMIZERS, reason="Muon is in torch since 2.9.")
@pytest.mark.parametrize("layout", ["one", "pair"])
@pytest.mark.parametrize("kind", IN_THE_LOSS)
def test_hyperparameters_of_the_loss_are_refused_with_muon_before_training(kind, layout):
    with pytest.raises(UnsupportedOptimizer, match="Muon.*bfloat16.*" + kind):
        tuned("Muon", LOOPS["two optimisers" if layout == "pair" else "plain"], [kind])


def ignore_the_jacobian(patch):
    patch.setattr(ReceivedGradient, "jacobian", lambda *_: None)


def trust_the_factor(patch):
    """Otherwise the norm of the tuner's own gradient shows that the loop scales its loss."""
    patch.setattr(ReceivedGradient, "_scales_loss", lambda *_: False)


def count_one_pass(patch):
    """The mean of four accumulated gradients is then a gradient divided by four."""
    real = ReceivedGradient._of_groups

    def of_groups(self, groups, grads, passes, own_norm):
        return real(self, groups, grads, 1, own_norm)

    patch.setattr(ReceivedGradient, "_of_groups", of_groups)
    trust_the_factor(patch)


def read_the_scale_of_the_step_before(patch):
    real = gradient.loss_scale
    patch.setattr(gradient, "loss_scale", lambda: real() / 2)
    trust_the_factor(patch)


def ignore_the_scale_of_a_fused_step(patch):
    patch.setattr(HyperStep, "_final_gradients", lambda self, params: {n: p.grad for n, p in params.items()})


def ignore_the_schedule(patch):
    real = Binding.updates

    def updates(self, params, values):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Binding, "_factor", staticmethod(lambda place, group: 1.0))
            return real(self, params, values)

    patch.setattr(Binding, "updates", updates)


def treat_all_weights_as_the_first(patch):
    real = Binding.updates

    def updates(self, params, values):
        found = real(self, params, values)
        return dict.fromkeys(found, next(iter(found.values())))

    patch.setattr(Binding, "updates", updates)


def read_one_micro_batch(patch):
    """What the option `examples` does."""


CLIPPED = [name for name in LOOPS if "clip" in name]
OPTIONS = ["lr", "weight_decay"]
WRONG_TWINS = [
    (ignore_the_jacobian, CLIPPED, IN_THE_LOSS, {}),
    (count_one_pass, ["accumulation, mean by hand"], IN_THE_LOSS, {}),
    (read_the_scale_of_the_step_before, [n for n in LOOPS if "scaler" in n], IN_THE_LOSS, {}),
    (ignore_the_scale_of_a_fused_step, ["scaler"], OPTIONS, {}),
    (ignore_the_schedule, ["cosine", "warm-up", "groups and cosine"], ["lr"], {}),
    (treat_all_weights_as_the_first, ["groups", "two optimisers"], OPTIONS, {}),
    (read_one_micro_batch, ["accumulation"], ["noise", "smoothing"], {"examples": EXAMPLES // MICRO}),
]
"""(what the tuner does wrong, loops where it matters, kinds, options of the tuner)"""


@pytest.mark.parametrize("optimizer", FEW)
@pytest.mark.parametrize(
    ("twin", "loop", "kinds", "options"),
    [
        pytest.param(twin, loop, kinds, options, id=f"{twin.__name__}-{loop}")
        for twin, loops, kinds, options in WRONG_TWINS
        for loop in loops
    ],
)
def test_a_tuner_that_takes_the_loop_for_another_is_found_out(
    optimizer, twin, loop, kinds, options, monkeypatch
):
    if twin is ignore_the_scale_of_a_fused_step and "fused" not in optimizer:
        pytest.skip("only a fused optimiser takes the scale out itself.")
    twin(monkeypatch)
    among = list(KINDS if kinds is IN_THE_LOSS else kinds)  # of all kinds, the truth is known already
    pairs = zip(among, tuned(optimizer, LOOPS[loop], among, options), strict=True)
    assert min(apart([pair for kind, pair in pairs if kind in kinds])) > WRONG


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (Norm, "be elementwise"),
        (Joint, "treat each weight by itself"),
        (Noisy, "give the same step twice"),
        (Wraps, "holds another as .base"),
        (Sign, "Sign has a step that does not depend on the size of a gradient.*noise"),
    ],
)
def test_a_stranger_whose_derivative_two_steps_do_not_give_is_refused_before_training(optimizer, words):
    with pytest.raises(UnsupportedOptimizer, match=words):
        tuned_by(optimizer, ["lr", "noise"])


@pytest.mark.parametrize(
    ("optimizer", "kinds", "words"),
    [
        (Late, ["lr"], "be elementwise"),
        (OnSelf, ["lr"], "the same step on copies"),
        (UnderAnotherKey, ["lr"], "the same step on copies"),
        (ByCount, ["lr"], "treat each weight by itself|the same step on copies"),
        (ByAttribute, ["lr"], "the same step on copies"),
        (ClipsLater, ["lr"], "be elementwise"),
        (NeedsClosure, ["lr"], "the step of NeedsClosure failed .*without a closure"),
    ],
)
def test_or_at_the_first_hyperstep(optimizer, kinds, words):
    with pytest.raises(UnsupportedOptimizer, match=words):
        tuned_by(optimizer, kinds)


def test_options_of_a_stranger_that_takes_signs_are_tuned(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "sign", Sign)
    assert max(apart(tuned("sign", Loop(plain), ["lr", "weight_decay"]))) < EXACT


@pytest.mark.parametrize("estimator", ["unrolled", "implicit_neumann"])
def test_estimators_of_several_steps_are_refused_with_a_stranger(estimator, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "stranger", Belief)
    with pytest.raises(UnsupportedOptimizer, match="estimator of one step"):
        tuned("stranger", Loop(plain), ["lr", "noise"], options={"estimator": estimator})


@pytest.mark.parametrize("optimizer", [Momentum, ThreeBetas])
def test_options_of_any_type_are_passed_on(optimizer):
    assert max(apart(tuned_by(optimizer, ["lr", "weight_decay", "noise"]))) < EXACT


def test_ints_can_be_tuned_and_warm_up_from_zero_is_no_sign_of_a_step_by_signs():
    weight = nn.Parameter(torch.ones(3))
    rule = BlackBox(Momentum([weight], lr=0))
    assert {"lr", "weight_decay", "momentum"} <= rule.tunable
    assert not rule.why_not_differentiable


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8, 0.0])
@pytest.mark.parametrize("lr", [1.0, 1e-4, 1e-6])
def test_steps_of_any_size_have_right_derivatives(size, lr):
    draws = torch.Generator().manual_seed(0)
    weight, grad, v = (torch.randn(3, 4, generator=draws, dtype=torch.float64) for _ in range(3))
    leaf = lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True)  # noqa: E731
    options = {"lr": leaf(lr), "weight_decay": leaf(1e-4), "momentum": 0.9}
    own = {**options, "dampening": 0, "nesterov": False, "maximize": False}
    step = v, weight, size * grad, {}
    w, found = BlackBox(Momentum([nn.Parameter(weight)])).pullback(*step, options)
    expected, right = SGD().pullback(*step, own)
    torch.testing.assert_close(w, expected, rtol=1e-5, atol=0)
    assert {n: float(x) for n, x in found.items()} == pytest.approx(
        {n: float(x) for n, x in right.items()}, rel=1e-5
    )


def tuned_by(kind, kinds):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPTIMIZERS, "stranger", kind)
        step = by_closure if kind is NeedsClosure else plain
        return tuned("stranger", Loop(step), kinds)
