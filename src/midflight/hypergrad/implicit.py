"""Implicit differentiation of the update, for hyperparameters whose effect comes late.

Where training has settled, theta = U(theta, h) with the optimiser's state held as it is, and

    dC2/dh = u . dU/dh,   (I - dU/dtheta)^T u = dC2/dtheta     (Lorraine et al. 2020; for the options
                                                                of the update rule Clarke et al. 2022)

The system is solved by a Neumann series, each term of which is one more step looked back, or by
conjugate gradients on the normal equations, which need neither symmetry nor a contraction.
"""

import torch

from midflight.problem import Step, gradient, reevaluates
from midflight.solvers import conjugate_gradient, neumann
from midflight.trees import Tensors, add_scaled, detach, leaves


@reevaluates
def implicit_neumann(step: Step, terms: int = 10) -> Tensors:
    """The Neumann series cut after `terms` terms; 1 is `one_step`.

    Exact as terms -> infinity at a fixed point of a contracting update. Costs one validation pass, one
    double backward and `terms - 1` products with dU/dtheta, each a double backward. Momentum counts as
    in one step, for the state is held. Needs the loss as a function.
    """
    settled = _Settled(step)
    u = neumann(settled.transposed, settled.v, terms=terms)
    return settled.hypergradient(u)


@reevaluates
def implicit_cg(step: Step, iterations: int = 10, damping: float = 0.0) -> Tensors:
    """Conjugate gradients on A^T A u = A^T v, A = (I - dU/dtheta)^T.

    Exact after as many iterations as there are weights, at a fixed point where A is invertible. Costs
    one validation pass and per iteration one product with dU/dtheta and one with its transpose. Needs
    the loss as a function.

    Args:
        step: the optimiser step.
        iterations: of conjugate gradients.
        damping: added to A^T A; > 0 where A is singular, as with more weights than data.
    """
    settled = _Settled(step)

    def a(u: Tensors) -> Tensors:
        return add_scaled(u, settled.transposed(u), -1.0)

    def a_transposed(u: Tensors) -> Tensors:
        return add_scaled(u, settled.forward(u), -1.0)

    def normal(u: Tensors) -> Tensors:
        return add_scaled(a_transposed(a(u)), u, damping)

    return settled.hypergradient(conjugate_gradient(normal, a_transposed(settled.v), iterations=iterations))


class _Settled:
    """theta' = U(theta, h) as a differentiable function, and products with its Jacobian."""

    def __init__(self, step: Step) -> None:
        train_loss = step.training_loss()
        self._step = step
        self._params = leaves(step.params)
        grads = gradient(train_loss(self._params, step.values), self._params, create_graph=True)
        self._new = {
            name: u.rule.step(self._params[name], grads[name], step.state[name], u.options)[0]
            for name, u in step.updates.items()
        }
        self.v = step.valid_grad(lambda: detach(self._new))

    def transposed(self, u: Tensors) -> Tensors:
        """(dU/dtheta)^T u"""
        return self._vjp(u, create_graph=False)

    def forward(self, x: Tensors) -> Tensors:
        """(dU/dtheta) x, as the derivative of z -> (dU/dtheta)^T z, which is linear."""
        z = leaves({name: torch.zeros_like(p) for name, p in self._new.items()})
        pulled = self._vjp(z, create_graph=True)
        found = torch.autograd.grad(
            list(pulled.values()), list(z.values()), [x[name] for name in pulled], materialize_grads=True
        )
        return dict(zip(z, found, strict=True))

    def hypergradient(self, u: Tensors) -> Tensors:
        """u . dU/dh"""
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
