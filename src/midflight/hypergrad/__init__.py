"""Estimate the hypergradient, dC2(theta')/d(lambda, phi); each estimator has its own file.

`problem` defines the symbols and `base` the interface. An estimator is one file and one row of `ESTIMATORS`.
`midflight check --all` then reports its errors. An estimator with a row of `CLAIMS` must also equal a central
difference, or the tests fail.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from midflight._tensors import Tensors, detach, leaves
from midflight.errors import UnknownName
from midflight.hypergrad.base import Estimator
from midflight.hypergrad.implicit import ImplicitNeumann, implicit_neumann
from midflight.hypergrad.mixed import mixed_partial_of
from midflight.hypergrad.one_step import central_difference, forward_over_reverse, one_step, one_step_cheap
from midflight.hypergrad.paper import paper
from midflight.hypergrad.problem import Dependence, Problem, Step, require_reached
from midflight.hypergrad.t1t2 import t1t2
from midflight.hypergrad.unrolled import Unrolled, unrolled
from midflight.updates import State

ESTIMATORS: dict[str, Estimator] = {
    "one_step": one_step,
    "one_step_cheap": one_step_cheap,
    "forward_over_reverse": forward_over_reverse,
    "central_difference": central_difference,
    "unrolled": unrolled,
    "implicit_neumann": implicit_neumann,
    "t1t2": t1t2,
    "paper": paper,
}


class Claim(NamedTuple):
    """Claim that an estimator equals the derivative of C2 after `steps` steps, to a relative tolerance."""

    steps: int
    tolerance: float


# 1e-6: the central difference to compare with is accurate to 1e-7 where the derivative is smallest
CLAIMS: dict[str, Claim] = {
    "one_step": Claim(1, 1e-6),
    "forward_over_reverse": Claim(1, 1e-6),
    "central_difference": Claim(1, 1e-4),
    "unrolled": Claim(5, 1e-6),
}
"""Estimators that claim to equal a derivative. The docstrings of the others state their errors."""


def estimator_for(choice: str | Estimator) -> Estimator:
    """Return the estimator of this name, or `choice` if it is an estimator; raise `UnknownName` otherwise."""
    if isinstance(choice, Estimator):
        return choice
    if not isinstance(choice, str) or choice not in ESTIMATORS:
        raise UnknownName("estimator", choice, [*ESTIMATORS, "an object of a subclass of Estimator"])
    return ESTIMATORS[choice]


def hypergradient(
    problem: Problem,
    params: Tensors,
    hparams: Tensors,
    state: Mapping[str, State],
    estimator: str | Estimator = "one_step",
) -> Tensors:
    """Estimate dC2(U(theta, s, dC1~/dtheta, phi))/d hparams, without side effects.

    Args:
        problem: the training step and the validation loss.
        params: weights, name -> tensor; not modified.
        hparams: the tuned hyperparameters, name -> tensor, such as the raw coordinates of a `Space`.
        state: optimiser state before the step, weight name -> state ({} before the first).
        estimator: a name from `ESTIMATORS` or an `Estimator`.

    Returns:
        name -> tensor shaped like hparams; units: validation loss per unit of hparams.

    Raises:
        UnknownName: there is no such estimator.
        UnreachedHyperparameter: an entry influences neither the training gradient nor the update.
        NotTwiceDifferentiable: an operation of the training loss is differentiable only once.
        NoForwardMode: the estimator needs forward mode, but an operation of the training loss lacks it.
    """
    estimate = estimator_for(estimator)
    params, hparams = leaves(params), leaves(hparams)
    method = estimate.mixed or "double backward"
    mixed_partial = partial(mixed_partial_of, method, problem.train_loss, detach(params), hparams)
    step = Step(
        params=detach(params),
        grads=detach(problem.train_grads(params, hparams)),
        state=state,
        updates=problem.updates(hparams),
        hparams=hparams,
        values=hparams,
        dependence=partial(Dependence, mixed_partial),
        train_loss=problem.train_loss,
    )
    return require_reached(estimate(step, problem.valid_grads(estimate.at(step))), hparams)


__all__ = [
    "CLAIMS",
    "ESTIMATORS",
    "Estimator",
    "ImplicitNeumann",
    "Problem",
    "Step",
    "Unrolled",
    "estimator_for",
    "hypergradient",
]
