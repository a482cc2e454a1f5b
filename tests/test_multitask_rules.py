"""The rules of `benchmarks/multitask.py`, against what their papers' equations say."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from midflight.gradcheck.oracles import derivative

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
rules = pytest.importorskip("multitask_rules")


@pytest.fixture
def toy():
    """Two shared parameters, and the losses of two heads on them, in float64."""
    torch.manual_seed(0)
    shared = nn.Linear(4, 3).double()
    x = torch.randn(20, 4, dtype=torch.float64)
    y = torch.randn(2, 20, dtype=torch.float64)
    heads = torch.randn(2, 3, dtype=torch.float64)

    def terms():
        units = shared(x).tanh()
        return torch.stack([(units @ head - t).square().mean() for head, t in zip(heads, y, strict=True)])

    return list(shared.parameters()), terms


def norms_of(shared, terms):
    """The norm of each loss's gradient, entry by entry."""
    found = []
    for i in range(2):
        grads = torch.autograd.grad(terms()[i], shared)
        found.append(math.sqrt(sum(float(g) ** 2 for grad in grads for g in grad.flatten())))
    return found


def gradnorm_loss(weights, norms, held, first, now, alpha):
    """Chen et al. 2018, Eq. 2; the mean norm is that of the weights `held`."""
    mean = sum(w * n for w, n in zip(held, norms, strict=True)) / 2
    inverse = [b / a for a, b in zip(first, now, strict=True)]
    rates = [r / (sum(inverse) / 2) for r in inverse]
    terms = zip(weights, norms, rates, strict=True)
    return sum(abs(w * n - mean * rate**alpha) for w, n, rate in terms)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_slopes_of_gradnorm_are_those_of_its_loss_with_the_target_held_fixed(toy, alpha):
    shared, terms = toy
    rule = rules.GradNorm(2, alpha=alpha, lr=0.1)
    rule.first = torch.tensor([2.0, 5.0], dtype=torch.float64)
    rule.weights = torch.tensor([0.7, 1.3])
    weights, now, norms = rule.weights.tolist(), terms().tolist(), norms_of(shared, terms)

    def along(i, held):
        def f(shift):
            moved = [w + shift * (i == j) for j, w in enumerate(weights)]
            return gradnorm_loss(moved, norms, weights if held else moved, [2.0, 5.0], now, alpha)

        return f

    found = rule.slopes(terms(), shared).tolist()
    assert found == pytest.approx([derivative(along(i, True))[0] for i in range(2)], rel=1e-6)
    if alpha:  # with equal rates of two tasks, the slope of the target cancels
        wrong_twin = [derivative(along(i, False))[0] for i in range(2)]
        assert found != pytest.approx(wrong_twin, rel=1e-2)


def test_gradnorm_takes_a_step_of_adam_and_keeps_the_sum(toy):
    shared, terms = toy
    rule = rules.GradNorm(2, alpha=1.5, lr=0.1)
    slopes = rule.slopes(terms(), shared)
    rule.update(terms(), shared)
    moved = [1 - 0.1 * math.copysign(1, slope) for slope in slopes.tolist()]  # the first step of Adam
    assert rule.weights.tolist() == pytest.approx([2 * w / sum(moved) for w in moved], rel=1e-5)


def test_slopes_of_uncertainty_are_those_of_its_loss():
    rule = rules.Uncertainty([True, False], lr=0.1)
    terms = torch.tensor([3.0, 0.4])
    rule.loss(terms).backward()
    # d/ds of exp(-s) L / 2 + s / 2, and of exp(-s) L + s / 2, at s = 0
    assert rule.s.grad.tolist() == pytest.approx([(1 - 3.0) / 2, 1 / 2 - 0.4])


def test_uncertainty_settles_at_the_variance():
    """A squared error has its minimum at sigma^2 = L, a cross-entropy at sigma^2 = 2 L."""
    rule = rules.Uncertainty([True, False], lr=0.03)
    terms = torch.tensor([3.0, 0.4])
    for _ in range(1000):
        rule.loss(terms).backward()
        rule.update(terms, [])
    assert rule.s.exp().tolist() == pytest.approx([3.0, 2 * 0.4], rel=1e-3)
    assert rule.weights.tolist() == pytest.approx([1 / (2 * 3.0), 1 / (2 * 0.4)], rel=1e-3)
