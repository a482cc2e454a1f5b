"""Define other rules that weigh or rank examples with noisy labels, from their papers' equations.

A rule gives the weights of a batch, shape (B,), at each step, for a loss that is a mean over the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

Batch = tuple[Tensor, Tensor]
Losses = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) -> one loss per example, shape (B,)"""


def small_loss(losses: Tensor, keep: int) -> Tensor:
    """Return the indices of the examples with the smallest losses, shape (keep,) (Han et al. 2018, R(T))."""
    return losses.argsort(stable=True)[:keep]


def after_virtual_step(
    model: nn.Module, batch: Batch, meta: Batch, losses: Losses, lr: float, weigh: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the clean loss after a virtual step of SGD, and the batch's losses before it.

        theta' = theta - lr gradient of mean_i weigh(loss)_i loss_i;   mean of the clean losses at theta'

    Args:
        batch, meta: training data and clean data.
        weigh: losses, detached -> weights, both of shape (B,); the result is differentiable in what it reads.
    """
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    now = losses(functional_call(model, params, (batch[0],)), batch[1])
    loss = (weigh(now.detach()) * now).mean()
    found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    moved = {name: p - lr * g for (name, p), g in zip(params.items(), found, strict=True)}
    return losses(functional_call(model, moved, (meta[0],)), meta[1]).mean(), now.detach()


class MetaWeightNet:
    """Weights as a learned function V of the loss (Shu et al. 2019, Eq. 2 to 5): 1-100-1, ReLU, sigmoid.

    At each step Adam moves V down the gradient of the clean loss after a virtual step of SGD. `meta_lr` is
    that of the paper's code.

    Args:
        losses: of examples.
        lr: of the virtual step.
    """

    def __init__(self, losses: Losses, lr: float, meta_lr: float = 1e-3) -> None:
        self.net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=meta_lr)
        self.losses, self.lr = losses, lr

    def of(self, losses: Tensor) -> Tensor:
        """Return V of each loss, shape (B,)."""
        weights: Tensor = self.net(losses[:, None])[:, 0]
        return weights

    def __call__(self, model: nn.Module, batch: Batch, meta: Batch) -> Tensor:
        """Move V, and return the weights of the batch."""
        loss, now = after_virtual_step(model, batch, meta, self.losses, self.lr, self.of)
        params = list(self.net.parameters())
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        self.optimizer.step()
        return self.of(now).detach()


class Reweight:
    """Weights of a batch, anew at each step (Ren et al. 2018, Eq. 5 to 8).

        u_i = - d clean loss after a virtual step / d eps_i at eps = 0
        w_i = max(u_i, 0) / sum_j max(u_j, 0)

    Here w is multiplied by B, as the loss is a mean. The length of the virtual step does not count.
    """

    def __init__(self, losses: Losses) -> None:
        self.losses = losses

    def __call__(self, model: nn.Module, batch: Batch, meta: Batch) -> Tensor:
        eps = torch.zeros(len(batch[0]), dtype=batch[0].dtype, requires_grad=True)
        loss, _ = after_virtual_step(model, batch, meta, self.losses, 1.0, lambda _: eps)
        u = (-torch.autograd.grad(loss, eps)[0]).clamp(min=0)
        total = u.sum()
        return u * len(u) / torch.where(total > 0, total, 1)
