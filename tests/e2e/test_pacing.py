"""When hyper-steps come."""

import random
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf
from midflight.pacing import Budget, Early, Every


def test_every_kth_call():
    pace = Every(3)
    assert [calls + 1 for calls in range(10) if pace.next_is_hyper(calls, hyper=False)] == [3, 6, 9]


def test_early_takes_a_hyper_step_for_twenty_calls_most_of_them_at_first():
    pace, at, hyper = Early(2000), [], False
    for calls in range(2000):
        if calls == 1000:
            saved, pace = pace.state_dict(), Early(2000)
            pace.load_state_dict(saved)
        hyper = pace.next_is_hyper(calls, hyper)
        if hyper:
            at.append(calls + 1)
    assert len(at) == 100
    assert at[-1] == 2000
    for n, call in enumerate(at[20:], 21):
        assert call == -(-2000 * n**2 // 100**2)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.2])
@pytest.mark.parametrize(
    "load", ["steady", "jittery", "twice as slow half way", "a pause of 100 steps", "more than hyper-steps"]
)
@pytest.mark.parametrize("total", [None, 2000])
def test_a_budget_is_kept_within_a_point_over_2000_steps(share, load, total):
    """Against the truth: what the same steps would have taken without tuning."""
    rng, now, plain_time, extra_time, hyper, busy = random.Random(0), 0.0, 0.0, 0.0, False, False
    pace, after = Budget(share, total, clock=lambda: now), False
    pace.next_is_hyper(0, hyper=False)
    for call in range(1, 2001):
        step = 0.01
        if load == "jittery":
            step *= rng.choice([0.8, 1.0, 1.0, 1.3, 3.0])
        if load.startswith("twice") and call > 1000:
            step *= 2
        extra = 2.7 * step if hyper else 0.0
        if load.startswith("more"):  # the average, and what hyper-steps leave behind
            busy = call % 5 == 0
            extra += 0.05 * step * busy + 0.4 * step * after
        if load.startswith("a pause") and call == 700:
            now += 1.0
        now += step + extra
        plain_time += step
        extra_time += extra
        after, hyper = hyper, pace.next_is_hyper(call, hyper, busy)
    assert extra_time / plain_time == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("extra", "stride"), [(0.2, 0.5), (1.0, 1.0), (2.7, 2.7**0.75), (20.0, 4.0)])
def test_the_rarer_hyper_steps_are_the_farther_each_goes(extra, stride):
    """At 5 %, one that costs as much as a plain step comes each twentieth call."""
    now, hyper, pace = 0.0, False, Budget(0.05, clock=lambda: now)
    assert pace.stride == 1
    for call in range(2000):
        now += 1 + extra * hyper
        hyper = pace.next_is_hyper(call, hyper)
    assert pace.stride == pytest.approx(stride, rel=1e-6)
    again = Budget(0.05)
    again.load_state_dict(pace.state_dict())
    assert again.stride == pace.stride


@pytest.mark.parametrize("total", [None, 2000])
def test_a_slow_first_hyper_step_is_paid_but_does_not_hold_up_the_others(total):
    now, hyper, pace, at = 0.0, False, Budget(0.05, total, clock=lambda: now), []
    for call in range(1, 2001):
        cost = 2.7 * (10 if len(at) == 1 else 1) if hyper else 0.0
        now += 1 + cost
        hyper = pace.next_is_hyper(call, hyper)
        if hyper:
            at.append(call + 1)
    assert pace.spent == pytest.approx(0.05, abs=0.002)
    assert at[1] - at[0] <= 3
    assert len(at) == pytest.approx(0.05 * 2000 / 2.7 - 10, abs=2)
    if total:
        assert sum(call <= 500 for call in at) == pytest.approx(len(at) / 2, abs=2)


def tune(steps, **options):
    torch.manual_seed(0)
    x, y = torch.randn(512, 64), torch.randint(0, 4, (512,))
    space = mf.Space(noise=mf.Float(0.0, 1.0), weight_decay=mf.Float(1e-5, 1e-1, log=True))
    model = nn.Sequential(
        mf.nn.GaussianNoise(space["noise"]), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4)
    )
    optimizer = torch.optim.Adam(model.parameters())
    tuner = mf.Tuner(
        model, optimizer, space, validate=lambda m, b: F.cross_entropy(m(b[0]), b[1]), valid_loader=[(x, y)],
        bind=["weight_decay"], **options,
    )  # fmt: skip
    hypers = 0
    for _ in range(steps):
        optimizer.zero_grad()
        hypers += tuner.space["noise"].raw.requires_grad
        tuner.backward(F.cross_entropy(model(x), y))
        optimizer.step()
    return tuner, hypers


def test_a_tuner_with_a_budget_keeps_it_and_still_tunes():
    tuner, hypers = tune(400, budget=0.1, total_steps=400)
    assert 3 <= hypers < 60
    assert 0.03 < tuner.pace.spent < 0.2  # by a real clock: a stall in the last hyper-step is not foreseen
    assert float(tuner.space["noise"].value.detach()) != 0.5


def test_a_stride_lengthens_the_hyper_steps():
    tuner, _ = tune(39, every=20, total_steps=100)
    tuner.pace.stride = 1.5
    tuner.hyper_optimizer.step()
    tuner._schedule.step()
    assert tuner.hyper_optimizer.param_groups[0]["lr"] == pytest.approx(1.5 * 0.08 * (1 - 0.39))


def test_a_budget_survives_saving():
    tuner, _ = tune(100, budget=0.1)
    again, _ = tune(1, budget=0.1)
    again.load_state_dict(tuner.state_dict())
    assert again.pace.spent == tuner.pace.spent
    time.sleep(0.2)  # a pause between loading and the first step counts for little
    again.pace.next_is_hyper(101, hyper=False)
    assert again.pace.spent == pytest.approx(tuner.pace.spent, rel=0.1)


@pytest.mark.parametrize("options", [{"every": 5, "budget": 0.1}, {"budget": 0.0}, {"budget": 1.5}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="budget"):
        tune(1, **options)
