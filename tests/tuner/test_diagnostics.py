"""What the tuner reports about a run."""

import pytest
import torch
from toys import X, Y, cross_entropy, network, space, train, tuner

import midflight as mf


def reports(**options):
    """The report after each ten of twenty steps."""
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = tuner(model, optimizer, s, **options)
    for _ in range(2):
        train(model, optimizer, 10)
        yield t.report()


def test_hyperparameters_pinned_at_their_bounds_are_reported():
    early, late = reports(hyper_optimizer=lambda raws: torch.optim.SGD(raws, lr=1e9))
    assert early == []  # ten moves say little
    decay, noise = late
    assert decay.startswith("weight_decay stood at its ")
    assert "bound" in noise
    assert "for the last 20 of 20 hyper-steps" in noise


def test_a_hyperparameter_that_moves_inside_its_bounds_is_not_reported():
    assert list(reports(hyper_optimizer=lambda raws: mf.SignSteps(raws, lr=0.02))) == [[], []]


def test_tuning_many_hyperparameters_on_few_rows_is_reported_as_overfitting():
    torch.manual_seed(0)
    x, y = torch.randn(400, 20), torch.randint(0, 2, (400,))  # nothing to learn
    whole = x[:100], y[:100]
    t2, third = ([(x[i : i + 5], y[i : i + 5]) for i in range(a, a + 100, 5)] for a in (100, 200))
    s = mf.Space(bias=mf.Float(-3.0, 3.0, init=0.0, shape=(20,)))
    model = torch.nn.Linear(20, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def loss(model, batch):
        return cross_entropy(model, batch) + s["bias"].value @ (model.weight[1] - model.weight[0])

    t = tuner(
        model, optimizer, s, loss, train_loader=[whole], valid_loader=t2, valid_loss_fn=cross_entropy,
        hyper_optimizer=lambda raws: mf.SignSteps(raws, lr=0.05, agreement=0.0),
    )  # fmt: skip
    assert t.report(third) == []
    train(model, optimizer, 300, whole, loss)
    before = torch.get_rng_state()
    assert any("T2 is overfitted" in sentence for sentence in t.report(third))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_the_two_splits_need_two_batches_each():
    s = space()
    model = network(s)
    t = tuner(model, torch.optim.Adam(model.parameters()), s)
    with pytest.raises(ValueError, match="at least 2 batches"):
        t.report(third=[(X, Y), (X, Y)])


def digits_like(loss_fn, s, **options):
    """A tuner on a small network, and its loop."""
    model = network(s) if "noise" in s else torch.nn.Linear(X.shape[1], 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t = mf.Tuner(model, optimizer, s, loss_fn, [(X, Y)], [(X, Y)], **options)
    return t, model, optimizer


def test_few_hyper_steps_are_reported_with_what_they_took():
    s, now = space(), [0.0]

    def clock():
        now[0] += 1  # a second for each training step
        return now[0]

    def valid_loss_fn(model, batch):
        now[0] += 20
        return cross_entropy(model, batch)

    budget = mf.TimeBudget(0.03, clock=clock)
    t, model, optimizer = digits_like(cross_entropy, s, schedule=budget, valid_loss_fn=valid_loss_fn)
    train(model, optimizer, 120)
    (sentence,) = [line for line in t.report() if "hyper-steps in 120 optimiser steps" in line]
    assert "of the training time" in sentence


def test_a_hyperparameter_that_was_not_reached_yet_is_reported_before_it_is_an_error():
    s = mf.Space(noise=mf.Float(0.0, 0.8), weight_decy=mf.Float(1e-4, 1e-1, log=True))
    t, model, optimizer = digits_like(cross_entropy, s, schedule=2)
    train(model, optimizer, 6)
    assert any(line.startswith("weight_decy reached neither") for line in t.report())


def test_a_validation_loss_that_reads_a_hyperparameter_is_reported():
    s = mf.Space(smoothing=mf.Float(0.0, 0.5, init=0.1))

    def loss_fn(model, batch):
        return mf.nn.losses.cross_entropy(model(batch[0]), batch[1], label_smoothing=s["smoothing"])

    t, model, optimizer = digits_like(loss_fn, s, schedule=2)
    train(model, optimizer, 6)
    assert any("the validation loss itself reads smoothing" in line for line in t.report())
    t, model, optimizer = digits_like(loss_fn, s, schedule=2, valid_loss_fn=cross_entropy)
    train(model, optimizer, 6)
    assert t.report() == []


def test_arguments_in_another_order_are_refused_with_the_right_one():
    s = space()
    model = network(s)
    optimizer = torch.optim.Adam(model.parameters())
    for wrong in [(optimizer, model, s, cross_entropy), (model, optimizer, cross_entropy, s)]:
        with pytest.raises(TypeError, match=r"the order is Tuner\(model, optimizer, space, loss_fn"):
            mf.Tuner(*wrong, [(X, Y)], [(X, Y)])
