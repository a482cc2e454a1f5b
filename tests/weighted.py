"""A loop whose losses have weights, for the tests of mixtures and of example weights."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from midflight.gradcheck.oracles import derivative


def per_example(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def mean_loss(model, batch):
    return per_example(model, *batch[:2]).mean()


class Dicts(Dataset):
    """Five examples that are dicts."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"x": torch.tensor([float(index)])}


class Keeper(torch.optim.Optimizer):
    """Moves nothing and keeps the last hypergradient."""

    def __init__(self, raws):
        super().__init__(raws, {"lr": 1.0})

    def step(self, closure=None):
        self.last = self.param_groups[0]["params"][0].grad.clone()


class WeightedLoop:
    """Steps on one batch (x, y, which), in float64, with clipping; `weights.loss` reads which.

    The space has the weights alone. `t2` is a batch (x, y).
    """

    def __init__(self, weights, space, batch, t2, optimizer, clip):
        self.weights, self.space, self.batch, self.t2, self.clip = weights, space, batch, t2, clip
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.optimizer = optimizer(self.model.parameters(), lr=1e-2)

    def loss(self, model, batch):
        x, y, which = batch
        return self.weights.loss(per_example(model, x, y), which)

    def step(self):
        self.optimizer.zero_grad()
        self.loss(self.model, self.batch).backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()

    def true_hypergradients(self, before):
        """Central differences of C2 after a step from `before`, a copy of (model, optimizer)."""
        raw = self.weights.raw.detach().clone()
        (name,) = self.space

        def after(i):
            def f(shift):
                moved = raw.clone()
                moved[i] += shift
                self.model, self.optimizer = copy.deepcopy(before)
                with self.space.seeing(self.space.values({name: moved})):
                    self.step()
                return float(mean_loss(self.model, self.t2).detach())

            return f

        return torch.tensor([derivative(after(i))[0] for i in range(len(raw))], dtype=torch.float64)
