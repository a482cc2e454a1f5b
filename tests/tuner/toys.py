"""A small model, its loop and a hyper-optimiser that only listens, for the tests of the tuner."""

import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf

_DATA = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 8, generator=_DATA), torch.randint(0, 3, (64,), generator=_DATA)


class Recorder(torch.optim.Optimizer):
    """Moves nothing and keeps the hypergradients that it is given."""

    def __init__(self, raws):
        super().__init__(raws, {"lr": 1.0})
        self.seen = []

    def step(self, closure=None):
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])


def space(dtype=None):
    return mf.Space(
        {
            "weight_decay": mf.Float(1e-5, 1e-1, log=True, init=1e-3),
            "noise": mf.Float(0.0, 0.8, init=0.3),
        },
        dtype=dtype,
    )


def network(space, *layers):
    layers = layers or (nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    return nn.Sequential(mf.nn.GaussianNoise(space["noise"]), *layers)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def tuner(model, optimizer, space, loss_fn=cross_entropy, **options):
    """One that takes a hyper-step at each step, judged at the next weights, unless told otherwise."""
    usual = {"train_loader": [(X, Y)], "valid_loader": [(X, Y)], "schedule": 1, "horizon": "step"}
    return mf.Tuner(model, optimizer, space, loss_fn, **{**usual, **options})


def train(model, optimizer, steps, batch=(X, Y), loss_fn=cross_entropy):
    """The loop, which knows nothing of a tuner."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()


def as_it_steps(optimizer, look):
    """Call `look(param_groups)` in the middle of each step, when tuned values stand in them."""
    inner = optimizer._init_group

    def spy(group, *args):
        if group is optimizer.param_groups[0]:
            look(optimizer.param_groups)
        return inner(group, *args)

    optimizer._init_group = spy


def weights(model):
    return [p.detach().clone() for p in model.parameters()]
