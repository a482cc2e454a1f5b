"""What a hyper-step does, counted instead of timed: any slower than before is caught on any machine.

Floating-point operations of matrix products, calls of operators, and entries that they write, over
those of one plain training step of the same network. The bounds are what was measured, and 2 %.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import midflight as mf

X, Y = torch.rand(100, 784), torch.randint(0, 10, (100,))


class Counted(TorchDispatchMode):
    """Calls of operators that compute, and the entries they write."""

    def __init__(self):
        super().__init__()
        self.calls = self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "detach" not in str(func) and "empty" not in str(func):
            self.calls += 1
            outs = out if isinstance(out, (tuple, list)) else [out]
            self.entries += sum(t.numel() for t in outs if isinstance(t, torch.Tensor))
        return out


def training(noise=True, **options):
    """A function that takes one step; with options of a tuner one that is a hyper-step."""
    torch.manual_seed(0)
    space = mf.Space(weight_decay=mf.Float(1e-6, 1e-2, log=True), noise=mf.Float(0.0, 0.8, init=0.3))
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10)]
    model = nn.Sequential(*([mf.nn.GaussianNoise(space["noise"])] if noise else []), *layers)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-4, fused=True)
    if not noise:
        space = mf.Space(weight_decay=mf.Float(1e-6, 1e-2, log=True))
    probe = options.pop("probe", None)
    few = (lambda: F.cross_entropy(model(X[:probe]), Y[:probe])) if probe else None
    tuner = None
    if options:
        tuner = mf.Tuner(
            model, optimizer, space, validate=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            bind=["weight_decay"], every=1, **options,
        )  # fmt: skip
    else:
        space.requires_grad_(False)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        tuner.backward(loss, few) if tuner else loss.backward()
        optimizer.step()

    return step


def counts(step):
    for _ in range(3):
        step()
    with FlopCounterMode(display=False) as flops:
        step()
    with Counted() as counted:
        step()
    return flops.get_total_flops(), counted.calls, counted.entries


BATCH, PART = [(X, Y)], [(X[:32], Y[:32])]
BOUNDS = {
    "one_step": ({"valid_loader": BATCH}, (3.44, 10.95, 11.44)),
    "one_step, parts": ({"valid_loader": PART, "probe": 32}, (1.96, 11.5, 10.61)),
    "one_step_cheap": ({"valid_loader": BATCH, "estimator": "one_step_cheap"}, (3.44, 8.68, 8.17)),
    "foresight": ({"valid_loader": BATCH, "train_loader": BATCH}, (4.32, 9.56, 9.28)),
    "L2 alone": ({"valid_loader": BATCH, "noise": False}, (2.0, 11.43, 14.1)),
}
"""Options -> hyper-step over plain step: operations of products, calls, entries written."""


@pytest.mark.parametrize("name", BOUNDS)
def test_a_hyper_step_does_no_more_than_it_did(name):
    options, bounds = BOUNDS[name]
    plain = counts(training(noise=options.get("noise", True)))
    hyper = counts(training(**options))
    ratios = [h / p for h, p in zip(hyper, plain, strict=True)]
    assert all(r <= 1.02 * b for r, b in zip(ratios, bounds, strict=True)), (name, ratios)
