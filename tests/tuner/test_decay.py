"""Weight decay does not rise so far that it would erase what the weights learn in the run."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

import midflight as mf
from midflight.tuner.controller import UNKNOWN_STEPS
from midflight.tuner.step_options import ERASED
from midflight.updates import read_options, rule_for

STEPS, LR = 400, 0.05
LOW = 0.01
"""A limit in place of ERASED that these short runs reach."""
DATA = torch.Generator().manual_seed(0)
X, Y = torch.randn(40, 6, generator=DATA), torch.randn(40, 1, generator=DATA)


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def run(start, make=torch.optim.SGD, total_steps=STEPS, **options):
    """Train on pure noise, where smaller weights always validate better; return the weight decays used."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 1))
    optimizer = make(model.parameters(), lr=LR, **options)
    space = mf.Space(weight_decay=mf.Float(1e-6, 10.0, log=True, init=start))
    tuner = mf.Tuner(
        model, optimizer, space, loss_fn, [(X[:20], Y[:20])], [(X[20:], Y[20:])],
        total_steps=total_steps,
    )  # fmt: skip
    used = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_fn(model, (X[:20], Y[:20])).backward()
        optimizer.step()
        used.append(float(space["weight_decay"]))
    tuner.detach()
    return used


@pytest.mark.parametrize(
    ("make", "options", "rate"),
    [
        (torch.optim.SGD, {}, LR),
        (torch.optim.SGD, {"momentum": 0.5}, 2 * LR),
        (torch.optim.AdamW, {}, LR),
    ],
)
def test_it_rises_to_the_limit_and_no_further(make, options, rate, monkeypatch):
    monkeypatch.setattr("midflight.tuner.controller.ERASED", LOW)
    most = LOW / (rate * STEPS)
    assert max(run(1e-4, make, **options)) == pytest.approx(most, rel=1e-3)


def test_a_start_above_the_limit_is_the_limit():
    start = 10 * ERASED / (LR * STEPS)
    used = run(start)
    assert max(used) <= start * (1 + 1e-6)
    assert used[5] > 3 * ERASED / (LR * STEPS)  # it is not cut to the limit


def test_without_total_steps_the_limit_only_stops_a_rise(monkeypatch):
    monkeypatch.setattr("midflight.tuner.controller.ERASED", LOW)
    most = LOW / (LR * UNKNOWN_STEPS)
    assert max(run(0.1 * most, total_steps=None)) == pytest.approx(most, rel=1e-3)
    monkeypatch.setattr("midflight.tuner.controller.UNKNOWN_STEPS", 1)
    used = run(0.1 * most, total_steps=None)
    peak = max(used)
    assert used[-1] > 0.9 * peak > LOW / (LR * STEPS)  # and it does not fall as the run grows longer


def test_the_limit_of_a_logit_scale_is_inside_the_range():
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    space = mf.Space(weight_decay=mf.Float(1e-5, 0.5, logit=True, init=1e-3))
    mf.Tuner(model, optimizer, space, loss_fn, [(X, Y)], [(X, Y)], schedule=2, total_steps=100)
    for _ in range(60):
        optimizer.zero_grad()
        loss_fn(model, (X, Y)).backward()
        optimizer.step()
    assert 1e-5 <= float(space["weight_decay"]) <= 0.5


def test_groups_without_decay_do_not_count(monkeypatch):
    monkeypatch.setattr("midflight.tuner.controller.ERASED", LOW)
    most = LOW / (LR * STEPS)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 1))
    groups = [
        {"params": [*model[0].parameters(), model[2].weight]},
        {"params": [model[2].bias], "lr": 0.1 * LR, "weight_decay": 0.0},
        {"params": [nn.Parameter(torch.zeros(2))], "lr": 100 * LR, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR, weight_decay=1e-4)
    space = mf.Space(weight_decay=mf.Float(1e-6, 10.0, log=True, init=1e-4))
    parts = [(X[:20], Y[:20])], [(X[20:], Y[20:])]
    mf.Tuner(model, optimizer, space, loss_fn, *parts, total_steps=STEPS)
    used = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (loss_fn(model, (X[:20], Y[:20])) + 0 * groups[2]["params"][0].sum()).backward()
        optimizer.step()
        used.append(float(space["weight_decay"]))
    assert max(used) == pytest.approx(most, rel=1e-3)


def test_without_the_limit_it_rises_further(monkeypatch):
    monkeypatch.setattr("midflight.tuner.controller.ERASED", math.inf)
    assert max(run(1e-4)) > 2 * LOW / (LR * STEPS)


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.8),
        partial(torch.optim.SGD, lr=0.1, momentum=0.8, dampening=0.5),
        partial(torch.optim.ASGD, lr=0.1, lambd=0.0),
        partial(torch.optim.AdamW, lr=0.01),
        partial(torch.optim.Adam, lr=0.01),
    ],
)
def test_shrinkage_is_the_rate_at_which_weights_without_a_gradient_shrink(make):
    decay, weight = 1e-3, torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = make([weight], weight_decay=decay)
    shrinkage = rule_for(optimizer).shrinkage(read_options(optimizer.param_groups[0]))
    for n in range(1001):
        if n == 500:  # the momentum has settled
            before = float(weight.detach()[0])
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    if type(optimizer) is torch.optim.Adam:
        assert shrinkage == 0  # coupled: it differs from entry to entry
    else:
        found = -math.log(float(weight.detach()[0]) / before) / 501 / decay
        assert found == pytest.approx(shrinkage, rel=0.01)


def test_no_hooks_stay_on_the_weights_between_hyper_steps_if_the_loss_reads_nothing():
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    space = mf.Space(lr=mf.Float(1e-4, 0.1, log=True, init=0.01))
    mf.Tuner(model, optimizer, space, loss_fn, [(X, Y)], [(X, Y)], schedule=10, total_steps=100)
    hooked = []
    for _ in range(35):
        optimizer.zero_grad()
        loss_fn(model, (X, Y)).backward()
        hooked.append(any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()))
        optimizer.step()
    assert not any(hooked[11:])  # before the first hyper-step it is not known that nothing reads them


@pytest.mark.parametrize(("lr", "share"), [(1e-12, 0.25), (0.05, 1.0)])
def test_until_the_model_has_learned_nothing_rises_and_steps_in_a_wide_range_are_shorter(lr, share):
    torch.manual_seed(0)
    space = mf.Space(dropout=mf.Float(1e-5, 0.9998, logit=True, init=0.3))
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), mf.nn.Dropout(space["dropout"]), nn.Linear(40, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    target = X[:, :1]
    batch = X, target
    mf.Tuner(model, optimizer, space, loss_fn, [batch], [batch], schedule=1)
    raws = [float(space["dropout"].raw)]
    for _ in range(60):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        raws.append(float(space["dropout"].raw))
    moves = [abs(b - a) for a, b in pairwise(raws)]
    transform = space["dropout"].transform
    longest = 0.08 * transform.USUAL / transform.width
    has_learned = share == 1
    assert max(moves[30:]) <= share * longest
    assert max(moves) > (0.3 if has_learned else 0.02) * longest
    assert (max(raws) > raws[0]) == has_learned
