"""The rules of `benchmarks/mixture.py`, against what their papers' equations say."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from midflight.gradcheck.oracles import derivative

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
rules = pytest.importorskip("mixture_rules")

LR = 1e-3


@pytest.fixture
def toy():
    """A model, and losses of three sources and a target."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches = [(torch.randn(20, 5, dtype=torch.float64), torch.randint(0, 3, (20,))) for _ in range(4)]

    def losses(model):
        *sources, target = [F.cross_entropy(model(x), y) for x, y in batches]
        return torch.stack(sources), target

    return model, losses


def after_descent(model, losses, params_of, weights):
    """The target's loss after a step of gradient descent on some parameters, with these weights."""
    moved = copy.deepcopy(model)
    params = params_of(moved)
    gradients = torch.autograd.grad(weights @ losses(moved)[0], params)
    with torch.no_grad():
        for p, g in zip(params, gradients, strict=True):
            p -= LR * g
        return float(losses(moved)[1])


def slopes(model, losses, params_of):
    """Its derivatives by the weights at 0, where the step does not change the gradients, over -LR."""

    def along(i):
        def f(shift):
            weights = torch.zeros(3, dtype=torch.float64)
            weights[i] += shift
            return after_descent(model, losses, params_of, weights)

        return f

    return [-derivative(along(i))[0] / LR for i in range(3)]


@pytest.mark.parametrize("params_of", [lambda m: list(m.parameters()), lambda m: list(m[-1].parameters())])
def test_alignments_are_the_slopes_of_a_step_of_gradient_descent(toy, params_of):
    model, losses = toy
    found = rules.alignments(losses(model), params_of(model))
    assert found.tolist() == pytest.approx(slopes(model, losses, params_of), rel=1e-5)


def test_fastmix_moves_the_logits_down_the_slope_of_its_hypergradient(toy):
    model, losses = toy
    rule = rules.FastMix(3, lr=0.1)
    a = rules.alignments(losses(model), list(model[-1].parameters()))
    w = rule.weights.double()
    right = w * (-a + w @ a)
    rule.update(model, losses, list(model[-1].parameters()))
    assert rule.logits.grad.tolist() == pytest.approx(right.tolist(), rel=1e-4)
    assert torch.equal(rule.logits.sign(), -right.sign().float())


def test_alignment_takes_a_step_of_mirror_descent_and_averages(toy):
    model, losses = toy
    rule = rules.Alignment(3, lr=2.0, mean=0.25)
    a = rules.alignments(losses(model), list(model.parameters())).tolist()
    rule.update(model, losses, [])
    total = sum(math.exp(2 * x) for x in a)
    assert rule.weights.tolist() == pytest.approx(
        [0.75 / 3 + 0.25 * math.exp(2 * x) / total for x in a], rel=1e-5
    )


def test_doremi_weighs_up_the_sources_that_the_proxy_lags_behind_on():
    rule = rules.DoReMi(3, "reference", smoothing=0.03)
    own = {"proxy": torch.tensor([2.0, 1.0, 3.0]), "reference": torch.tensor([1.0, 1.5, 3.0])}
    rule.update("proxy", lambda model: (own[model], torch.tensor(0.0)), [])
    total = math.e + 2  # exp(1), exp(0) because an excess below 0 counts 0, exp(0)
    assert rule.weights.tolist() == pytest.approx(
        [0.97 * math.e / total + 0.01, 0.97 / total + 0.01, 0.97 / total + 0.01]
    )
    assert rule.mean.tolist() == pytest.approx(rule.weights.tolist())
