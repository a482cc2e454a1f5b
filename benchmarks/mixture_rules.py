"""Define the rules of other methods that set the weights of data sources, from their papers' equations.

Each rule has `weights`, shape (k,), and moves them in `update`. The gradients of the sources and of the
target come from separate batches, as in the papers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Losses = Callable[[nn.Module], tuple[Tensor, Tensor]]
"""model -> (mean loss of a batch of each source, shape (k,); loss of a batch of the target, shape ())"""


class Fixed:
    """Weights that do not move."""

    every = 0

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights / weights.sum()


class FastMix:
    """Weights of the losses by gradient descent on their logits (Tan et al. 2026, FastMix).

    The hypergradient is that of a step of gradient descent on the output layer: minus the inner product of
    the layer's gradients on the target and on the source. The optimiser of the weights is left out. Adam
    moves the logits.
    """

    every = 10

    def __init__(self, sources: int, lr: float) -> None:
        self.logits = torch.zeros(sources, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=lr)

    @property
    def weights(self) -> Tensor:
        return self.logits.detach().softmax(0)

    def update(self, model: nn.Module, losses: Losses, layer: Sequence[nn.Parameter]) -> None:
        """Take a step on the logits, given the parameters of the output layer."""
        of_weights = -alignments(losses(model), layer).to(self.logits)
        (self.logits.grad,) = torch.autograd.grad(self.logits.softmax(0) @ of_weights, self.logits)
        self.optimizer.step()


class Alignment:
    """Weights by the alignment of gradients, in steps of mirror descent (Fan et al. 2024, DGA, Algorithm 1).

    a_i = <gradient on source i, gradient on the target>;  b ~ w exp(lr a);  w <- (1 - mean) w + mean b.
    The inner products are over all weights of the model.
    """

    every = 10

    def __init__(self, sources: int, lr: float, mean: float = 0.1) -> None:
        self.weights = torch.full((sources,), 1 / sources)
        self.lr, self.mean = lr, mean

    def update(self, model: nn.Module, losses: Losses, layer: Sequence[nn.Parameter]) -> None:
        a = alignments(losses(model), list(model.parameters()))
        moved = (self.weights.log() + self.lr * a).softmax(0)
        self.weights = (1 - self.mean) * self.weights + self.mean * moved


class DoReMi:
    """Weights by group distributionally robust optimisation (Xie et al. 2023, DoReMi, Algorithm 1).

    w ~ w exp(lr excess), with excess_i = max(loss of the proxy - loss of the reference on source i, 0), then
    mixed with `smoothing` of the equal weights. The result is the mean over the proxy's training. It knows
    no target.
    """

    every = 10

    def __init__(self, sources: int, reference: nn.Module, lr: float = 1.0, smoothing: float = 1e-3) -> None:
        self.weights = torch.full((sources,), 1 / sources)
        self.reference, self.lr, self.smoothing = reference, lr, smoothing
        self.all: list[Tensor] = []

    def update(self, model: nn.Module, losses: Losses, layer: Sequence[nn.Parameter]) -> None:
        state = torch.get_rng_state()
        with torch.no_grad():
            own = losses(model)[0]
            after = torch.get_rng_state()
            torch.set_rng_state(state)  # the same batches
            excess = (own - losses(self.reference)[0]).clamp(min=0)
        torch.set_rng_state(after)
        moved = (self.weights.log() + self.lr * excess).softmax(0)
        self.weights = (1 - self.smoothing) * moved + self.smoothing / len(moved)
        self.all.append(self.weights)

    @property
    def mean(self) -> Tensor:
        return torch.stack(self.all).mean(0)


def alignments(losses: tuple[Tensor, Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return the inner products of the target's gradient with that of each source, shape (k,)."""
    sources, target = losses
    of_target = torch.autograd.grad(target, params)
    found = [torch.autograd.grad(loss, params, retain_graph=True) for loss in sources]
    return torch.stack([sum((a * b).sum() for a, b in zip(g, of_target, strict=True)) for g in found])
