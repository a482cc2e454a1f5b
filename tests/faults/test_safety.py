"""Whatever goes wrong at a hyper-step, the loop goes on as if the tuner had not been there."""

import os
import random
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from interrupts import (
    Twin,
    after_seconds,
    alarms_stop,
    at_line,
    counted_lines,
    lines_of_a_step,
    prepared,
    press_control_c,
    ring_alarm,
    stopped_step,
    traces_left,
)
from loops import Loop, Still, noisy_loop
from torch import Tensor, nn
from worlds import World, differences, hooks_of_the_tuner

import midflight as mf
from midflight.tuner.live import preserved

ESTIMATORS = ["one_step", "one_step_cheap", "central_difference", "unrolled", "t1t2"]


class Broken(Exception):
    """A mistake in a user's function."""


def failing(which: str, at: int, how: Callable[[], Any]) -> Callable[[str, Any], Any]:
    """A wrapper of user functions: the one of this name fails at its at-th call."""

    def wrap(name: str, function: Any) -> Any:
        if name != which:
            return function
        calls = [0]

        def wrapped(*arguments: Any) -> Any:
            calls[0] += 1
            return how() if calls[0] == at else function(*arguments)

        return wrapped

    return wrap


def break_down() -> None:
    raise Broken


class BreakingLoader:
    """A loader whose batches end in an error."""

    def __init__(self, good: int) -> None:
        self.good = good

    def __iter__(self) -> Iterator[Any]:
        batches = World(False).batches
        for n in range(self.good):
            yield batches[n % 3]
        raise Broken


# --- a plain run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", ["run", "step"])
@pytest.mark.parametrize(
    "estimator", ["one_step", "one_step_cheap", "central_difference", "unrolled", "t1t2"]
)
def test_a_hyperstep_leaves_no_trace(estimator, horizon):
    world = World(True, horizon=horizon, estimator=estimator).run(4)
    assert world.tuner.log()["hypersteps"] == 4
    assert not differences(world.state(), Twin(4).moments["begun"])


def test_detaching_takes_every_hook_away():
    world = World(True).run(1)
    world.forward_and_backward()
    assert hooks_of_the_tuner(world)
    world.tuner.detach()
    assert not hooks_of_the_tuner(world)
    world.run(2)
    assert len(world.tuner.hyper_optimizer.given) == 1


@pytest.mark.parametrize("how", ["detach", "finish"])
def test_on_hyperstep_may_end_the_tuning(how):
    world = World(True, lambda name, f: (lambda *_: getattr(world.tuner, how)()) if name[:2] == "on" else f)
    world.run(3)
    assert len(world.tuner.hyper_optimizer.given) == 1
    # which do nothing any more
    assert hooks_of_the_tuner(world) == ["StepHooks._on_just_stepped", "StepHooks._on_stepped"]
    assert how == "finish" or not differences(world.state(), Twin(3).moments["begun"])


@pytest.mark.parametrize("horizon", ["run", "step"])
def test_finish_leaves_all_but_weights_and_buffers(horizon):
    world = World(True, horizon=horizon).run(3)
    before = world.state()
    world.tuner.finish()
    assert not hooks_of_the_tuner(world)
    assert not differences(before, world.state(), but=("weight", "buffer"))


def test_a_tuner_that_is_only_made_and_detached_changes_nothing():
    plain, world = World(False).state(), World(True)
    world.tuner.detach()
    assert not differences(plain, world.state())


# --- errors in the user's functions -------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 5, 6])
@pytest.mark.parametrize("horizon", ["run", "step"])
@pytest.mark.parametrize("which", ["loss_fn", "valid_loss_fn"])
def test_an_error_in_a_loss_leaves_the_loop_as_before_the_step(which, horizon, at):
    """... and an optimiser step without the tuner gives what it gives without the tuner."""
    world = World(True, failing(which, at, break_down), horizon=horizon)
    with pytest.raises(Broken):
        world.run(6)
    twin = Twin(world.taken)
    assert not differences(world.state(), twin.moments["before the step"])
    world.tuner.detach()
    world.optimizer.step()
    assert not differences(world.state(), twin.moments["after the step"])


def test_an_error_where_a_loss_is_only_tried_is_an_answer_and_no_error():
    """At its third call other weights are tried, to see whether the loss can be taken in forward mode."""
    world = World(True, failing("loss_fn", 3, break_down)).run(4)
    assert len(world.tuner.hyper_optimizer.given) == 4
    assert not differences(world.state(), Twin(4).moments["begun"])


@pytest.mark.parametrize("which", ["loss_fn", "valid_loss_fn"])
def test_the_step_can_be_tried_again_and_the_run_goes_on(which):
    world = World(True, failing(which, 5, break_down), horizon="step")
    for _ in range(6):
        world.forward_and_backward()
        try:
            world.optimizer.step()
        except Broken:
            world.optimizer.step()
        world.after_step()
    assert not differences(world.state(), Twin(6).moments["begun"])
    assert world.tuner.steps == 6
    assert len(world.tuner.hyper_optimizer.given) >= 5


def test_an_error_in_a_loader_leaves_the_loop_as_before_the_step():
    world = World(True, valid_loader=BreakingLoader(3), horizon="step")
    with pytest.raises(Broken):
        world.run(6)
    assert not differences(world.state(), Twin(world.taken).moments["before the step"])


def test_an_error_in_on_hyperstep_leaves_the_loop_as_after_the_step_and_the_next_hyperstep_comes():
    world = World(True, failing("on_hyperstep", 2, break_down))
    world.step()
    with pytest.raises(Broken):
        world.step()
    assert not differences(world.state(), Twin(1).moments["after the step"])
    world.after_step()
    world.run(2)
    assert len(world.tuner.hyper_optimizer.given) == 4
    assert world.tuner.log()["undecided"] == 0
    assert not differences(world.state(), Twin(4).moments["begun"])


def test_an_error_in_the_hyper_optimizer_leaves_the_loop_as_after_the_step():
    class Breaking(Still):
        def step(self, closure: Any = None) -> None:
            raise Broken

    world = World(True, hyper_optimizer=Breaking)
    world.forward_and_backward()
    with pytest.raises(Broken):
        world.optimizer.step()
    assert not differences(world.state(), Twin(0).moments["after the step"])


@pytest.mark.parametrize("at", [1, 4, 8])
def test_an_error_in_finish_leaves_the_loop_as_it_was(at):
    world = World(True).run(3)
    before, calls = world.state(), [0]
    valid_loss_fn = world.tuner._hyperstep.valid_loss

    def broken(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        return break_down() if calls[0] == at else valid_loss_fn(model, batch)

    world.tuner._hyperstep.valid_loss = broken
    with pytest.raises(Broken):
        world.tuner.finish()
    assert not differences(before, world.state())


def test_an_error_in_the_model_during_a_hyperstep_leaves_the_loop_as_before_the_step():
    world = World(True).run(2)
    world.forward_and_backward()
    before = world.state()

    def hook(*_: Any) -> None:
        raise Broken

    handle = world.model[8].register_forward_pre_hook(hook)
    with pytest.raises(Broken):
        world.optimizer.step()
    handle.remove()
    assert not differences(before, world.state())


@pytest.mark.parametrize(
    "error", [MemoryError, torch.OutOfMemoryError, SystemExit, GeneratorExit, KeyboardInterrupt]
)
def test_errors_of_every_kind_come_through(error):
    def fail() -> None:
        raise error("on purpose")

    world = World(True, failing("valid_loss_fn", 3, fail), horizon="step")
    with pytest.raises(error, match="on purpose"):
        world.run(6)
    assert not differences(world.state(), Twin(world.taken).moments["before the step"])


# --- what loss functions return -----------------------------------------------------------------------------


def returning(what: str) -> Callable[[nn.Module, Any], Any]:
    def my_loss(model: nn.Module, batch: Any) -> Any:
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        loss = losses.mean()
        return {
            "a float": lambda: float(loss.detach()),
            "one for each example": lambda: losses,
            "None": lambda: None,
            "a pair": lambda: (loss, losses),
            "a dict": lambda: {"loss": loss},
            "detached": loss.detach,
            "numpy": lambda: loss.detach().numpy(),
        }[what]()

    return my_loss


RETURNED = ["a float", "one for each example", "None", "a pair", "a dict", "detached", "numpy"]


@pytest.mark.parametrize("which", ["loss_fn", "valid_loss_fn"])
@pytest.mark.parametrize("what", RETURNED)
def test_a_loss_that_is_no_scalar_with_a_gradient_is_refused_by_name(what, which):
    loop = noisy_loop()
    plain = loop.loss_fn
    if which == "loss_fn":
        loop.loss_fn, loop.valid_loss_fn = returning(what), lambda model, batch: plain(model, batch)
        loop.step = lambda loop, batch: (plain(loop.model, batch).backward(), loop.optimizer.step())
    else:
        loop.valid_loss_fn = returning(what)
    with pytest.raises(mf.errors.InvalidLoss, match=r"my_loss must return"):
        loop.attach().run(2)


@pytest.mark.parametrize("which", ["loss_fn", "valid_loss_fn"])
def test_a_loss_under_no_grad_is_refused_by_name(which):
    loop = noisy_loop()
    plain = loop.loss_fn

    @torch.no_grad()
    def my_loss(model: nn.Module, batch: Any) -> Tensor:
        return plain(model, batch)

    if which == "loss_fn":
        loop.loss_fn, loop.valid_loss_fn = my_loss, lambda model, batch: plain(model, batch)
        loop.step = lambda loop, batch: (plain(loop.model, batch).backward(), loop.optimizer.step())
    else:
        loop.valid_loss_fn = my_loss
    with pytest.raises(mf.errors.InvalidLoss, match=r"my_loss must return .* gradient"):
        loop.attach().run(2)


def test_a_loss_of_shape_one_is_taken_as_a_number():
    loop = noisy_loop()
    plain = loop.loss_fn
    loop.valid_loss_fn = lambda model, batch: plain(model, batch).reshape(1)
    assert loop.attach().run(2).hypergradients()


# --- interrupts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines():
    return {horizon: lines_of_a_step(2, horizon=horizon) for horizon in ("run", "step")}


@pytest.mark.parametrize("part", [0.2, pytest.param(4.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("horizon", ["run", "step"])
@pytest.mark.parametrize("do", [press_control_c, ring_alarm])
def test_a_signal_at_any_line_of_the_step_leaves_no_trace(do, horizon, part, lines):
    """At evenly spread lines, and at many of those where a hyper-step begins and ends."""
    count = lines[horizon]
    chosen = random.Random(do is ring_alarm)  # each signal at other lines
    places = [chosen.randrange(1, count + 1) for _ in range(int(20 * part))]
    places += [chosen.randrange(1, 400) for _ in range(int(10 * part))]
    places += [chosen.randrange(count - 1500, count) for _ in range(int(20 * part))]
    with alarms_stop():
        twin = Twin(2)
        for n in places:
            with torch.enable_grad():  # a stop within torch's own update leaves gradients off
                world = prepared(2, horizon=horizon)
                error = stopped_step(world, at_line(n, do))
                assert not traces_left(world, error, twin), f"at line {n}"


@pytest.mark.parametrize("how", ["alarm", "control-c"])
def test_a_signal_at_any_time_leaves_no_trace(how):
    chosen = random.Random(1)
    stopped = 0
    with alarms_stop():
        twin = Twin(2)
        for _ in range(15):
            with torch.enable_grad():  # as above
                world = prepared(2, horizon="run")
                error = stopped_step(world, after_seconds(chosen.uniform(0, 0.03), how))
                stopped += error is not None
                assert not traces_left(world, error, twin)
    assert stopped


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_signal_while_options_are_written_and_taken_out_leaves_the_users_own(as_tensor):
    """At each line of it; afterwards, saved options are those that the loop gave."""

    def prepared_with_other_values() -> World:
        world = prepared(1, schedule=10)
        world.space.set(lr=0.03, weight_decay=0.5)
        if as_tensor:
            world.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        return world

    def options(world: World) -> tuple[float, float]:
        group = world.optimizer.state_dict()["param_groups"][0]
        return float(group["lr"]), group["weight_decay"]

    world = prepared_with_other_values()
    own = options(world)
    with counted_lines("binding.py") as count:
        world.optimizer.step()
    for n in range(1, count[0] + 1):
        world = prepared_with_other_values()
        assert stopped_step(world, at_line(n, press_control_c, "binding.py"))
        assert options(world) == own, f"at line {n}"


def test_a_run_goes_on_after_an_interrupt(lines):
    chosen = random.Random(2)
    for n in [chosen.randrange(1, lines["run"]) for _ in range(10)]:
        world = prepared(1)
        stopped_step(world, at_line(n, press_control_c))
        world.scheduler.step()
        world.run(1)  # stopped within torch's own update, the step after it has no look
        before = len(world.tuner.hyper_optimizer.given)
        world.run(2)
        assert len(world.tuner.hyper_optimizer.given) == before + 2


def test_a_signal_in_finish_leaves_the_last_weights_or_the_best_ones_and_no_mixture():
    def ended() -> World:
        world = World(True).run(6)
        with torch.no_grad():
            for p in world.model.parameters():
                p.mul_(5)  # so that the average is better
        return world

    assert next(iter(ended().tuner.finish())) == "average"
    world = ended()
    before = world.state()
    with counted_lines() as lines:
        world.tuner.finish()
    after, count = world.state(), lines[0]
    moved = [name for name in before if name.startswith("weight") and before[name] != after[name]]
    assert len(moved) > 4
    chosen = random.Random(3)
    places = [chosen.randrange(1, count) for _ in range(5)] + list(range(count - 60, count + 1, 6))
    for n in places:
        world = ended()
        with pytest.raises(KeyboardInterrupt), at_line(n, press_control_c):
            world.tuner.finish()
        now = world.state()
        assert [now[name] == after[name] for name in moved].count(True) in (0, len(moved)), f"at line {n}"
        assert not differences(before, now, but=("weight", "buffer"))


def test_a_signal_waits_for_the_hyperstep_and_then_comes():
    world = prepared(1)
    with pytest.raises(KeyboardInterrupt), at_line(2000, press_control_c):
        world.optimizer.step()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not differences(world.state(), Twin(1).moments["before the step"])


def test_every_signal_that_came_is_handled_afterwards():
    """Two of them: one says that the machine is wanted back, the other stops the program."""
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("wanted back"))
    try:
        for first, second in [(signal.SIGUSR1, signal.SIGINT), (signal.SIGINT, signal.SIGUSR1)]:
            world = prepared(1)

            def both(first: signal.Signals = first, second: signal.Signals = second) -> None:
                signal.raise_signal(first)
                signal.raise_signal(second)

            with pytest.raises(KeyboardInterrupt), at_line(2000, both):
                world.optimizer.step()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == ["wanted back"] * 2


def test_a_third_control_c_does_not_wait_for_a_function_that_hangs():
    def hang() -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10**7):
            pass
        raise AssertionError("still there")

    world = World(True, failing("valid_loss_fn", 3, hang), horizon="step")
    with pytest.raises(KeyboardInterrupt):
        world.run(4)
    assert not differences(world.state(), Twin(world.taken).moments["before the step"])


def test_a_tuner_works_in_another_thread():
    """Only the main thread may set handlers of signals."""
    found: list[Any] = []

    def train() -> None:
        world = World(True).run(3)
        found.append(world.tuner.finish())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert set(found[0]) == {"last", "average", "earlier"}


# --- the length of the run ----------------------------------------------------------------------------------


def test_a_run_that_is_longer_than_it_was_said_to_be_warns_once():
    """Ten times as long, say."""
    loop = noisy_loop().attach(total_steps=5)
    with pytest.warns(UserWarning, match="longer than total_steps=5 optimiser steps") as said:
        loop.run(50)
    assert [str(w.message).startswith("the run is longer") for w in said].count(True) == 1


def test_with_accumulation_the_length_of_the_run_counts_steps_of_the_optimiser():
    def accumulate(loop: Loop, batch: Any) -> None:
        loop.optimizer.zero_grad()
        for _ in range(4):
            (loop.loss_fn(loop.model, batch) / 4).backward()
        loop.optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop = noisy_loop(step=accumulate).attach(total_steps=10, hyper_optimizer=mf.SignSteps).run(10)
    assert loop.tuner.log()["hypersteps"] == 10
    assert not loop.tuner.report()


@pytest.mark.parametrize(("taken", "total"), [(20, 5), (3, 20)])
def test_a_wrong_length_of_the_run_is_in_the_report(taken, total):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = noisy_loop().attach(total_steps=total).run(taken)
    assert any(f"{taken} optimiser steps, but total_steps={total}" in line for line in loop.tuner.report())


def test_a_run_of_the_right_length_has_no_such_report():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop = noisy_loop().attach(total_steps=10).run(10)
    assert not loop.tuner.report()


# --- wrong twins: what the comparison with the loop without a tuner must reject -----------------------------


@contextmanager
def left_as_it_is(*_: Any) -> Iterator[None]:
    yield


@contextmanager
def weights_left(params: dict[str, Tensor], at: dict[str, Tensor]) -> Iterator[None]:
    for name, value in at.items():
        params[name].data = value
    yield


TWINS = {
    "the model stays changed": ("midflight.tuner.live.preserved", left_as_it_is, "step"),
    "the user's random numbers are drawn": (
        "midflight.tuner.randomness.Randomness.borrowed", left_as_it_is, "step"
    ),
    "the weights stay where v was taken": ("midflight.tuner.hyperstep.weights_at", weights_left, "step"),
    "options stay as tuned": ("midflight.tuner.binding.Binding.restore", lambda self: None, "step"),
    "the cache of autocast stays off": (
        "midflight.tuner.live.torch.set_autocast_cache_enabled",
        lambda flag, real=torch.set_autocast_cache_enabled: real(False), "step",
    ),
}  # fmt: skip
"""What a hyper-step does wrong -> (what is replaced, by what, horizon)."""


@pytest.mark.parametrize("twin", TWINS)
def test_a_hyperstep_that_leaves_a_trace_is_found_out(twin, monkeypatch):
    name, wrong, horizon = TWINS[twin]
    untouched = Twin(4).moments["begun"]
    monkeypatch.setattr(name, wrong)
    try:
        world = World(True, horizon=horizon).run(4)
        assert differences(world.state(), untouched)
    finally:
        monkeypatch.undo()
        torch.set_autocast_cache_enabled(True)


class MomentumEncoder(nn.Module):
    """Keeps more than weights and buffers: each training pass writes to all of it."""

    def __init__(self, level: mf.Hyperparameter) -> None:
        super().__init__()
        self.level = level
        self.words = nn.Embedding(10, 5, max_norm=1.0)
        self.head = nn.Linear(5, 3)
        self.key = nn.Linear(5, 3).requires_grad_(False)
        self.queue = deque(maxlen=3)
        self.history: list[Tensor] = []
        self.counts: dict[str, int] = {}
        self.tables = {"sum": torch.zeros(3)}
        self.mean = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x).mean(1)
        out = self.head(h + self.level * torch.ones(5))
        with torch.no_grad():
            for mine, theirs in zip(self.key.parameters(), self.head.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
            target = self.key(h)
            self.mean.lerp_(target.mean(0), 0.5)
            self.tables["sum"].add_(target.sum(0))
            self.queue.append(target.mean())
            self.history.append(target.sum())
            self.counts["passes"] = self.counts.get("passes", 0) + 1
            past = sum(self.queue) + sum(self.history) + self.counts["passes"] + self.tables["sum"]
        return out + 0.01 * (target + self.mean + past)


def encoded(steps: int, tuned: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    space = mf.Space(level=mf.Float(0, 1, init=0.3))
    model = MomentumEncoder(space["level"])
    batches = [(torch.randint(10, (8, 4)), torch.randint(3, (8,))) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    if tuned:
        mf.Tuner(model, optimizer, space, loss_fn, batches, list(batches), schedule=1, hyper_optimizer=Still)
    for i in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batches[i % 3]).backward()
        optimizer.step()
    kept = {"queue": list(model.queue), "history": model.history, "mean": model.mean, "counts": model.counts}
    return {**model.state_dict(), **kept, "sum": model.tables["sum"]}


@pytest.mark.filterwarnings("ignore:1 weights, such as words.weight, were changed")  # by max_norm
@pytest.mark.filterwarnings("ignore:the validation loss itself reads level")
def test_whatever_a_forward_pass_writes_to_its_modules_is_put_back():
    torch.testing.assert_close(encoded(6, tuned=True), encoded(6, tuned=False), rtol=0, atol=0)


def test_a_frozen_weight_is_not_copied_at_a_hyper_step():
    """The base under adapters may be as large as memory allows."""
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2))
    frozen = model[0].weight.data_ptr()
    with preserved(model):
        assert model[0].weight.data_ptr() == frozen
