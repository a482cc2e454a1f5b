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
from midflight.tuner.hyperstep import HyperStep

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


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def training(noise=True, **options):
    """A function that takes one step; with options of a tuner one that is a hyper-step."""
    torch.manual_seed(0)
    space = mf.Space(weight_decay=mf.Float(1e-6, 1e-2, log=True), noise=mf.Float(0.0, 0.8, init=0.3))
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10)]
    model = nn.Sequential(*([mf.nn.GaussianNoise(space["noise"])] if noise else []), *layers)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-4, fused=True)
    if not noise:
        space = mf.Space(weight_decay=mf.Float(1e-6, 1e-2, log=True))
    space.requires_grad_(False)
    if options:
        mf.Tuner(model, optimizer, space, cross_entropy, [(X, Y)], schedule=1, **options)

    def step():
        optimizer.zero_grad()
        cross_entropy(model, (X, Y)).backward()
        optimizer.step()

    return step


def counts(step):
    for _ in range(5):  # at the 1st, 2nd, 4th and 8th hyper-step the tuner looks at all weights as well
        step()
    with FlopCounterMode(display=False) as flops:
        step()
    with Counted() as counted:
        step()
    return flops.get_total_flops(), counted.calls, counted.entries


BATCH, PART = [(X, Y)], [(X[:32], Y[:32])]
BOUNDS = {
    "one_step": ({"valid_loader": BATCH, "examples": 100, "horizon": "step"}, (4.44, 15.36, 12.85)),
    "one_step, parts": ({"valid_loader": PART, "examples": 32, "horizon": "step"}, (2.1, 15.36, 11.46)),
    "one_step_cheap": (
        {"valid_loader": BATCH, "examples": 100, "horizon": "step", "estimator": "one_step_cheap"},
        (4.44, 13.09, 9.58),
    ),
    "defaults": ({"valid_loader": BATCH}, (4.88, 14.03, 11.36)),
    "L2 alone": ({"valid_loader": BATCH, "noise": False, "horizon": "step"}, (2.0, 13.5, 14.1)),
}
"""Options -> hyper-step over plain step: operations of products, calls, entries written."""


@pytest.mark.parametrize("name", BOUNDS)
def test_a_hyper_step_does_no_more_than_it_did(name):
    options, bounds = BOUNDS[name]
    plain = counts(training(noise=options.get("noise", True)))
    hyper = counts(training(**options))
    ratios = [h / p for h, p in zip(hyper, plain, strict=True)]
    assert all(r <= 1.02 * b for r, b in zip(ratios, bounds, strict=True)), (name, ratios)


def test_a_hyper_step_that_validates_twice_is_found_out(monkeypatch):
    real = HyperStep._valid_gradient

    def twice(self, *arguments):
        real(self, *arguments)
        return real(self, *arguments)

    monkeypatch.setattr(HyperStep, "_valid_gradient", twice)
    with pytest.raises(AssertionError):
        test_a_hyper_step_does_no_more_than_it_did("defaults")
