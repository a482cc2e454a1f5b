"""Estimators of the hypergradient, one file each, and the function that applies them.

An estimator is a function of a `Step`. A new one is one file here and one row in `ESTIMATORS`;
the row gives it every test and its line in `midflight check`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from midflight.errors import UnknownName
from midflight.graph import require_twice_differentiable
from midflight.hypergrad.central_difference import central_difference
from midflight.hypergrad.forward_over_reverse import forward_over_reverse
from midflight.hypergrad.implicit import implicit_cg, implicit_neumann
from midflight.hypergrad.one_step import one_step, one_step_cheap
from midflight.hypergrad.paper import paper
from midflight.hypergrad.t1t2 import t1t2
from midflight.hypergrad.unrolled import unrolled
from midflight.problem import Problem, Step, is_reevaluating
from midflight.trees import Tensors, detach, leaves
from midflight.updates import State

Estimator = Callable[[Step], Tensors]

ESTIMATORS: dict[str, Estimator] = {
    "one_step": one_step,
    "one_step_cheap": one_step_cheap,
    "forward_over_reverse": forward_over_reverse,
    "central_difference": central_difference,
    "unrolled": unrolled,
    "implicit_neumann": implicit_neumann,
    "implicit_cg": implicit_cg,
    "t1t2": t1t2,
    "paper": paper,
}


class Claim(NamedTuple):
    """What an estimator equals: the derivative of C2 after `steps` steps, within a relative tolerance."""

    steps: int
    tolerance: float


# 1e-6: the central difference it is held against is itself good to 1e-7 where the derivative is smallest
CLAIMS: dict[str, Claim] = {
    "one_step": Claim(1, 1e-6),
    "forward_over_reverse": Claim(1, 1e-6),
    "central_difference": Claim(1, 1e-4),
    "unrolled": Claim(5, 1e-6),
}
"""The estimators that claim to be a derivative; the others say in their docstring how far they are."""


def estimator_for(choice: str | Estimator) -> Estimator:
    """An estimator by name, or the one given; raises `UnknownName`."""
    if callable(choice):
        return choice
    if choice not in ESTIMATORS:
        raise UnknownName("estimator", choice, ESTIMATORS)
    return ESTIMATORS[choice]


def hypergradient(
    problem: Problem,
    params: Tensors,
    hparams: Tensors,
    state: Mapping[str, State],
    estimator: str | Estimator = "one_step",
) -> Tensors:
    """An estimate of dC2(U(theta, s, dC1~/dtheta, phi))/d hparams, with no side effect.

    Args:
        problem: the training step and the validation loss.
        params: weights, name -> tensor; not modified.
        hparams: what is tuned, name -> tensor (the raw coordinates of a `Space`, say).
        state: optimiser state before the step, weight name -> state ({} before the first).
        estimator: a name from `ESTIMATORS` or a function of a `Step`.

    Returns:
        name -> tensor shaped like hparams; units: validation loss per unit of hparams.

    Raises:
        UnknownName: there is no such estimator.
        UnreachedHyperparameter: an entry influences neither the training gradient nor the update.
        NotTwiceDifferentiable: the training loss holds an operation that is differentiable once only.
    """
    estimate = estimator_for(estimator)
    params, hparams = leaves(params), leaves(hparams)
    recorded = not is_reevaluating(estimate)
    grads = problem.train_grads(params, hparams, create_graph=recorded)
    require_twice_differentiable(grads.values())

    return estimate(
        Step(
            params=detach(params),
            grads=detach(grads),
            grads_with_graph={name: g for name, g in grads.items() if g.requires_grad},
            state=state,
            updates=problem.updates(hparams),
            hparams=hparams,
            values=hparams,
            valid_grad=lambda where: problem.valid_grads(where()),
            train_loss=problem.train_loss,
        )
    )


__all__ = ["CLAIMS", "ESTIMATORS", "Estimator", "estimator_for", "hypergradient"]
