"""Differentiate the validation loss after several optimiser steps.

    d/dh C2(theta_K),   theta_{k+1}, s_{k+1} = U(theta_k, s_k, dC1~/dtheta(theta_k, h), h)

(Maclaurin et al. 2015; truncated: Shaban et al. 2019.)
"""

from dataclasses import dataclass
from typing import ClassVar

from midflight._tensors import Tensors, detach, leaves
from midflight.hypergrad.base import Estimator
from midflight.hypergrad.mixed import train_loss_of
from midflight.hypergrad.problem import Step, gradient
from midflight.updates import State


@dataclass(frozen=True)
class Unrolled(Estimator):
    """Estimate exactly for `steps` steps on the current batch, including the optimiser's state.

    Costs `steps` gradients, one validation pass and `steps` double backwards. Holds `steps` copies of the
    weights, of the state and of the training graph.

    Args:
        steps: number of steps K; 1 gives `one_step`.
    """

    steps: int = 5
    needs_train_loss: ClassVar = True

    def at(self, step: Step) -> Tensors:
        return detach(self._last(step, create_graph=False))

    def __call__(self, step: Step, v: Tensors) -> Tensors:
        params = self._last(step, create_graph=True)
        return step.chain([(params[name], v[name]) for name in params])

    def _last(self, step: Step, *, create_graph: bool) -> Tensors:
        """Return theta_K."""
        train_loss = train_loss_of(step)
        params = leaves(step.params)
        state: dict[str, State] = dict(step.state)
        for _ in range(self.steps):
            grads = gradient(train_loss(params, step.values), params, create_graph=create_graph)
            new = {}
            for name, u in step.updates.items():
                new[name], state[name] = u.rule.step(params[name], grads[name], state[name], u.options)
            params = new if create_graph else leaves(new)
        return params


unrolled = Unrolled()
