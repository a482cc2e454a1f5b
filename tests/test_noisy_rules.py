"""The rules of `benchmarks/noisy_labels.py`, against what their papers' equations say."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from midflight.gradcheck.oracles import derivative

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
rules = pytest.importorskip("noisy_rules")

LR = 0.3


def losses(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


@pytest.fixture
def toy():
    """A model, a batch of training data and one of clean data, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch, meta = ((torch.randn(8, 5, dtype=torch.float64), torch.randint(0, 3, (8,))) for _ in range(2))
    return model, batch, meta


def clean_loss_after(model, batch, meta, weights, lr=LR):
    """The clean loss after a step of `torch.optim.SGD` with fixed weights of the examples."""
    moved = copy.deepcopy(model)
    optimizer = torch.optim.SGD(moved.parameters(), lr=lr)
    (weights * losses(moved(batch[0]), batch[1])).mean().backward()
    optimizer.step()
    return float(losses(moved(meta[0]), meta[1]).mean().detach())


def of_meta_weight_net(toy):
    """Its gradient for the bias of the output, and the central difference."""
    model, batch, meta = toy
    rule = rules.MetaWeightNet(losses, LR)
    rule.net.double()
    net = copy.deepcopy(rule.net)

    def f(shift):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            moved[2].bias += shift
            weights = moved(losses(model(batch[0]), batch[1])[:, None])[:, 0]
        return clean_loss_after(model, batch, meta, weights)

    rule(model, batch, meta)
    return float(rule.net[2].bias.grad), derivative(f)[0]


def test_meta_weight_net_has_the_gradient_of_the_clean_loss_after_a_virtual_step(toy):
    found, truth = of_meta_weight_net(toy)
    assert found == pytest.approx(truth, rel=1e-6)


def test_a_virtual_step_on_the_sum_is_rejected(toy, monkeypatch):
    """A wrong twin: the sum over the batch in place of the mean."""
    right = rules.after_virtual_step
    monkeypatch.setattr(
        rules, "after_virtual_step", lambda m, b, c, f, lr, w: right(m, b, c, f, lr * len(b[0]), w)
    )
    found, truth = of_meta_weight_net(toy)
    assert found != pytest.approx(truth, rel=0.1)


def test_meta_weight_net_weighs_by_its_net_and_moves_it_down_the_gradient(toy):
    model, batch, meta = toy
    rule = rules.MetaWeightNet(losses, LR)
    rule.net.double()
    before = copy.deepcopy(rule.net)
    weights = rule(model, batch, meta)
    assert torch.equal(weights, rule.of(losses(model(batch[0]), batch[1]).detach()).detach())
    change = rule.net[2].bias - before[2].bias
    assert torch.equal(change.detach().sign(), -rule.net[2].bias.grad.sign())


def test_reweight_has_weights_in_proportion_to_the_slopes_at_zero(toy):
    model, batch, meta = toy

    def along(i):
        def f(shift):
            eps = torch.zeros(8, dtype=torch.float64)
            eps[i] += shift
            return clean_loss_after(model, batch, meta, eps, lr=1.0)

        return f

    u = torch.tensor([max(-derivative(along(i))[0], 0.0) for i in range(8)])
    assert 0 < int((u > 0).sum()) < 8
    right = 8 * u / u.sum()
    found = rules.Reweight(losses)(model, batch, meta)
    assert found.tolist() == pytest.approx(right.tolist(), rel=1e-5, abs=1e-7)
    assert found.tolist() != pytest.approx((8 * u.abs().sqrt() / u.sqrt().sum()).tolist(), rel=0.1)


def test_reweight_drops_a_batch_that_would_only_harm(toy):
    model, (x, _), _ = toy
    logits = model(x[:1])
    found = rules.Reweight(losses)(model, (x[:1], logits.argmin(1)), (x[:1], logits.argmax(1)))
    assert found.tolist() == [0.0]


def test_small_loss_keeps_the_examples_with_the_smallest_losses():
    assert rules.small_loss(torch.tensor([0.5, 0.1, 2.0, 0.3]), 2).tolist() == [1, 3]
