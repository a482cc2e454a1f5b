"""A population equals the loop over its members, to rounding."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import midflight as mf
from midflight.updates import RULES

N, STEPS = 3, 24
STARTS = {"weight_decay": [1e-4, 1e-3, 3e-2], "noise": [0.1, 0.4, 0.9], "smoothing": [[0.0], [0.1], [0.2]]}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "plain adamw": partial(torch.optim.AdamW, lr=1e-2),
    "adamw in groups": lambda params: decays_matrices_only(list(params)),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-2, centered=True),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
}


def decays_matrices_only(params):
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1, "lr": 2e-2}]
    groups += [{"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def space():
    return mf.Space(
        weight_decay=mf.Float(1e-5, 1e-1, log=True, init=1e-3), noise=mf.Float(0.0, 1.0, init=0.3),
        smoothing=mf.Float(0.0, 0.4, shape=(1,)), dtype=torch.float64,
    )  # fmt: skip


class Net(nn.Module):
    def __init__(self, space):
        super().__init__()
        self.space = space
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x):
        return self.layers(x)


def loss(model, batch):
    x, y, draws = batch
    logits = model(x + model.space["noise"] * draws)
    mixed = model.space["smoothing"][0]
    return (1 - mixed) * F.cross_entropy(logits, y) - mixed * F.log_softmax(logits, 1).mean()


def validate(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def data(count, seed):
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(16, 6, generator=g, dtype=torch.float64),
            torch.randint(0, 3, (16,), generator=g),
            torch.randn(16, 6, generator=g, dtype=torch.float64),
        )
        for _ in range(count)
    ]


TRAIN, VALID = ([data(count, seed + i) for i in range(N)] for count, seed in ((STEPS, 0), (5, 100)))


def population(optimizer="adam", device="cpu", **options):
    usual = {"bind": ["weight_decay"], "schedule": 3, "total_steps": STEPS, "starts": STARTS}
    options = {"valid_loader": together(VALID, device), **usual, **options}
    return mf.Population(
        N, lambda space: Net(space).to(device), space(), OPTIMIZERS[optimizer], loss_fn=loss,
        valid_loss_fn=validate, **options,
    )  # fmt: skip


def together(each, device="cpu"):
    return [tuple(t.to(device) for t in batch) for batch in mf.stacked(each)]


def alone(i, optimizer, bind, estimator, hyper_optimizer=mf.SignSteps):
    """The member as a loop of its own; its training losses and what it ends with.

    The tuner's own way through T1 has each third batch, the one at which a hyper-step comes.
    """
    torch.manual_seed(i)
    own = space()
    model = Net(own)
    own.set(**{name: values[i] for name, values in STARTS.items()})
    opt = OPTIMIZERS[optimizer](model.parameters())
    mf.Tuner(
        model, opt, own, loss, TRAIN[i][2::3], VALID[i], valid_loss_fn=validate, bind=bind, schedule=3,
        horizon="step", total_steps=STEPS, estimator=estimator, hyper_optimizer=hyper_optimizer,
    )  # fmt: skip
    losses = []
    for batch in TRAIN[i]:
        opt.zero_grad()
        losses.append(loss(model, batch))
        losses[-1].backward()
        opt.step()
    return [float(x.detach()) for x in losses], model, own


@pytest.mark.parametrize(
    ("optimizer", "bind", "estimator"),
    [
        *((name, ["weight_decay"], "one_step") for name in OPTIMIZERS),
        ("adam", {"weight_decay": "lr"}, "one_step"),
        ("adamw in groups", {"weight_decay": "lr"}, "one_step"),
        ("adam", {"weight_decay": "eps"}, "one_step_cheap"),
        ("sgd", ["weight_decay"], "t1t2"),
    ],
)
def test_each_member_trains_and_tunes_as_it_would_alone(optimizer, bind, estimator, monkeypatch):
    monkeypatch.setattr("midflight.updates.blocks.BLOCK", 8)  # some weights are large
    members_equal_loops(optimizer, bind, estimator)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("optimizer", "bind", "estimator"),
    [
        pytest.param("adam", ["weight_decay"], "one_step", marks=pytest.mark.slow),
        pytest.param("adam", {"weight_decay": "lr"}, "one_step", marks=pytest.mark.slow),
        ("adamw", ["weight_decay"], "one_step"),  # amsgrad has no program
        pytest.param("plain adamw", ["weight_decay"], "one_step_cheap", marks=pytest.mark.slow),
    ],
)
def test_so_it_does_compiled(optimizer, bind, estimator, device):
    torch.compiler.reset()  # torch runs what it has compiled for eight kinds of shapes as it is
    try:
        members_equal_loops(optimizer, bind, estimator, device, compile=True)
    except mf.errors.NoCompiler as error:
        pytest.skip(str(error))


def test_compiled_weights_come_to_lie_in_memory_as_their_gradients_do():
    """Or each step copies the gradients, which takes as long as all the rest of it."""
    torch.compiler.reset()
    try:
        every_one = population(compile=True)
    except mf.errors.NoCompiler as error:
        pytest.skip(str(error))
    copied = []
    batches = together(TRAIN)
    for batch in batches[:8]:  # the first has no state, the second moves all
        with Copied(every_one.params["layers.0.weight"].numel()) as copies:
            every_one.step(batch)
        copied.append(copies.count)
    assert copied[1] > 0
    assert copied[2:] == [0] * 6  # two hyper-steps among them
    weight = every_one.params["layers.0.weight"]
    assert not weight.is_contiguous()
    every_one.step(batches[8])  # a program's own results, which no dispatch mode has watched
    assert every_one.params["layers.0.weight"].stride() == weight.stride()


class Copied(TorchDispatchMode):
    """Counts the copies of tensors of a size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default and args[0].numel() == self.size:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
def test_so_it_does_on_a_gpu():
    members_equal_loops("adam", ["weight_decay"], "one_step", "cuda")


def members_equal_loops(optimizer, bind, estimator, device="cpu", **options):
    every_one = population(optimizer, device, bind=bind, estimator=estimator, **options)
    losses = torch.stack([every_one.step(batch) for batch in together(TRAIN, device)], 1)
    for i in range(N):
        expected, model, own = alone(
            i, optimizer, bind, estimator, options.get("hyper_optimizer", mf.SignSteps)
        )
        assert losses[i].tolist() == pytest.approx(expected, rel=1e-9)
        found, found_space = every_one.member(i)
        for name, p in model.named_parameters():
            assert torch.allclose(found.get_parameter(name).cpu(), p, rtol=1e-9, atol=1e-12)
        for name in own:
            assert found_space[name].raw.tolist() == pytest.approx(own[name].raw.tolist(), rel=1e-9)
            assert own.as_dict()[name] != STARTS[name][i]


BY_LENGTH = partial(torch.optim.SGD, lr=1.0)
"""Moves by the length of a hypergradient, too, which signs do not show."""


def test_members_are_moved_by_the_hypergradient_that_they_have_alone():
    members_equal_loops("adam", ["weight_decay"], "one_step", hyper_optimizer=BY_LENGTH)


def test_a_resumed_population_goes_on_as_the_saved_one():
    batches = list(mf.stacked(TRAIN))
    whole, first, second = population(), population(), population(seeds=[7, 8, 9])
    for batch in batches:
        whole.step(batch)
    for batch in batches[:10]:
        first.step(batch)
    second.load_state_dict(first.state_dict())
    first.step(batches[0])  # the state is a copy
    for batch in batches[10:]:
        second.step(batch)
    for name, p in whole.params.items():
        assert torch.equal(second.params[name], p)
    assert all(torch.equal(second.raws[name], raw) for name, raw in whole.raws.items())


@pytest.mark.parametrize("shuffled", [False, True])
def test_reading_the_validation_loader_leaves_random_numbers_alone_and_can_be_resumed(shuffled):
    def start():
        rows = [list(zip(*TRAIN[i][0], strict=True)) for i in range(N)]
        loaders = [torch.utils.data.DataLoader(each, 4, shuffle=shuffled) for each in rows]
        torch.manual_seed(0)
        return population(schedule=1, valid_loader=mf.stacked(loaders))

    whole, first, second = start(), start(), start()
    before = torch.get_rng_state()
    for batch in mf.stacked(TRAIN):
        whole.step(batch)
    assert torch.equal(torch.get_rng_state(), before)
    batches = list(mf.stacked(TRAIN))
    for batch in batches[:10]:
        first.step(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[10:]:
        second.step(batch)
    assert all(torch.equal(second.params[name], p) for name, p in whole.params.items())


def test_noise_and_dropout_are_drawn_for_each_member():
    own = mf.Space(noise=mf.Float(0.0, 1.0), rate=mf.Float(0.0, 0.8))

    def build(space):
        noise, dropout = mf.nn.GaussianNoise(space["noise"]), mf.nn.Dropout(space["rate"])
        return nn.Sequential(noise, dropout, nn.Linear(6, 3))

    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    batch = x.expand(4, 16, 6), y.expand(4, 16)
    pop = mf.Population(
        4, build, own, partial(torch.optim.SGD, lr=0.1), loss_fn=validate, valid_loader=[batch],
        seeds=[0] * 4, schedule=1,
    )  # fmt: skip
    before = pop.raws["noise"].clone()
    assert len(set(pop.losses(batch).tolist())) == 1
    assert len(set(pop.step(batch).tolist())) == 4
    assert (pop.raws["noise"] != before).all()


def test_the_worst_copy_the_best_and_then_go_their_own_ways():
    pop = population(schedule=1)
    for batch in list(mf.stacked(TRAIN))[:3]:
        pop.step(batch)
    kept = {name: p.clone() for name, p in pop.params.items()}
    assert pop.exploit(torch.tensor([float("nan"), 1.0, 2.0])) == [(0, 1)]
    moments = [state["exp_avg"] for state in pop.state.values()]
    signs = [pop.hyper_optimizer.state[raw]["signs"] for raw in pop.raws.values()]
    for t in (*pop.params.values(), *pop.raws.values(), *moments):
        assert torch.equal(t[0], t[1])
        assert not torch.equal(t[1], t[2])
    assert all(torch.equal(t[0], t[1]) for t in signs)
    assert all(torch.equal(pop.params[name][1:], p[1:]) for name, p in kept.items())
    pop.step(next(iter(mf.stacked(TRAIN))))
    assert not torch.equal(pop.params["layers.0.weight"][0], pop.params["layers.0.weight"][1])


def test_exploiting_comes_after_so_many_hyper_steps_by_the_mean_validation_loss(monkeypatch):
    seen = []
    monkeypatch.setattr(mf.Population, "exploit", lambda self, losses: seen.append((self._calls, losses)))
    pop = population(schedule=3, exploit=4)
    for batch in mf.stacked(TRAIN):
        pop.step(batch)
    assert [calls for calls, _ in seen] == [12, 24]
    assert all(losses.shape == (N,) for _, losses in seen)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"starts": {"noise": [0.1]}}, ValueError, "n noise, one per member"),
        ({"seeds": [1, 2]}, ValueError, "n seeds, one per member"),
        ({"starts": {"noise": [0.1, 0.2, 2.0]}}, mf.errors.SpaceError, "needed"),
        ({"bind": ["nothing"]}, mf.errors.BindingError, "nothing"),
        ({"bind": {"smoothing": "lr"}}, mf.errors.BindingError, "one number"),
        ({"estimator": "unrolled"}, ValueError, "recorded graph"),
        ({"total_steps": float("nan")}, ValueError, "total_steps must be a whole number"),
        ({"exploit": 0}, ValueError, "exploit must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused(options, error, says):
    with pytest.raises(error, match=says):
        population(**options)


def test_models_with_buffers_and_steps_that_mix_entries_are_refused():
    def build(kind):
        return lambda space: nn.Sequential(nn.Linear(4, 4, bias=False), kind(4))

    options = {"loss_fn": validate, "valid_loader": [0]}
    with pytest.raises(mf.errors.UnsupportedParameter, match="buffers"):
        mf.Population(2, build(nn.BatchNorm1d), space(), OPTIMIZERS["adam"], **options)
    with pytest.raises(mf.errors.UnsupportedOptimizer, match="elementwise"):
        mf.Population(2, build(lambda n: nn.Linear(n, n, bias=False)), space(), torch.optim.Muon, **options)


@pytest.mark.parametrize(
    ("name", "twin"),
    {
        "estimator_for": lambda _: mf.hypergrad.ESTIMATORS["one_step_cheap"],
        "rule_for": lambda optimizer: RULES[torch.optim.SGD],
    }.items(),
)
def test_members_that_are_tuned_otherwise_than_the_loops_are_found_out(name, twin, monkeypatch):
    monkeypatch.setattr(f"midflight.tuner.population.{name}", twin)
    with pytest.raises((AssertionError, KeyError)):
        members_equal_loops("adam", ["weight_decay"], "one_step", hyper_optimizer=BY_LENGTH)


def test_a_scheduler_of_the_population_s_optimizer_gives_a_factor_of_at_most_one():
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    members = mf.Population(
        2, lambda _: torch.nn.Linear(4, 1), mf.Space(lr=mf.Float(1e-4, 1e-1, log=True, init=1e-2)),
        partial(torch.optim.SGD, lr=1e-3), loss_fn=lambda m, b: m(b).square().mean(),
        valid_loader=[torch.ones(2, 5, 4)], total_steps=20,
    )  # fmt: skip
    schedule = one_cycle(members.optimizer, max_lr=0.1, total_steps=20, cycle_momentum=False)
    for _ in range(5):
        factor = members._updates(members.values)["weight"].options["lr"].flatten() / members.values["lr"]
        assert bool((factor <= 1.0001).all())
        members.step(torch.ones(2, 5, 4))
        members.optimizer._opt_called = True  # the population steps without it
        schedule.step()
