"""Each update rule equals its torch optimiser over 100 random steps."""

import pytest
import torch

from midflight.errors import UnsupportedOptimizer
from midflight.updates import read_options, rule_for

CASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD maximize": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "maximize": True, "weight_decay": 0.1}),
    "SGD foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "SGD fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "Adam": (torch.optim.Adam, {}),
    "Adam options": (torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "Adam maximize": (torch.optim.Adam, {"maximize": True, "weight_decay": 0.1}),
    "Adam decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "Adam foreach": (torch.optim.Adam, {"foreach": True, "weight_decay": 0.1}),
    "Adam fused": (torch.optim.Adam, {"fused": True, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW amsgrad": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "AdamW fused": (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_rule_equals_torch_over_100_random_steps(name, dtype):
    make, options = CASES[name]
    ours = torch.randn(7, 5, dtype=dtype)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = make([theirs], **options)
    rule = rule_for(optimizer)
    state = {}
    for _ in range(100):
        grad = torch.randn(7, 5, dtype=dtype)
        theirs.grad = grad.clone()
        ours, state = rule.step(ours, grad, state, read_options(optimizer.param_groups[0]))
        optimizer.step()
        # rounding only: 100 steps of a few ulp each
        tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(ours, theirs.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_rule_goes_on_from_torchs_own_state(name):
    make, options = CASES[name]
    weight = torch.nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
    optimizer = make([weight], **options)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    grad = torch.randn_like(weight)
    expected, _ = rule_for(optimizer).step(
        weight.detach().clone(), grad, optimizer.state[weight], read_options(optimizer.param_groups[0])
    )
    weight.grad = grad
    optimizer.step()
    torch.testing.assert_close(expected, weight.detach(), rtol=1e-12, atol=1e-12)


def test_a_subclass_counts_as_another_optimizer():
    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(UnsupportedOptimizer, match="Mine"):
        rule_for(Mine([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
