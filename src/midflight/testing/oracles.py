"""The truth about a hypergradient: a central difference of the one-step map, in float64."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from midflight.problem import Problem
from midflight.trees import Tensors
from midflight.updates import State


def loss_after(
    problem: Problem, params: Tensors, hparams: Tensors, state: Mapping[str, State], steps: int = 1
) -> float:
    """C2 after some steps of U: the function that an estimator differentiates."""
    state = dict(state)
    for _ in range(steps):
        grads = problem.train_grads({n: p.detach().requires_grad_() for n, p in params.items()}, hparams)
        with torch.no_grad():
            new = {
                n: u.rule.step(params[n], grads[n], state[n], u.options)
                for n, u in problem.updates(hparams).items()
            }
        params = {n: param for n, (param, _) in new.items()}
        state = {n: s for n, (_, s) in new.items()}
    with torch.no_grad():
        return float(problem.valid_loss(params))


def central_difference(
    problem: Problem,
    params: Tensors,
    hparams: Tensors,
    state: Mapping[str, State],
    steps: int = 1,
    h: float = 1e-5,
) -> Tensors:
    """The derivative of `loss_after`, by differences of order h^4, entry by entry.

    Needs float64 and smooth activations: a ReLU kink between two points spoils the difference,
    not the gradient. Rounding leaves about 1e-16 |f| / h = 1e-11 and the stencil less; a larger h
    would step over the kinks that amsgrad's maximum has.

    Returns:
        name -> tensor shaped like hparams.
    """
    result = {}
    for name, x in hparams.items():
        derivative = torch.zeros_like(x)
        for i in range(x.numel()):

            def f(shift: float, name: str = name, x: torch.Tensor = x, i: int = i) -> float:
                moved = x.detach().clone()
                moved.view(-1)[i] += shift
                return loss_after(problem, params, {**hparams, name: moved}, state, steps)

            derivative.view(-1)[i] = (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
        result[name] = derivative
    return result


@dataclass(frozen=True)
class Comparison:
    """How far estimates are from the truth, all entries of all of them taken as one vector.

    Attributes:
        relative_error: |estimate - truth| / |truth|.
        cosine: of the angle between the two vectors.
        scale: |estimate| / |truth|.
    """

    relative_error: float
    cosine: float
    scale: float


def compare(estimates: Sequence[Tensors], truths: Sequence[Tensors]) -> Comparison:
    """Distance of estimates, one per state of training, from the truth; infinite if not finite."""
    a, b = (
        torch.cat(
            [tree[name].reshape(-1) for tree, truth in zip(trees, truths, strict=True) for name in truth]
        )
        for trees in (estimates, truths)
    )
    if not bool(torch.isfinite(a).all()):
        return Comparison(math.inf, math.nan, math.inf)
    size = float(a.norm())
    true_size = float(b.norm())
    return Comparison(
        relative_error=float((a - b).norm()) / true_size,
        cosine=float(a @ b) / (size * true_size) if size else 0.0,
        scale=size / true_size,
    )
