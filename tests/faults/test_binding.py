"""What the optimiser is really given: each used learning rate is read off the weights."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import Loop, data, network, noisy_loss, take_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

import midflight as mf
from midflight.tuner.binding import Binding

pytestmark = pytest.mark.usefixtures("double")


def lr_space(init: Any = 0.05, **fields: Any) -> mf.Space:
    return mf.Space(lr=mf.Float(1e-6, 10, log=True, init=init, **fields))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def loop_of(
    space: mf.Space, optimizer: Callable[..., Any] = torch.optim.SGD, loss: Any = loss_fn, **options: Any
) -> Loop:
    """Two layers in two groups, which trains without a tuner."""
    torch.manual_seed(0)
    model = network()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    settings = {"lr": 0.1, **options}
    made = optimizer(groups, **settings)
    return Loop(model, space, made, loss, [data(12, 1)[:2]], [data(20, 2)[:2]], valid_loss_fn=loss_fn)


def used(loop: Loop, steps: int, after: Callable[[], Any] = lambda: None) -> list[float]:
    """change of weight / gradient of each step, the same in both groups."""
    found = []
    for _ in range(steps):
        biases = [loop.model[0].bias, loop.model[2].bias]
        before = [b.detach().clone() for b in biases]
        take_step(loop, loop.train[0])
        rates = [float((x - b.detach())[0] / b.grad[0]) for x, b in zip(before, biases, strict=True)]
        assert rates[0] == pytest.approx(rates[1])
        found.append(rates[0])
        after()
    return found


def lr(loop: Loop) -> float:
    return float(loop.optimizer.param_groups[0]["lr"])


# --- one optimiser, one tuner -------------------------------------------------------------------------------


def test_a_second_tuner_takes_the_place_of_the_first():
    loop = loop_of(lr_space()).attach()
    first = loop.tuner
    assert used(loop, 2) == pytest.approx([0.05] * 2)
    loop.space = lr_space(0.03)
    with pytest.warns(UserWarning, match=r"another tuner .* detached"):
        loop.attach()
    assert used(loop, 3) == pytest.approx([0.03] * 3)
    assert lr(loop) == 0.1
    first.detach()
    assert used(loop, 1) == pytest.approx([0.03])
    loop.tuner.detach()
    assert lr(loop) == pytest.approx(0.03)


def test_it_does_so_under_a_scheduler():
    loop = loop_of(lr_space())
    scheduler = StepLR(loop.optimizer, 2, 0.5)
    loop.attach()
    used(loop, 3, scheduler.step)
    with pytest.warns(UserWarning, match="another tuner"):
        loop.attach()
    assert used(loop, 3, scheduler.step) == pytest.approx([0.025, 0.0125, 0.0125])


def test_a_replay_takes_the_place_of_a_tuner():
    loop = loop_of(lr_space()).attach()
    with pytest.warns(UserWarning, match="another tuner"):
        replay = mf.Replay(loop.tuner.trajectory, loop.space, loop.optimizer, total_steps=5)
    assert used(loop, 2) == pytest.approx([0.05] * 2)
    replay.detach()
    replay.detach()
    assert used(loop, 1) == pytest.approx([0.05])


def test_a_refused_tuner_leaves_the_first_at_work():
    loop = loop_of(lr_space()).attach()
    with pytest.raises(mf.errors.BindingError):
        loop.attach(bind=["nothing"])
    assert used(loop, 2) == pytest.approx([0.05] * 2)
    assert lr(loop) == 0.1


def test_a_tuner_and_its_optimiser_are_not_kept_alive():
    loop = loop_of(lr_space()).attach().run(2)
    gone = [weakref.ref(loop.tuner), weakref.ref(loop.optimizer)]
    del loop
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("kind", ["steps", "lambda"])
def test_a_tuner_after_another_keeps_the_factor_of_the_schedule(kind):
    loop = loop_of(lr_space())
    make = {
        "steps": lambda o: StepLR(o, 2, 0.5),
        "lambda": lambda o: LambdaLR(o, lambda n: 0.5 ** (n // 2)),
    }[kind]
    scheduler = make(loop.optimizer)
    loop.attach()
    assert used(loop, 3, scheduler.step) == pytest.approx([0.05, 0.05, 0.025])
    loop.tuner.detach()
    assert lr(loop) == pytest.approx(0.025)
    loop.attach()
    assert used(loop, 3, scheduler.step) == pytest.approx([0.025, 0.0125, 0.0125])


def test_a_tuner_that_ended_is_resumed_at_the_factor_of_the_schedule():
    loop = loop_of(lr_space())
    scheduler = StepLR(loop.optimizer, 2, 0.5)
    loop.attach()
    used(loop, 3, scheduler.step)
    loop.tuner.detach()
    states = [x.state_dict() for x in (loop.optimizer, scheduler, loop.tuner)]
    other = loop_of(lr_space())
    scheduler = StepLR(other.optimizer, 2, 0.5)
    other.attach()
    for x, state in zip((other.optimizer, scheduler, other.tuner), states, strict=True):
        x.load_state_dict(state)
    assert used(other, 3, scheduler.step) == pytest.approx([0.025, 0.0125, 0.0125])


def test_checking_an_optimiser_changes_nothing_of_it():
    loop = loop_of(lr_space()).attach().run(2)
    loop.tuner.detach()
    x, y = loop.train[0]
    mf.check(loop.model, loop.optimizer, loop.space, loss_fn, (x, y), (x, y))
    assert lr(loop) == pytest.approx(0.05)


# --- factors ------------------------------------------------------------------------------------------------


def test_groups_may_share_one_tensor():
    loop = loop_of(lr_space(), lr=torch.tensor(0.1)).attach()
    assert used(loop, 3) == pytest.approx([0.05] * 3)
    assert lr(loop) == pytest.approx(0.1)
    loop.tuner.detach()
    assert lr(loop) == pytest.approx(0.05)


def test_groups_that_share_one_tensor_cannot_be_tuned_apart():
    loop = loop_of(lr_space(shape=(2,)), lr=torch.tensor(0.1))
    with pytest.raises(mf.errors.BindingError, match="share one tensor"):
        loop.attach()


@pytest.mark.parametrize("kind", ["one cycle", "steps"])
def test_what_a_scheduler_that_is_over_left_behind_does_not_count(kind):
    loop = loop_of(lr_space(0.01))
    make = {
        "one cycle": lambda o: OneCycleLR(o, 1.0, total_steps=10, cycle_momentum=False),
        "steps": lambda o: StepLR(o, 2, 0.5),
    }[kind]
    scheduler = make(loop.optimizer)
    used(loop, 4, scheduler.step)
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.01
    loop.attach()
    assert used(loop, 3) == pytest.approx([0.01] * 3)


def test_where_that_cannot_be_told_a_sentence_says_what_counts():
    loop = loop_of(lr_space(0.02))
    scheduler = StepLR(loop.optimizer, 2, 0.5)
    used(loop, 4, scheduler.step)
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.01
    with pytest.warns(UserWarning, match=r"lr of a param_group is 0.01.* 0.1 .*delete initial_lr") as said:
        loop.attach()
    assert len(said) == 1
    assert said[0].filename.endswith("loops.py")
    assert used(loop, 1) == pytest.approx([0.002])
    loop.tuner.detach()
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.01
        del group["initial_lr"]
    loop.attach()
    assert used(loop, 1) == pytest.approx([0.02])


def test_a_scheduler_made_before_the_first_step_counts_from_its_warm_up():
    loop = loop_of(lr_space(0.05))
    scheduler = LambdaLR(loop.optimizer, lambda n: min(1.0, (n + 1) / 2))
    assert lr(loop) == 0.05
    loop.attach()
    assert used(loop, 3, scheduler.step) == pytest.approx([0.025, 0.05, 0.05])


@pytest.mark.parametrize("before", [True, False])
def test_a_scheduler_may_step_in_a_hook(before):
    loop = loop_of(lr_space())
    scheduler = StepLR(loop.optimizer, 1, 0.5)
    if before:
        loop.optimizer.register_step_post_hook(lambda *_: scheduler.step())
    loop.attach()
    if not before:
        loop.optimizer.register_step_post_hook(lambda *_: scheduler.step())
    assert used(loop, 3) == pytest.approx([0.05, 0.025, 0.0125])


def test_a_tuner_detached_in_its_callback_leaves_the_hooks_of_the_user():
    loop = loop_of(lr_space())
    scheduler = StepLR(loop.optimizer, 1, 0.5)
    loop.optimizer.register_step_post_hook(lambda *_: scheduler.step())
    loop.attach(on_hyperstep=lambda *_: loop.tuner.detach())
    assert used(loop, 3) == pytest.approx([0.05, 0.025, 0.0125])


def test_the_factor_of_a_learning_rate_that_was_0_is_not_known():
    loop = loop_of(lr_space(), lr=0.0).attach()
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.1
    before = loop.model[0].bias.detach().clone()
    with pytest.raises(mf.errors.BindingError, match=r"lr of every param_group was 0 .* 0\.1 now"):
        loop.run(1)
    assert torch.equal(loop.model[0].bias, before)
    loop.tuner.detach()


def test_a_weight_decay_of_0_takes_the_tuned_value_before_and_after_it_is_resumed():
    space = mf.Space(weight_decay=mf.Float(1e-4, 1, log=True, init=0.1))
    loop = loop_of(space).attach().run(2)
    assert loop.tuner.log()["option/weight_decay"] == pytest.approx(0.1)
    loop.tuner.detach()
    assert loop.tuner.log()["option/weight_decay"] == pytest.approx(0.1)
    states = [x.state_dict() for x in (loop.optimizer, loop.tuner)]
    other = loop_of(space).attach()
    for x, state in zip((other.optimizer, other.tuner), states, strict=True):
        x.load_state_dict(state)
    other.run(1)
    assert other.optimizer.param_groups[0]["weight_decay"] == 0
    assert other.tuner.log()["option/weight_decay"] == pytest.approx(0.1)


def test_both_betas_follow_a_cycle_of_beta1():
    """As beta1 alone does."""

    def read(space: mf.Space) -> list[Any]:
        loop = loop_of(space, torch.optim.Adam)
        scheduler = OneCycleLR(loop.optimizer, 0.1, total_steps=10)
        seen: list[Any] = []
        inner = loop.optimizer._init_group

        def spy(group: Any, *args: Any) -> Any:
            seen.append(group["betas"])
            return inner(group, *args)

        loop.optimizer._init_group = spy
        loop.attach()
        for _ in range(5):
            loop.run(1)
            scheduler.step()
        return seen[::2]

    pair = read(mf.Space(betas=mf.Float(0.5, 0.9999, logit=True, shape=(2,), init=[0.8, 0.99])))
    alone = read(mf.Space(beta1=mf.Float(0.5, 0.9999, logit=True, init=0.8)))
    assert [b1 for b1, _ in pair] == pytest.approx([b1 for b1, _ in alone])
    assert len({b1 for b1, _ in pair}) > 3
    assert [b2 for _, b2 in pair] == pytest.approx([0.99] * 5)


def test_two_hyperparameters_cannot_be_the_same_option():
    space = mf.Space(a=mf.Float(0, 1, init=0.1), b=mf.Float(0, 1, init=0.2))
    with pytest.raises(mf.errors.BindingError, match="once"):
        loop_of(space).attach(bind={"a": "lr", "b": "lr"})


# --- groups that are added ----------------------------------------------------------------------------------


def more(loop: Loop, **options: Any) -> nn.Parameter:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    loop.optimizer.add_param_group({"params": [p], **options})
    return p


def test_a_group_without_an_entry_is_refused_in_a_sentence():
    space = mf.Space(weight_decay=mf.Float(1e-4, 1, log=True, shape=(2,), init=[0.1, 0.2]))
    loop = loop_of(space, weight_decay=0.5).attach().run(2)
    more(loop)
    with pytest.raises(mf.errors.BindingError, match="none for a group that was added"):
        loop.run(1)
    loop.optimizer.param_groups[2]["weight_decay"] = 0.0
    loop.run(2)
    loop.tuner.detach()
    assert [g["weight_decay"] for g in loop.optimizer.param_groups] == pytest.approx([0.1, 0.2, 0.0])


def test_a_group_that_is_added_leaves_the_entries_of_the_others():
    space = mf.Space(weight_decay=mf.Float(1e-4, 1, log=True, shape=(2,), init=[0.1, 0.2]))
    loop = loop_of(space)
    loop.optimizer.param_groups[1]["weight_decay"] = 0.5  # the first has none, and an entry all the same
    loop.attach()
    loop.run(1)
    more(loop, weight_decay=0.0)
    loop.run(1)
    loop.tuner.detach()
    assert [g["weight_decay"] for g in loop.optimizer.param_groups] == pytest.approx([0.0, 0.2, 0.0])


def test_a_larger_learning_rate_of_a_group_that_is_added_leaves_the_others():
    loop = loop_of(lr_space()).attach()
    used(loop, 1)
    more(loop, lr=1.0)
    assert used(loop, 2) == pytest.approx([0.05] * 2)
    loop.tuner.detach()
    assert [g["lr"] for g in loop.optimizer.param_groups] == pytest.approx([0.05, 0.05, 0.5])


def test_a_group_added_to_the_first_of_two_optimisers_leaves_the_second():
    loop = loop_of(lr_space(shape=(2,), init=[0.05, 0.02]))
    loop.optimizer = [
        torch.optim.SGD(loop.model[0].parameters(), lr=0.1),
        torch.optim.SGD(loop.model[2].parameters(), lr=0.01),
    ]
    loop.attach().run(1)
    loop.optimizer[0].add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.0})
    loop.run(1)
    loop.tuner.detach()
    assert [g["lr"] for o in loop.optimizer for g in o.param_groups] == pytest.approx([0.05, 0, 0.02])


# --- names that are options by accident ---------------------------------------------------------------------


def adversarial(space: mf.Space) -> Callable[[nn.Module, Any], Tensor]:
    """FGSM, with eps of the space."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        seen = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(seen), y), seen)
        return F.cross_entropy(model(x + space["eps"] * g.sign()), y)

    return loss


def decaying(space: mf.Space) -> Callable[[nn.Module, Any], Tensor]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        l2 = sum(p.square().sum() for p in model.parameters())
        return loss_fn(model, batch) + space["weight_decay"] * l2

    return loss


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("name", "make"), [("eps", adversarial), ("weight_decay", decaying)])
def test_an_option_that_the_loss_reads_must_be_named(name, make, noisy):
    def build(**arguments: Any) -> Loop:
        extra = {"noise": mf.Float(0, 1, init=0.3)} if noisy else {}
        space = mf.Space({name: mf.Float(1e-8, 1, log=True, init=0.01), **extra})
        loop = loop_of(space, torch.optim.Adam, make(space))
        if noisy:
            loop.model[1] = mf.nn.GaussianNoise(space["noise"])
        return loop.attach(**arguments)

    with pytest.raises(mf.errors.BindingError, match=rf"{name} is an option .* read by the loss; pass bind="):
        build().run(2)
    build(bind=[name]).run(2)
    apart = build(bind=()).run(2)
    assert apart.optimizer.param_groups[0][name] == {"eps": 1e-8, "weight_decay": 0}[name]


def test_the_first_hyper_step_is_the_same_whether_an_option_was_named():
    """To see what the loss reads takes no batch and no random number from the hyper-steps."""

    def given(bind: Any) -> list[Any]:
        decay = mf.Float(1e-3, 1, log=True, init=0.05)
        space = mf.Space(weight_decay=decay, noise=mf.Float(0, 1, init=0.3))
        loop = loop_of(space, torch.optim.Adam, noisy_loss(space))
        loop.model.insert(1, nn.Dropout(0.3))
        loop.model.insert(1, mf.nn.GaussianNoise(space["noise"]))
        loop.train, loop.valid = [data(12, n) for n in range(3)], [data(20, 7)]
        loop.valid_loss_fn = lambda model, batch: loss_fn(model, batch[:2])
        loop.attach(bind=bind, examples=4, horizon="run").run(4)
        return [[float(x) for x in row] for row in loop.tuner.hyper_optimizer.given]

    assert given(None) == given(["weight_decay"])


# --- wrappers -----------------------------------------------------------------------------------------------


class Lookahead:
    """Holds an optimiser and changes weights itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


class Container:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def wrapper_of(package: str) -> type:
    """A stand-in for the wrapper of a package."""

    def step(self: Any) -> None:
        self.optimizer.step()

    step.__module__ = f"{package}.optimizer"
    return type("Wrapper", (Container,), {"step": step})


@pytest.mark.parametrize("wrap", [Lookahead, Container, wrapper_of("fastest"), wrapper_of("accelerate2")])
def test_a_wrapper_that_may_step_in_its_own_way_is_refused(wrap):
    loop = loop_of(lr_space())
    loop.optimizer = wrap(loop.optimizer)
    with pytest.raises(mf.errors.UnsupportedOptimizer, match="pass the torch optimiser that it holds"):
        loop.attach()


def test_a_subclass_of_a_known_wrapper_with_its_own_step_is_refused():
    known = wrapper_of("accelerate")
    mine = type("Mine", (known,), {"step": Lookahead.step})
    loop = loop_of(lr_space())
    held = loop.optimizer
    loop.optimizer = mine(held)
    with pytest.raises(mf.errors.UnsupportedOptimizer, match="Mine"):
        loop.attach()
    loop.optimizer = type("Same", (known,), {})(held)
    loop.attach()


@pytest.mark.parametrize("package", ["accelerate", "lightning", "lightning_fabric", "pytorch_lightning"])
def test_known_wrappers_are_seen_through(package):
    loop = loop_of(lr_space())
    held = loop.optimizer
    loop.optimizer = wrapper_of(package)(held)
    loop.attach()
    loop.optimizer = held
    assert used(loop, 2) == pytest.approx([0.05] * 2)


# --- what an option is written as ---------------------------------------------------------------------------


@pytest.mark.parametrize("init", [1e-3, 3e-2, 0.1])
def test_an_option_that_has_not_moved_is_what_the_user_wrote_to_the_last_digit(init):
    loop = loop_of(mf.Space(lr=mf.Float(1e-4, 1, log=True, init=init), dtype=torch.float32))
    seen = []
    loop.attach()
    loop.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    loop.run(1)
    assert seen == [init]
    assert float(loop.space["lr"]) == init
    loop.space.set(lr=0.07)
    assert loop.space.as_dict() == {"lr": 0.07}
    loop.space["lr"].raw.add_(0.1)
    assert 0.07 < float(loop.space["lr"]) < 0.5


@pytest.mark.parametrize("betas", [(0.9, 0.99), [0.9, 0.99], (torch.tensor(0.9), torch.tensor(0.99))])
def test_betas_stay_of_the_type_that_the_user_gave(betas):
    loop = loop_of(mf.Space(beta1=mf.Float(0.5, 0.99, init=0.8)), torch.optim.Adam)
    loop.optimizer.param_groups[0]["betas"] = betas
    seen = []
    loop.attach()
    loop.optimizer.register_step_pre_hook(lambda o, *_: seen.append(float(o.param_groups[0]["betas"][0])))
    loop.run(1)  # later, the tuner's hook is the last
    assert seen[-1] == pytest.approx(0.8)
    now = loop.optimizer.param_groups[0]["betas"]
    assert type(now) is type(betas)
    assert [type(b) for b in now] == [type(b) for b in betas]
    assert [float(b) for b in now] == pytest.approx([0.9, 0.99])


@pytest.mark.parametrize("before", [True, False])
def test_the_momentum_of_one_cycle_counts_from_its_maximum_in_either_order(before):
    loop = loop_of(mf.Space(momentum=mf.Float(0.1, 0.99, init=0.8)), torch.optim.SGD, momentum=0.9)
    loop = loop if before else loop.attach()
    torch.optim.lr_scheduler.OneCycleLR(loop.optimizer, max_lr=0.1, total_steps=20, max_momentum=0.95)
    loop = loop.attach() if before else loop
    seen = []
    loop.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["momentum"]))
    loop.run(1)  # later, the tuner's hook is the last
    assert seen[-1] == pytest.approx(0.8)


# --- what a learning rate and other options may be ---------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "range_", "must"),
    [
        ("lr", (-1.0, 1.0), "[0, inf]"),
        ("momentum", (0.1, 1.2), "[0, 1]"),
        ("weight_decay", (-0.1, 0.1), "[0, inf]"),
    ],
)
def test_a_range_that_the_option_cannot_have_is_refused(option: str, range_: Any, must: str) -> None:
    with pytest.raises(mf.errors.BindingError, match=f"the range of {option} must lie in") as error:
        loop_of(mf.Space({option: mf.Float(*range_)}), momentum=0.5).attach()
    assert must in str(error.value)


def test_betas_and_negative_options_have_ranges_of_their_own() -> None:
    with pytest.raises(mf.errors.BindingError, match=r"must lie in \[0, 1\], as betas must"):
        loop_of(mf.Space(betas=mf.Float(0.5, 1.5, shape=(2,))), torch.optim.Adam).attach()
    with pytest.raises(mf.errors.BindingError, match=r"must lie in \[-inf, 0\]"):
        loop_of(mf.Space(beta2_decay=mf.Float(0.1, 0.9)), torch.optim.Adafactor).attach()
    loop_of(mf.Space(beta2_decay=mf.Float(-0.95, -0.1, init=-0.8)), torch.optim.Adafactor).attach()


def test_a_learning_rate_whose_range_leaves_out_the_optimisers_own_is_told_to_widen_it() -> None:
    with pytest.warns(UserWarning, match="widen the range to contain 0.1"):
        loop_of(mf.Space(lr=mf.Float(1e-5, 1e-2, log=True))).attach()


def test_a_learning_rate_without_init_far_from_the_optimisers_own_is_told() -> None:
    with pytest.warns(UserWarning, match=r"lr starts at 0.00316, .* 0.1 of the optimiser; pass init=0.1"):
        loop_of(lr_space(init=None)).attach()


def test_a_learning_rate_without_init_near_the_optimisers_own_is_not_told() -> None:
    loop_of(mf.Space(lr=mf.Float(1e-3, 10.0, log=True))).attach()  # warnings are errors here


@pytest.mark.parametrize("bind", [["lr"], []], ids=["lr is tuned", "lr is not tuned"])
@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (lambda o: LambdaLR(o, lambda n: [0.1, 0.5, 1.0, 0.5, 0.0][n]), [0.1, 0.5, 1.0, 0.5]),
        (lambda o: OneCycleLR(o, 0.5, total_steps=5), [0.04, 0.95, 0.61, 0.19]),
        (lambda o: None, [1.0, 1.0, 1.0, 1.0]),
    ],
    ids=["LambdaLR", "OneCycleLR", "none"],
)
def test_the_factor_of_a_schedule_is_known(schedule, factors, bind):
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.5, momentum=0.9)
    scheduler = schedule(optimizer)
    space = mf.Space(lr=mf.Float(1e-4, 1.0, log=True, init=0.01), momentum=mf.Float(0.1, 0.99))
    binding, found = Binding([optimizer], space, [*bind, "momentum"]), []
    for _ in factors:
        found.append(binding.schedule_factor())
        optimizer.step()
        if scheduler:
            scheduler.step()
    assert found == pytest.approx(factors, abs=0.01)


@pytest.mark.parametrize("bind", [["lr"], ["momentum"]])
def test_a_group_that_stands_still_does_not_hide_a_warm_up(bind):
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": lr} for lr in (0.5, 0.0)]
    optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    LambdaLR(optimizer, lambda n: 0.1)
    space = mf.Space(lr=mf.Float(1e-4, 1.0, log=True, init=0.01), momentum=mf.Float(0.1, 0.99))
    assert Binding([optimizer], space, bind).schedule_factor() == pytest.approx(0.1)
