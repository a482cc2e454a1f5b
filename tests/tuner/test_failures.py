"""What the tuner does when a loss or a hypergradient is not finite."""

import math

import pytest
import torch
from toys import X, Y, cross_entropy, network, space, train, tuner

import midflight as mf
from midflight.tuner.failures import PATIENCE, RECOVERY

NAN = float("nan")


def training(**options):
    torch.manual_seed(0)
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return s, model, optimizer, tuner(model, optimizer, s, **options)


def spoil(model, value=NAN):
    with torch.no_grad():
        model[1].weight[0, 0] = value


def test_failures_are_left_out_and_nothing_else_happens():
    s, model, optimizer, t = training()
    train(model, optimizer, 2)
    values = s.as_dict()
    spoil(model)
    train(model, optimizer, 2 * PATIENCE)
    assert s.as_dict() == values
    assert (t.log()["skipped"], t.log()["restored"]) == (2 * PATIENCE, 0)
    assert "6 hyper-steps were left out" in t.report()[0]


class Faulty:
    """A validation loss that is NaN while `broken`, or has a gradient of NaN."""

    broken = False

    def __init__(self, in_gradient=False):
        self.in_gradient = in_gradient

    def __call__(self, model, batch):
        loss = cross_entropy(model, batch)
        if not self.broken:
            return loss
        return loss + (loss - loss.detach()).sqrt() if self.in_gradient else loss * NAN


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_validation_loss_that_is_not_finite_once_spoils_one_hyper_step_only(in_gradient):
    faulty = Faulty(in_gradient)
    s, model, optimizer, t = training(valid_loss_fn=faulty, horizon="run")
    train(model, optimizer, 6)
    faulty.broken = True
    train(model, optimizer, 1)
    faulty.broken = False
    values = s.as_dict()
    train(model, optimizer, 3)
    assert t.log()["skipped"] == 1
    assert s.as_dict() != values


def test_bad_batches_among_good_ones_are_left_out_and_tuning_goes_on_at_full_length():
    """One of ten T2 batches is NaN: the others move the hyperparameters as if it were not there."""
    ends = []
    for bad in (True, False):
        good = [(X[i : i + 6], Y[i : i + 6]) for i in range(0, 54, 6)]
        batches = [*good, (X[54:60] * NAN, Y[54:60])] if bad else good
        _, model, optimizer, t = training(
            valid_loader=batches, hyper_optimizer=lambda raws: mf.SignSteps(raws, lr=1e-3)
        )
        for step in range(40):
            if bad or step % 10 != 9:
                train(model, optimizer, 1)
        ends.append(t.log())
        assert t._controller.failures.shrink == 1
    assert ends[0]["skipped"] == 4
    assert ends[0]["hypersteps"] == ends[1]["hypersteps"] == 36


def test_failures_in_a_row_halve_the_next_moves_and_good_ones_bring_them_back():
    """Against lr / sqrt(1 + n / 50), the length of the n-th move."""
    faulty = Faulty()
    s, model, optimizer, _ = training(
        valid_loss_fn=faulty, hyper_optimizer=lambda raws: mf.SignSteps(raws, lr=0.03, agreement=0.0)
    )
    moves = 0

    def moved():
        nonlocal moves
        s.set(noise=0.4)
        before = float(s["noise"].raw)
        train(model, optimizer, 1)
        moves += 1
        return abs(float(s["noise"].raw) - before) / (0.03 / math.sqrt(1 + (moves - 1) / 50))

    def fail(times):
        faulty.broken = True
        train(model, optimizer, times)
        faulty.broken = False

    assert moved() == pytest.approx(1, rel=1e-4)
    fail(PATIENCE - 1)
    assert moved() == pytest.approx(1, rel=1e-4)
    fail(PATIENCE)
    assert [moved() for _ in range(RECOVERY + 1)] == pytest.approx([0.5] * RECOVERY + [1.0], rel=1e-4)
    fail(2 * PATIENCE)
    assert moved() == pytest.approx(0.25, rel=1e-4)
