"""The guard: a run that diverges is noticed and goes on from its best average."""

import copy
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf
from midflight._tensors import write
from midflight.tuner import movement
from midflight.tuner.guard import MOST_IN_VAIN, Guard

torch.manual_seed(0)
RULE = torch.randn(12, 4)
X = torch.randn(400, 12)
Y = (X @ RULE + 0.3 * torch.randn(400, 4)).argmax(1)
TRAIN = [(X[i : i + 25], Y[i : i + 25]) for i in range(0, 200, 25)]
VALID = [(X[200:], Y[200:])]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Loop:
    """A training of a small network by SGD, with tuned options, on random weights of one seed."""

    def __init__(self, space, make=torch.optim.SGD, options=None, steps=600, tune=True, **tuning):
        torch.manual_seed(1)
        self.space = space
        self.model = nn.Sequential(
            nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
        )
        start = {name: float(space[name]) for name in space if name != "noise"}
        self.optimizer = make(self.model.parameters(), **{**start, **(options or {})})
        self.steps = steps
        self.tuner = None
        if tune:
            self.tuner = mf.Tuner(
                self.model, self.optimizer, space, loss_fn, TRAIN, VALID, total_steps=steps, **tuning
            )

    def run(self, steps=None, before_step=lambda n: None):
        for n in range(steps or self.steps):
            self.optimizer.zero_grad()
            loss_fn(self.model, TRAIN[n % len(TRAIN)]).backward()
            before_step(n)
            self.optimizer.step()
        return self

    def valid_loss(self):
        with torch.no_grad():
            return float(loss_fn(self.model, VALID[0]))

    def finite(self):
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())


def lr(init, low=1e-6, high=100.0):
    return mf.Space(lr=mf.Float(low, high, log=True, init=init))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=lambda m: m.__name__)
@pytest.mark.parametrize("start", [1e-3, 0.1, 30.0])
def test_a_learning_rate_from_any_start_ends_well_and_finite(make, start):
    loop = Loop(lr(start), make).run()
    assert loop.finite()
    loop.tuner.finish()
    assert loop.valid_loss() < 0.75  # chance is 1.39; the best fixed rates reach 0.35


def test_without_the_guard_the_same_start_is_lost():
    loop = Loop(lr(30.0), guard=False).run()
    assert not (loop.finite() and loop.valid_loss() < 1.0)
    assert "went on from" not in " ".join(loop.tuner.report())


def test_a_run_whose_first_steps_ruin_the_weights_begins_again_with_a_lower_rate():
    loop = Loop(lr(0.05), torch.optim.Adam)
    start = [p.detach().clone() for p in loop.model.parameters()]
    loop.run(17)  # weights are judged before step 17
    assert loop.tuner.log()["restored"] == 1
    assert float(loop.space["lr"]) < 0.03
    for p, then in zip(loop.model.parameters(), start, strict=True):
        torch.testing.assert_close(p.detach(), then, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fast", [False, True])
def test_a_rate_rises_unless_steps_are_fast(monkeypatch, fast):
    monkeypatch.setattr(movement, "FAST", 0.0 if fast else 1.0)
    monkeypatch.setattr(movement, "FAST_AT_FIRST", 0.0)
    monkeypatch.setattr(movement, "FURTHER", 1.0)
    loop = Loop(lr(1e-5), torch.optim.Adam, steps=400).run()
    assert float(loop.space["lr"]) == pytest.approx(1e-5 if fast else 4e-4, rel=0.3)


def test_a_rate_that_is_far_too_low_rises_faster(monkeypatch):
    def risen():
        return float(Loop(lr(1e-5), torch.optim.Adam, steps=400).run(80).space["lr"]) / 1e-5

    with_pace = risen()
    monkeypatch.setattr(movement, "FURTHER", 1.0)
    assert with_pace > 3 * risen()


def test_a_rate_does_not_rise_faster_because_the_loop_warms_up(monkeypatch):
    def risen():
        loop = Loop(lr(3e-2), torch.optim.Adam, steps=400)
        torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda n: 0.01)
        return float(loop.run(60).space["lr"])

    with_pace = risen()
    monkeypatch.setattr(movement, "FURTHER", 1.0)
    assert with_pace == pytest.approx(risen())


def test_a_rate_that_falls_does_not_fall_faster_where_steps_are_slow():
    guard = Loop(lr(1e-5), torch.optim.Adam).run(4).tuner._controller.guard
    guard._speed.pace = lambda *_: 4.0
    up, down = torch.tensor(-1.0), torch.tensor(1.0)
    assert guard.paced({"lr": up}, 4)[1] == {"lr": 4.0}
    assert guard.paced({"lr": down}, 4)[1] == {}


def test_a_lower_rate_is_on_trial_for_as_many_steps(monkeypatch):
    monkeypatch.setattr(movement, "MOVED", {16: 1e-6, 64: 1e6})
    monkeypatch.setattr(movement, "MOST_RESTARTS", 1)
    loop = Loop(lr(1e-3), torch.optim.Adam).run(32)
    assert loop.tuner._controller.guard._trial is not None
    loop.run(2)
    assert loop.tuner._controller.guard._trial is None


def test_a_divergence_is_logged_and_reported():
    loop = Loop(lr(30.0)).run()
    assert loop.tuner.log()["restored"] >= 1
    sentence = loop.tuner.report()[0]
    assert sentence.startswith("the run went back to earlier weights, because "), sentence
    assert re.search(r"at steps? \d+", sentence), sentence


def test_weights_that_become_nan_in_mid_run_come_back():
    loop = Loop(lr(0.05), steps=300)

    def spoil(n):
        if n == 150:
            with torch.no_grad():
                loop.model[2].weight.fill_(math.nan)

    loop.run(before_step=spoil)
    assert loop.finite()
    assert loop.tuner.log()["restored"] == 1
    assert loop.valid_loss() < 0.8


def test_a_run_that_trains_well_never_goes_back():
    loop = Loop(lr(0.001), steps=300).run()
    assert loop.tuner.log()["restored"] == 0
    assert loop.valid_loss() < Loop(lr(0.001), steps=300, tune=False).run().valid_loss()


def test_a_run_that_overfits_goes_back_and_its_last_weights_are_good():
    loop = Loop(lr(3e-3), torch.optim.Adam).run()
    assert loop.valid_loss() < 0.8 * Loop(lr(3e-3), torch.optim.Adam, tune=False).run().valid_loss()
    assert loop.tuner.log()["restored"] >= 1


def test_steps_that_a_scaler_skips_are_no_divergence():
    loop = Loop(lr(1e-3), torch.optim.Adam, {"fused": True})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for n in range(100):
        loop.optimizer.zero_grad()
        scaler.scale(8 * loss_fn(loop.model, TRAIN[n % len(TRAIN)])).backward()
        scaler.step(loop.optimizer)
        scaler.update()
    assert loop.tuner.steps < 100  # some were skipped
    assert loop.tuner.log()["restored"] == 0


def test_a_run_that_overfits_without_finish_ends_with_its_best_average():
    """Tuning moves nothing here, so the whole gain is the guard's."""
    s = mf.Space(lr=mf.Float(2.99e-3, 3.01e-3, log=True, init=3e-3))
    loop = Loop(s, torch.optim.Adam).run(590)
    before = loop.valid_loss()
    loop.run(9)
    assert loop.valid_loss() > 0.95 * before
    loop.run(1)
    assert loop.valid_loss() < 0.8 * before
    assert any("which replaced them" in sentence for sentence in loop.tuner.report())


def test_bad_validation_batches_are_no_divergence():
    bad = [*[(X[i : i + 25], Y[i : i + 25]) for i in range(200, 375, 25)], (X[375:] * math.nan, Y[375:])]
    loop = Loop(lr(0.05), tune=False)
    tuner = mf.Tuner(loop.model, loop.optimizer, loop.space, loss_fn, TRAIN, bad, total_steps=600)
    loop.run()
    assert tuner.log()["restored"] == 0
    assert tuner.log()["hypersteps"] > 15


@pytest.mark.parametrize("name", ["lr", "momentum"])
def test_a_range_a_thousand_times_wider_changes_nothing(name):
    ends = []
    for wide in (False, True):
        spaces = {
            "lr": mf.Float(*((1e-8, 100.0) if wide else (1e-5, 0.1)), log=True, init=0.01),
            "momentum": mf.Float(*((5e-4, 0.99999) if wide else (0.2, 0.99)), logit=True, init=0.8),
        }
        loop = Loop(
            mf.Space({name: spaces[name]}), options={"lr": 0.01} if name != "lr" else {}, steps=200
        ).run()
        ends.append(float(loop.space[name]))
    assert ends[0] == pytest.approx(ends[1], rel=0.02)


def test_a_resumed_run_is_guarded_as_before():
    def spoil(loop):
        def at(n):
            if n == 40:
                with torch.no_grad():
                    loop.model[0].weight.mul_(1e4)

        return at

    whole = Loop(lr(0.05), steps=200)
    whole.run(100)
    parts = whole.tuner, whole.model, whole.optimizer
    saved = copy.deepcopy([part.state_dict() for part in parts])
    whole.run(100, spoil(whole))
    again = Loop(lr(0.05), steps=200)
    again.model.load_state_dict(saved[1])
    again.optimizer.load_state_dict(saved[2])
    again.tuner.load_state_dict(saved[0])
    again.run(100, spoil(again))
    assert again.tuner.log()["restored"] == whole.tuner.log()["restored"] >= 1
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(
        again.tuner.state_dict()["guard"], whole.tuner.state_dict()["guard"], rtol=0, atol=0
    )


def noisy(valid_loss_fn=loss_fn):
    """A run that tunes only noise, with a guard."""
    torch.manual_seed(1)
    space = mf.Space(noise=mf.Float(0.0, 0.8, init=0.1))
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner = mf.Tuner(
        model,
        optimizer,
        space,
        loss_fn,
        TRAIN,
        VALID,
        valid_loss_fn=valid_loss_fn,
        total_steps=400,
        schedule=5,
    )
    return tuner, model, optimizer


def train(model, optimizer, steps):
    for n in range(steps):
        optimizer.zero_grad()
        loss_fn(model, TRAIN[n % len(TRAIN)]).backward()
        optimizer.step()


def test_bad_validation_batches_in_a_row_do_not_touch_the_weights():
    class Sometimes:
        bad = False

        def __call__(self, model, batch):
            return loss_fn(model, batch) * (math.nan if self.bad else 1.0)

    sometimes = Sometimes()
    tuner, model, optimizer = noisy(sometimes)
    train(model, optimizer, 100)
    sometimes.bad = True
    train(model, optimizer, 100)
    assert tuner.log()["skipped"] >= 15
    assert tuner.log()["restored"] == 0


def test_weights_that_become_nan_come_back_if_only_noise_is_tuned():
    tuner, model, optimizer = noisy()
    train(model, optimizer, 100)
    with torch.no_grad():
        model[1].weight.fill_(math.nan)
    train(model, optimizer, 100)
    assert tuner.log()["restored"] == 1
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def guarded(option="lr", value=0.1, loss=2.0):
    """A guard of one weight that has begun at this loss, with the average and an optimiser."""
    space = mf.Space({option: mf.default_range(option, init=value)})
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    horizon = mf.Averaged()
    guard = Guard(space, horizon, lambda: {"w": weight}, dict, [optimizer], {option: option})
    guard.begin(loss, {"w": torch.ones(3), "b": torch.ones(2), "c": torch.ones(2)})
    return guard, space, weight, optimizer


@pytest.mark.parametrize(
    ("loss", "at_average", "diverged"),
    [
        (1.0, 0.9, False),
        (1.0, 0.4, True),
        (math.inf, 0.9, True),
        (math.nan, 0.9, True),
        (math.nan, math.nan, False),
    ],
)
def test_a_loss_of_twice_that_at_the_average_is_a_divergence_but_a_bad_batch_is_none(
    loss, at_average, diverged
):
    assert guarded()[0].diverged(loss, at_average) == diverged


def test_an_early_loss_above_the_initial_one_is_a_divergence():
    guard, *_ = guarded(loss=2.0)
    assert [guard.diverged_early(loss) for loss in (1.5, 2.1, 2.3, math.inf, math.nan)] == [
        False, False, True, True, False,
    ]  # fmt: skip


def test_gradients_that_are_not_finite_or_mostly_zero_show_that_weights_are_lost():
    guard, *_ = guarded(loss=1.0)
    one, zero = torch.ones(2), torch.zeros(2)
    for loss, still in ((0.95, True), (0.5, False)):  # a loss that has fallen has other causes for zeros
        look = partial(float, loss)
        assert not guard.lost({"w": one, "b": zero, "c": one}, look)
        assert not guard.lost({"w": zero, "b": zero, "c": zero}, look)  # nothing is left to learn
        assert guard.lost({"w": one, "b": zero, "c": zero}, look) == still
        assert guard.lost({"w": one, "b": one * math.nan, "c": one}, look)
        assert guard.lost({"w": one, "b": one, "c": one * math.inf}, look)


def test_weights_too_large_for_half_precision_come_back_as_they_were():
    guard, _, weight, optimizer = guarded()
    with torch.no_grad():
        weight.fill_(2e5)
    guard._horizon.keep(0.0, {"w": weight}, {"cache": torch.zeros(2)})
    guard._horizon.keep(0.0, {"w": weight}, {"cache": torch.zeros(3)})  # a buffer that has grown
    weight.grad = torch.ones(3)
    optimizer.step()
    assert guard.restore()
    assert torch.equal(weight, torch.full((3,), 2e5))


def test_buffers_come_back_as_they_were_whatever_they_hold():
    """A causal mask holds -inf; half precision would round a table of positions."""
    torch.manual_seed(0)
    mask, table = torch.full((4, 4), -math.inf).triu(1), torch.rand(50)
    buffers = {"mask": mask.clone(), "table": table.clone()}
    weight = nn.Parameter(torch.eye(3))
    space = mf.Space(lr=mf.default_range("lr", init=1e-2))
    optimizer = torch.optim.SGD([weight], 0.1)
    guard = Guard(space, mf.Averaged(), lambda: {"w": weight}, lambda: buffers, [optimizer], {"lr": "lr"})
    guard.begin(2.0, {"w": torch.ones(3, 3)})
    for go_back in (guard.restore, guard.beginning.restore):
        buffers["table"].zero_()
        with torch.no_grad():
            weight.fill_(math.nan)
        assert go_back() in (True, None)
        assert torch.equal(weight, torch.eye(3))
        assert torch.equal(buffers["table"], table)
        assert torch.equal(buffers["mask"], mask)


def test_a_buffer_expanded_from_fewer_entries_is_left_as_it_is():
    into, other = torch.zeros(1).expand(4), torch.zeros(5)
    write(torch.ones(4), into)
    write(torch.ones(4), other)
    assert not into.any()
    assert not other.any()
    write(torch.ones(5), other)
    assert other.all()


def test_the_guard_leaves_a_run_alone_that_it_cannot_help():
    guard, _, weight, _ = guarded()
    assert [guard.restore() for _ in range(MOST_IN_VAIN + 1)] == [True] * MOST_IN_VAIN + [False]
    with torch.no_grad():
        weight.fill_(math.nan)
    assert guard.restore()


def test_a_lower_rate_that_learns_much_less_is_given_back():
    """Small initial weights move by many times their size in a good run, as those of LoRA do."""
    for loss, back in ((1.6, False), (1.8, True)):
        space = mf.Space(lr=mf.default_range("lr", init=1e-2))
        weight = nn.Parameter(torch.eye(3))
        guard = Guard(
            space,
            mf.Averaged(),
            lambda w=weight: {"w": w},
            dict,
            [torch.optim.SGD([weight], 0.1)],
            {"lr": "lr"},
        )
        guard.begin(2.0, {"w": torch.ones(3, 3)})
        for _ in range(16):
            guard.beginning.count_step()
        with torch.no_grad():
            weight.mul_(5)
        assert guard.begin_again(lambda: 1.5)
        assert float(space["lr"]) < 5e-3
        for _ in range(16):
            assert not guard.trial_due
            guard.beginning.count_step()
        assert guard.trial_due
        guard.end_trial(loss)
        assert (float(space["lr"]) > 9e-3) == back


def test_looks_at_a_random_validation_loss_use_the_same_draws():
    loop = Loop(lr(1e-3), tune=False)
    noisy = lambda model, batch: loss_fn(model, batch) + torch.rand(())  # noqa: E731
    tuner = mf.Tuner(
        loop.model, loop.optimizer, loop.space, loss_fn, TRAIN, VALID, valid_loss_fn=noisy, total_steps=100
    )
    hyperstep = tuner._hyperstep
    first, between = hyperstep.look(), [hyperstep.look_again() for _ in range(2)]
    assert between == [first, first]
    now, best = hyperstep.losses_beside({}, 2)
    assert now == best


def test_looks_after_a_resume_are_at_the_same_batch(tmp_path):
    draws = torch.Generator().manual_seed(5)
    data = torch.utils.data.TensorDataset(*VALID[0])
    shuffled = lambda: torch.utils.data.DataLoader(data, 3, shuffle=True, generator=draws)  # noqa: E731
    noisy = lambda model, batch: loss_fn(model, batch) + torch.rand(())  # noqa: E731

    def tuner(loader):
        loop = Loop(lr(1e-3), tune=False)
        parts = loop.model, loop.optimizer, loop.space, loss_fn, TRAIN, loader
        return mf.Tuner(*parts, valid_loss_fn=noisy, total_steps=100)

    first = tuner(shuffled())
    next(first._hyperstep.t2)
    look = first._hyperstep.look()
    torch.save(first.state_dict(), tmp_path / "tuner.pt")
    following = next(first._hyperstep.t2)[0].tolist()
    first.detach()
    second = tuner(shuffled())
    second._hyperstep.look()
    second.load_state_dict(torch.load(tmp_path / "tuner.pt"))
    assert [second._hyperstep.look_again() for _ in range(2)] == [look, look]
    assert next(second._hyperstep.t2)[0].tolist() == following
    second.detach()
    unknown = tuner(iter([VALID[0]] * 9))
    unknown._hyperstep.look()
    assert unknown._hyperstep.look_again() is None


@pytest.mark.parametrize("option", ["lr", "momentum", "beta1"])
@pytest.mark.parametrize("fast", [False, True])
def test_a_fast_step_is_made_no_longer(option, fast):
    space = mf.Space({option: mf.default_range(option), "noise": mf.default_range("noise")})
    weight = nn.Parameter(torch.eye(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    guard = Guard(space, mf.Averaged(), lambda: {"w": weight}, dict, [optimizer], {option: option})
    longer, shorter = ({name: sign * torch.ones(()) for name in space} for sign in (-1, 1))
    for found in (longer, shorter):
        guard.begin_step()
        with torch.no_grad():
            weight.mul_(1.02 if fast else 1.0001)
        left_out = fast and found is longer and option != "beta1"
        assert set(guard.paced(found, 1000)[0]) == ({"noise"} if left_out else set(space))


def test_going_back_restores_the_weights_and_clears_the_optimisers_state():
    guard, _, weight, optimizer = guarded()
    weight.grad = torch.ones(3)
    optimizer.step()
    assert guard.restore()
    assert torch.equal(weight, torch.ones(3))
    assert not optimizer.state
    assert not weight.grad.any()


@pytest.mark.parametrize(("option", "value", "after"), [("lr", 0.1, 0.03), ("momentum", 0.9, 0.768)])
def test_a_risky_option_steps_back_and_stays_below_the_value_that_failed(option, value, after):
    guard, space, *_ = guarded(option, value)
    guard.restore()
    assert float(space[option]) == pytest.approx(after, rel=1e-3)
    space[option].raw.fill_(1.0)
    guard.limit()
    assert float(space[option]) == pytest.approx(0.07 if option == "lr" else value, rel=1e-3)
    space[option].raw.fill_(1.0)
    guard.limit()
    assert float(space[option]) == pytest.approx(0.0707 if option == "lr" else value, rel=1e-3)


def test_a_return_is_in_the_trajectory_so_that_a_replay_follows_it():
    loop = Loop(lr(1e-3), steps=40)
    loop.run(10)
    controller = loop.tuner._controller
    records = len(loop.tuner.trajectory)
    assert controller._go_back(controller.guard.restore, "it diverged")
    assert len(loop.tuner.trajectory) == records + 1
    columns = loop.tuner.trajectory.values(loop.space)
    assert columns["step"][-1] == loop.tuner.steps == 10
    assert columns["lr"][-1] == pytest.approx(float(loop.space["lr"]))
