"""Differentiate the update implicitly, for hyperparameters whose effect is delayed.

At a fixed point of training, theta = U(theta, h) with the optimiser's state held constant. Then

    dC2/dh = u . dU/dh,   (I - dU/dtheta)^T u = dC2/dtheta     (Lorraine et al. 2020; for the options
                                                                of the update rule Clarke et al. 2022)

A Neumann series solves this system if U is a contraction; each term accounts for one more step. Conjugate
gradients on the normal equations need neither a contraction nor symmetry.
"""

from dataclasses import dataclass

import torch

from midflight._tensors import Tensors, add_scaled, leaves
from midflight.hypergrad.mixed import train_loss_of
from midflight.hypergrad.problem import Step, gradient
from midflight.hypergrad.solvers import conjugate_gradient, neumann


@dataclass(frozen=True)
class ImplicitNeumann:
    """Estimate by a truncated Neumann series; one term gives `one_step`.

    Exact as terms -> infinity at a fixed point of a contracting update. Costs one validation pass and
    `terms` double backwards. Ignores momentum beyond one step, because the state is held constant.

    Args:
        terms: number of terms of the series.
    """

    terms: int = 10
    mixed: str | None = None
    needs_train_loss: bool = True

    def at(self, step: Step) -> Tensors:
        return step.next_params()

    def __call__(self, step: Step, v: Tensors) -> Tensors:
        settled = _Settled(step)
        return settled.hypergradient(neumann(settled.transposed, v, terms=self.terms))


@dataclass(frozen=True)
class ImplicitCG:
    """Estimate by conjugate gradients on A^T A u = A^T v, A = (I - dU/dtheta)^T.

    Exact after as many iterations as there are weights, at a fixed point where A is invertible. Costs one
    validation pass. Each iteration costs one product with dU/dtheta and one with its transpose.

    Args:
        iterations: number of iterations of conjugate gradients.
        damping: multiple of I added to A^T A; must be > 0 if A is singular (more weights than examples).
    """

    iterations: int = 10
    damping: float = 0.0
    mixed: str | None = None
    needs_train_loss: bool = True

    def at(self, step: Step) -> Tensors:
        return step.next_params()

    def __call__(self, step: Step, v: Tensors) -> Tensors:
        settled = _Settled(step)

        def a(u: Tensors) -> Tensors:
            return add_scaled(u, settled.transposed(u), -1.0)

        def a_transposed(u: Tensors) -> Tensors:
            return add_scaled(u, settled.forward(u), -1.0)

        def normal(u: Tensors) -> Tensors:
            return add_scaled(a_transposed(a(u)), u, self.damping)

        return settled.hypergradient(conjugate_gradient(normal, a_transposed(v), iterations=self.iterations))


class _Settled:
    """Record theta' = U(theta, h) with its graph, and multiply by its Jacobian."""

    def __init__(self, step: Step) -> None:
        train_loss = train_loss_of(step)
        self._step = step
        self._params = leaves(step.params)
        grads = gradient(train_loss(self._params, step.values), self._params, create_graph=True)
        self._new = {
            name: u.rule.step(self._params[name], grads[name], step.state[name], u.options)[0]
            for name, u in step.updates.items()
        }

    def transposed(self, u: Tensors) -> Tensors:
        """Return (dU/dtheta)^T u."""
        return self._vjp(u, create_graph=False)

    def forward(self, x: Tensors) -> Tensors:
        """Return (dU/dtheta) x, as the derivative of <x, (dU/dtheta)^T z> with respect to z."""
        z = leaves({name: torch.zeros_like(p) for name, p in self._new.items()})
        pulled = self._vjp(z, create_graph=True)
        found = torch.autograd.grad(
            list(pulled.values()), list(z.values()), [x[name] for name in pulled], materialize_grads=True
        )
        return dict(zip(z, found, strict=True))

    def hypergradient(self, u: Tensors) -> Tensors:
        """Return u . dU/dh."""
        return self._step.chain([(self._new[name], u[name]) for name in self._new])

    def _vjp(self, u: Tensors, *, create_graph: bool) -> Tensors:
        found = torch.autograd.grad(
            list(self._new.values()),
            list(self._params.values()),
            [u[name] for name in self._new],
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
        return dict(zip(self._params, found, strict=True))


implicit_neumann = ImplicitNeumann()
implicit_cg = ImplicitCG()
