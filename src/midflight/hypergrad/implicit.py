"""Differentiate the update implicitly, for hyperparameters whose effect is delayed.

At a fixed point of training, theta = U(theta, h) with the optimiser's state held constant. Then

    dC2/dh = u . dU/dh,   (I - dU/dtheta)^T u = dC2/dtheta     (Lorraine et al. 2020; for the options
                                                                of the update rule Clarke et al. 2022)

A Neumann series solves this system if U is a contraction; each term accounts for one more step. Conjugate
gradients on the normal equations need neither a contraction nor symmetry.
"""

from dataclasses import dataclass
from typing import ClassVar

from midflight._tensors import Tensors, add_scaled
from midflight.hypergrad.base import Estimator
from midflight.hypergrad.linearised import LinearisedStep
from midflight.hypergrad.problem import Step
from midflight.hypergrad.solvers import conjugate_gradient, neumann


@dataclass(frozen=True)
class ImplicitNeumann(Estimator):
    """Estimate by a truncated Neumann series; one term gives `one_step`.

    Exact as terms -> infinity at a fixed point of a contracting update. Costs one validation pass and
    `terms` double backwards. Ignores momentum beyond one step, because the state is held constant.

    Args:
        terms: number of terms of the series.
    """

    terms: int = 10
    needs_train_loss: ClassVar = True

    def __call__(self, step: Step, v: Tensors) -> Tensors:
        linear = LinearisedStep(step)
        return linear.hypergradient(neumann(linear.transposed, v, terms=self.terms))


@dataclass(frozen=True)
class ImplicitCG(Estimator):
    """Estimate by conjugate gradients on A^T A u = A^T v, A = (I - dU/dtheta)^T.

    Exact after as many iterations as there are weights, at a fixed point where A is invertible. Costs one
    validation pass. Each iteration costs one product with dU/dtheta and one with its transpose.

    Args:
        iterations: number of iterations of conjugate gradients.
        damping: multiple of I added to A^T A; must be > 0 if A is singular (more weights than examples).
    """

    iterations: int = 10
    damping: float = 0.0
    needs_train_loss: ClassVar = True

    def __call__(self, step: Step, v: Tensors) -> Tensors:
        linear = LinearisedStep(step)

        def a(u: Tensors) -> Tensors:
            return add_scaled(u, linear.transposed(u), -1.0)

        def a_transposed(u: Tensors) -> Tensors:
            return add_scaled(u, linear.forward(u), -1.0)

        def normal(u: Tensors) -> Tensors:
            return add_scaled(a_transposed(a(u)), u, self.damping)

        return linear.hypergradient(conjugate_gradient(normal, a_transposed(v), iterations=self.iterations))


implicit_neumann = ImplicitNeumann()
implicit_cg = ImplicitCG()
