"""Define the rules of other methods that set the weights of loss terms, from their papers' equations.

`loss(terms)` is what the loop minimises. `update` moves the weights after the backward pass of this loss, and
before the optimiser's step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Fixed:
    """Weights that do not move."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = torch.tensor(weights)

    def loss(self, terms: Tensor) -> Tensor:
        return self.weights.to(terms) @ terms

    def update(self, terms: Tensor, shared: Sequence[Tensor]) -> None:
        return


class Uncertainty:
    """Weights by each task's noise, learned with the model (Kendall et al. 2018, Eq. 7 and 10).

        loss = sum_i c_i exp(-s_i) L_i + s_i / 2,   s_i = log sigma_i^2,   c_i = 1/2 for a squared error,
                                                                           c_i = 1 for a cross-entropy

    Args:
        squared: whether the loss of each task is a squared error.
        lr: step of Adam on s.
    """

    def __init__(self, squared: Sequence[bool], lr: float) -> None:
        self.factors = torch.tensor([0.5 if is_squared else 1.0 for is_squared in squared])
        self.s = torch.zeros(len(squared), requires_grad=True)
        self.optimizer = torch.optim.Adam([self.s], lr=lr)

    @property
    def weights(self) -> Tensor:
        return self.factors * (-self.s.detach()).exp()

    def loss(self, terms: Tensor) -> Tensor:
        return (self.factors * (-self.s).exp() * terms + self.s / 2).sum()

    def update(self, terms: Tensor, shared: Sequence[Tensor]) -> None:
        """Take a step on s by the gradient of the last backward pass."""
        self.optimizer.step()
        self.optimizer.zero_grad()


class GradNorm:
    """Weights that even out the gradients of the tasks (Chen et al. 2018, Algorithm 1).

        minimise sum_i |G_i - mean(G) r_i^alpha| by w, the second term held fixed
        G_i = w_i |gradient of L_i by the last shared layer|
        r_i = (L_i / L_i at the first step) / mean over the tasks

    Afterwards w is scaled to the sum k. Weights stay above LEAST; a step of Adam can make one negative.

    Args:
        tasks: their number k.
        alpha: strength of the pull towards equal training rates.
        lr: step of Adam on w.
    """

    LEAST = 1e-3

    def __init__(self, tasks: int, alpha: float, lr: float) -> None:
        self.weights = torch.ones(tasks)
        self.alpha = alpha
        self.first: Tensor | None = None
        self.optimizer = torch.optim.Adam([self.weights], lr=lr)

    def loss(self, terms: Tensor) -> Tensor:
        return self.weights.to(terms) @ terms

    def slopes(self, terms: Tensor, shared: Sequence[Tensor]) -> Tensor:
        """Return the gradient by w, shape (k,)."""
        grads = [torch.autograd.grad(term, shared, retain_graph=True) for term in terms]
        norms = torch.stack([torch.cat([g.flatten() for g in grad]).norm() for grad in grads])
        terms = terms.detach()
        self.first = terms if self.first is None else self.first
        rates = terms / self.first
        own = self.weights.to(terms) * norms
        target = own.mean() * (rates / rates.mean()) ** self.alpha
        return (own - target).sign() * norms

    @torch.no_grad()
    def update(self, terms: Tensor, shared: Sequence[Tensor]) -> None:
        """Take a step on w, given the parameters of the last shared layer."""
        with torch.enable_grad():
            self.weights.grad = self.slopes(terms, shared).to(self.weights)
        self.optimizer.step()
        self.weights.clamp_(min=self.LEAST)
        self.weights.mul_(len(self.weights) / self.weights.sum())
