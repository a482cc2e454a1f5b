"""When hyper-steps come."""

import copy
import math
import random

import pytest
import torch
from toys import Recorder, X, Y, cross_entropy, network, space, train, tuner

import midflight as mf


def budget(share, total=None, clock=lambda: 0.0):
    schedule = mf.TimeBudget(share, clock=clock)
    schedule.begin(total)
    return schedule


def test_every_kth_step():
    schedule = mf.Every(3)
    assert [n + 1 for n in range(10) if schedule.next_is_hyper(n, hyper=False)] == [3, 6, 9]


def test_front_loaded_takes_a_hyper_step_for_twenty_steps_most_of_them_at_first():
    schedule, at, hyper = mf.FrontLoaded(), [], False
    schedule.begin(2000)
    for n in range(2000):
        if n == 1000:
            saved, schedule = schedule.state_dict(), mf.FrontLoaded()
            schedule.begin(2000)
            schedule.load_state_dict(saved)
        hyper = schedule.next_is_hyper(n, hyper)
        if hyper:
            at.append(n + 1)
    assert len(at) == 100
    assert at[-1] == 2000
    for k, n in enumerate(at[20:], 21):
        assert n == -(-2000 * k**2 // 100**2)


def hyper_steps(schedule, steps, total):
    """Numbers of the optimiser steps that have a hyper-step."""
    schedule.begin(total)
    at, hyper = [], False
    for n in range(steps):
        hyper = schedule.next_is_hyper(n, hyper)
        if hyper:
            at.append(n + 1)
    return at


def test_front_loaded_without_an_end_comes_at_each_twentieth_step():
    assert hyper_steps(mf.FrontLoaded(), 100, None) == [20, 40, 60, 80, 100]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("steps", "expected"), [(2000, 100), (3000, 150), (12_000, 300), (27_000, 450)])
def test_a_long_run_has_as_many_hyper_steps_as_the_square_root_of_its_length(known, steps, expected):
    assert len(hyper_steps(mf.FrontLoaded(), steps, steps if known else None)) == expected


@pytest.mark.parametrize("known", [True, False])
def test_a_rate_that_was_asked_for_holds_in_a_long_run(known):
    assert len(hyper_steps(mf.FrontLoaded(20), 12_000, 12_000 if known else None)) == 600


@pytest.mark.parametrize("share", [0.02, 0.05, 0.2])
@pytest.mark.parametrize(
    "load", ["steady", "jittery", "twice as slow half way", "a pause of 100 steps", "more than hyper-steps"]
)
@pytest.mark.parametrize("total", [None, 2000])
def test_a_budget_is_kept_within_a_point_over_2000_steps(share, load, total):
    """Against the truth: what the same steps would have taken without tuning."""
    rng, now, plain_time, extra_time, hyper, busy = random.Random(0), 0.0, 0.0, 0.0, False, False
    schedule, after = budget(share, total, clock=lambda: now), False
    schedule.next_is_hyper(0, hyper=False)
    for n in range(1, 2001):
        step = 0.01
        if load == "jittery":
            step *= rng.choice([0.8, 1.0, 1.0, 1.3, 3.0])
        if load.startswith("twice") and n > 1000:
            step *= 2
        extra = 2.7 * step if hyper else 0.0
        if load.startswith("more"):  # the average, and what hyper-steps leave behind
            busy = n % 5 == 0
            extra += 0.05 * step * busy + 0.4 * step * after
        if load.startswith("a pause") and n == 700:
            now += 1.0
        now += step + extra
        plain_time += step
        extra_time += extra
        after, hyper = hyper, schedule.next_is_hyper(n, hyper, busy)
    assert extra_time / plain_time == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("extra", "scale"), [(0.2, 0.5), (1.0, 1.0), (2.7, 2.7**0.75), (20.0, 4.0)])
def test_the_rarer_hyper_steps_are_the_farther_each_goes(extra, scale):
    """At 5 %, one that costs as much as a plain step comes each twentieth step."""
    now, hyper = 0.0, False
    schedule = budget(0.05, clock=lambda: now)
    assert schedule.step_scale == 1
    for n in range(2000):
        now += 1 + extra * hyper
        hyper = schedule.next_is_hyper(n, hyper)
    assert schedule.step_scale == pytest.approx(scale, rel=1e-6)
    again = budget(0.05)
    again.load_state_dict(schedule.state_dict())
    assert again.step_scale == schedule.step_scale


@pytest.mark.parametrize("total", [None, 2000])
def test_a_slow_first_hyper_step_is_paid_but_does_not_hold_up_the_others(total):
    now, hyper, at = 0.0, False, []
    schedule = budget(0.05, total, clock=lambda: now)
    for n in range(1, 2001):
        cost = 2.7 * (10 if len(at) == 1 else 1) if hyper else 0.0
        now += 1 + cost
        hyper = schedule.next_is_hyper(n, hyper)
        if hyper:
            at.append(n + 1)
    assert schedule.spent == pytest.approx(0.05, abs=0.002)
    assert at[1] - at[0] <= 3
    assert len(at) == pytest.approx(0.05 * 2000 / 2.7 - 10, abs=2)
    if total:
        assert sum(n <= 500 for n in at) == pytest.approx(len(at) / 2, abs=2)


class Timed:
    """A run on a clock that the losses move: 1 second for a loss of the loop, 3 for one of the tuner."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.now, self.s, self.at = 0.0, space(), []
        self.model = network(self.s)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.schedule = mf.TimeBudget(0.1, clock=lambda: self.now)
        self.tuner = tuner(
            self.model, self.optimizer, self.s, valid_loss_fn=self.slow_loss, schedule=self.schedule,
            on_hyperstep=lambda n, _: self.at.append(n), **options,
        )  # fmt: skip

    def slow_loss(self, model, batch):
        if torch.is_grad_enabled():  # what the first hyper-step checks without a graph is not counted
            self.now += 3.0
        return cross_entropy(model, batch)

    def train(self, steps):
        for _ in range(steps):
            self.now += 1.0
            train(self.model, self.optimizer, 1)


def test_a_tuner_with_a_budget_keeps_it_and_still_tunes():
    run = Timed(total_steps=400)
    start = run.s.as_dict()
    run.train(400)
    cost = run.tuner.log()["cost"]
    assert cost == run.schedule.spent == pytest.approx(3 * len(run.at) / 400, rel=0.02)  # of a warm-up
    assert cost == pytest.approx(0.1, abs=0.01)
    assert sum(n <= 100 for n in run.at) > len(run.at) / 3  # early
    assert all(run.s.as_dict()[name] != start[name] for name in run.s)


def test_a_budget_survives_saving_and_a_pause_is_not_training():
    run, again, whole = Timed(), Timed(), Timed()
    whole.train(300)
    run.train(100)
    again.tuner.load_state_dict(copy.deepcopy(run.tuner.state_dict()))
    assert again.schedule.spent == run.schedule.spent > 0
    again.now += 1e6
    again.train(200)
    assert again.schedule.spent == pytest.approx(whole.schedule.spent, rel=0.1)
    assert len(again.at) == pytest.approx(len(whole.at) - len(run.at), abs=1)


def test_the_step_scale_lengthens_the_hyper_steps():
    class Farther(mf.Every):
        step_scale = 1.5

    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(model, optimizer, s, schedule=Farther(20), total_steps=100)
    train(model, optimizer, 39)
    assert t.hyper_optimizer.param_groups[0]["lr"] == pytest.approx(1.5 * 0.08 * (1 - 0.2))
    train(model, optimizer, 1)
    assert t.hyper_optimizer.param_groups[0]["lr"] == pytest.approx(1.5 * 0.08 * (1 - 0.4))


def test_a_whole_number_is_every_so_many_steps():
    s, at = space(), []
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    t = tuner(
        model, optimizer, s, schedule=4, on_hyperstep=lambda n, _: at.append(n), hyper_optimizer=Recorder
    )
    train(model, optimizer, 12, (X, Y))
    assert at == [4, 8, 12]
    assert isinstance(t.schedule, mf.Every)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, math.nan, True])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        mf.TimeBudget(share)


@pytest.mark.parametrize("kind", [mf.Every, mf.FrontLoaded])
@pytest.mark.parametrize("number", [0, 2.5, math.nan, True])
def test_a_number_of_steps_that_cannot_be_is_refused(kind, number):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        kind(number)
