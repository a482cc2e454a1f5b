"""Record one optimiser step with its graph, for estimators that differentiate the step themselves."""

import torch

from midflight._tensors import Tensors, leaves
from midflight.hypergrad.mixed import train_loss_of
from midflight.hypergrad.problem import Step, gradient


class LinearisedStep:
    """Record theta' = U(theta, h) with its graph, and multiply by dU/dtheta and dU/dh.

    The optimiser's state is held constant.

    Raises:
        UnsupportedSetting: the step has no training loss, or clips the gradient.
    """

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
