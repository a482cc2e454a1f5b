"""How far steps move the weights: beginnings that are ruined, and steps that are fast."""

import pytest
import torch
from torch import nn

from midflight.tuner.movement import (
    AIM,
    ENTRIES,
    FAST,
    FURTHER,
    LEAST,
    MOST_RESTARTS,
    MOVED,
    SLOW,
    Beginning,
    Speed,
)

STEPS, LIMIT = next(iter(MOVED.items()))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))


def beginning(m):
    found = Beginning(lambda: dict(m.named_parameters()), lambda: dict(m.named_buffers()))
    found.keep({})
    return found


def move(m, change):
    """Move each weight matrix by `change` times its norm, and a vector by much more."""
    with torch.no_grad():
        for p in m.parameters():
            step = torch.randn_like(p)
            p += step * (change * p.norm() / step.norm() if p.dim() > 1 else 1e3)


@pytest.mark.parametrize(("change", "factor"), [(0.9, None), (1.1, AIM / (1.1 * LIMIT)), (1e9, LEAST)])
def test_a_change_above_the_limit_asks_for_a_lower_rate(change, factor):
    m = model()
    first = beginning(m)
    for _ in range(STEPS):
        assert first.slower() is None
        first.count_step()
    move(m, change * LIMIT)
    assert first.slower() == (factor and pytest.approx(factor, rel=0.01))


def test_weights_that_were_zero_and_weights_that_came_later_do_not_count():
    m = model()
    with torch.no_grad():
        m[3].weight.zero_()
    first = beginning(m)
    for _ in range(STEPS):
        first.count_step()
    with torch.no_grad():
        m[3].weight.fill_(1.0)
    m.add_module("later", nn.Linear(3, 3))
    assert first.slower() is None


def test_going_back_gives_the_initial_weights_and_buffers_and_ends_after_some_times():
    m = model()
    start = {name: t.clone() for name, t in m.state_dict().items()}
    first = beginning(m)
    for _ in range(MOST_RESTARTS):
        for _ in range(STEPS):
            first.count_step()
        move(m, 2 * LIMIT)
        m(torch.randn(5, 6))
        assert first.slower()
        first.restore()
        first.count_anew()
        for name, t in m.state_dict().items():
            torch.testing.assert_close(t, start[name], rtol=1e-3, atol=1e-3)
    for _ in range(STEPS):
        first.count_step()
    move(m, 2 * LIMIT)
    assert first.slower() is None


def test_the_initial_weights_are_dropped_after_the_last_look():
    first = beginning(model())
    for _ in range(max(MOVED)):
        first.count_step()
    assert first.state_dict()["kept"]
    first.count_step()
    assert not first.state_dict()["kept"]


@pytest.mark.parametrize(("steps", "limit"), [(10, 0.1), (50, 0.02), (1000, FAST)])
def test_a_step_is_fast_by_its_number(steps, limit):
    m, speed = model(), Speed()
    for change in (0.9, 1.1):
        speed.begin(dict(m.named_parameters()))
        move(m, change * limit)
        assert (speed.pace(dict(m.named_parameters()), steps) == 0) == (change > 1)


@pytest.mark.parametrize(("share", "pace"), [(0.5, 1), (SLOW, 1), (SLOW / 2, 2), (SLOW / 100, FURTHER)])
def test_options_move_further_in_proportion_as_a_step_is_slow(share, pace):
    m, speed = model(), Speed()
    speed.begin(dict(m.named_parameters()))
    move(m, share * 0.1)
    assert speed.pace(dict(m.named_parameters()), 10) == pytest.approx(pace, rel=1e-2)


def test_a_step_that_is_short_because_of_the_schedule_is_not_slow():
    m, speed = model(), Speed()
    for factor, pace in ((1.0, 2), (0.1, 1)):
        speed.begin(dict(m.named_parameters()))
        move(m, SLOW / 2 * 0.1)
        assert speed.pace(dict(m.named_parameters()), 10, factor) == pytest.approx(pace, rel=1e-2)


def test_a_step_that_changes_nothing_is_not_judged():
    m, speed = model(), Speed()
    speed.begin(dict(m.named_parameters()))
    assert speed.pace(dict(m.named_parameters()), 10) == 1


def test_of_a_large_matrix_a_sample_is_compared():
    weights = {"w": nn.Parameter(torch.randn(300, 1000))}
    speed = Speed()
    speed.begin(weights)
    assert sum(t.numel() for t in speed._before.values()) <= ENTRIES
    with torch.no_grad():
        weights["w"].mul_(1.02)
    assert speed.pace(weights, 1000) == 0
    assert speed.pace(weights, 1000) == 1  # no step since
