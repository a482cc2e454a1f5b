"""Compute reference hypergradients: central differences of the validation loss after a step, in float64."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from midflight._tensors import Tensors, leaves
from midflight.hypergrad.problem import Problem
from midflight.updates import State


def stepped(
    problem: Problem, params: Tensors, hparams: Tensors, state: Mapping[str, State], steps: int
) -> tuple[Tensors, dict[str, State]]:
    """Return the weights and the optimiser's state after `steps` optimiser steps."""
    state = dict(state)
    for _ in range(steps):
        grads = problem.train_grads(leaves(params), hparams)
        with torch.no_grad():
            new = {
                n: u.rule.step(params[n], grads[n], state[n], u.options)
                for n, u in problem.updates(hparams).items()
            }
        params = {n: param for n, (param, _) in new.items()}
        state = {n: s for n, (_, s) in new.items()}
    return params, state


def loss_after(
    problem: Problem, params: Tensors, hparams: Tensors, state: Mapping[str, State], steps: int = 1
) -> float:
    """Return the validation loss after `steps` optimiser steps; estimators differentiate this function."""
    params, _ = stepped(problem, params, hparams, state, steps)
    with torch.no_grad():
        return float(problem.valid_loss(params))


STEP_SIZES = (1e-5, 1e-6, 1e-4, 1e-7, 1e-3, 1e-8)  # the others are tried only if the first two disagree
AGREEMENT = 1e-7  # relative uncertainty at which no further step size is tried
ROUNDING = 2e-16  # of a loss in float64, relative


def derivative(f: Callable[[float], float]) -> tuple[float, float]:
    """Return f'(0) by central differences of order h^4, and its uncertainty.

    Rounding, with an error of about 1e-16 |f| / h, needs a large h. Kinks, such as those of ReLU or amsgrad's
    maximum, need a small h. So several h are tried. The uncertainty of a value is its distance from the value
    at the next smaller h, plus its rounding error. The value with the smallest uncertainty is returned.
    """
    size = abs(f(0.0))
    found: dict[float, float] = {}
    best = (math.inf, 0.0)
    for h in STEP_SIZES:
        found[h] = (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
        best = min(
            ((abs(found[a] - found[b]) + ROUNDING * size / b, found[b]) for a, b in pairwise(sorted(found))),
            default=best,
        )
        if best[0] <= AGREEMENT * abs(best[1]):
            break
    uncertainty, value = best
    return value, uncertainty


def central_difference(
    problem: Problem, params: Tensors, hparams: Tensors, state: Mapping[str, State], steps: int = 1
) -> Tensors:
    """Differentiate `loss_after` by `derivative`, entry by entry; needs float64.

    Returns:
        name -> tensor shaped like hparams.
    """
    result = {}
    for name, x in hparams.items():
        found = torch.zeros_like(x)
        for i in range(x.numel()):
            found.view(-1)[i], _ = derivative(along(problem, params, hparams, state, name, i, steps))
        result[name] = found
    return result


def along(
    problem: Problem,
    params: Tensors,
    hparams: Tensors,
    state: Mapping[str, State],
    name: str,
    entry: int,
    steps: int = 1,
) -> Callable[[float], float]:
    """Return `loss_after` as a function of a shift of one entry of one hyperparameter."""

    def f(shift: float) -> float:
        moved = hparams[name].detach().clone()
        moved.view(-1)[entry] += shift
        return loss_after(problem, params, {**hparams, name: moved}, state, steps)

    return f


@dataclass(frozen=True)
class Comparison:
    """Measure the distance of estimates from the truth, with all entries of all estimates as one vector.

    Attributes:
        relative_error: |estimate - truth| / |truth|.
        cosine: cosine of the angle between the two vectors.
        scale: |estimate| / |truth|.
    """

    relative_error: float
    cosine: float
    scale: float


def compare(estimates: Sequence[Tensors], truths: Sequence[Tensors]) -> Comparison:
    """Return the distance of estimates, one per training state, from the truth; infinite if not finite."""
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
        relative_error=_ratio(float((a - b).norm()), true_size),
        cosine=float(a @ b) / (size * true_size) if size and true_size else 0.0,
        scale=_ratio(size, true_size),
    )


def _ratio(a: float, b: float) -> float:
    """Return a / b, where 0 / 0 is 0 and any other a / 0 is infinite."""
    return a / b if b else math.inf if a else 0.0
