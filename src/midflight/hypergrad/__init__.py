"""Estimators of the hypergradient, one file each, and the function that applies them.

An estimator is a function of a `Step`. A new one is one file here and one row in `ESTIMATORS`;
the row gives it every test and its line in `midflight check`.
"""

from collections.abc import Callable, Mapping

from midflight.errors import UnknownName
from midflight.hypergrad.one_step import one_step, one_step_cheap
from midflight.hypergrad.paper import paper
from midflight.hypergrad.t1t2 import t1t2
from midflight.problem import Problem, Step
from midflight.trees import Tensors, detach, leaves
from midflight.updates import State

Estimator = Callable[[Step], Tensors]

ESTIMATORS: dict[str, Estimator] = {
    "one_step": one_step,
    "one_step_cheap": one_step_cheap,
    "t1t2": t1t2,
    "paper": paper,
}

EXACT = frozenset({"one_step"})
"""The estimators that equal the derivative of the validation loss after one step."""


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
    """
    estimate = estimator_for(estimator)
    params, hparams = leaves(params), leaves(hparams)
    grads = problem.train_grads(params, hparams, create_graph=True)

    return estimate(
        Step(
            params=detach(params),
            grads=detach(grads),
            grads_with_graph={name: g for name, g in grads.items() if g.requires_grad},
            state=state,
            updates=problem.updates(hparams),
            hparams=hparams,
            values=hparams,
            valid_grad=problem.valid_grads,
        )
    )


__all__ = ["ESTIMATORS", "EXACT", "Estimator", "estimator_for", "hypergradient"]
