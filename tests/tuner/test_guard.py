"""The guard: a run that diverges is noticed and goes on from its best average."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf

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


def test_a_divergence_is_logged_and_reported():
    loop = Loop(lr(30.0)).run()
    assert loop.tuner.log()["restored"] >= 1
    assert any(
        "went on from its best average" in sentence and "lower lr" in sentence
        for sentence in loop.tuner.report()
    )


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


def test_bad_validation_batches_are_no_divergence():
    bad = [*[(X[i : i + 25], Y[i : i + 25]) for i in range(200, 375, 25)], (X[375:] * math.nan, Y[375:])]
    torch.manual_seed(1)
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
    saved = whole.tuner.state_dict(), whole.model.state_dict(), whole.optimizer.state_dict()
    saved = _copied(saved)
    whole.run(100, spoil(whole))
    again = Loop(lr(0.05), steps=200)
    again.model.load_state_dict(saved[1])
    again.optimizer.load_state_dict(saved[2])
    again.tuner.load_state_dict(saved[0])
    again.run(100, spoil(again))
    assert again.tuner.log()["restored"] == whole.tuner.log()["restored"] >= 1
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def _copied(state):
    from midflight.tuner.rollback import _copy

    return _copy(state)
