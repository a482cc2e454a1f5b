"""Differentiate the update implicitly, for hyperparameters whose effect is delayed.

At a fixed point of training, theta = U(theta, h) with the optimiser's state held constant. Then

    dC2/dh = u . dU/dh,   (I - dU/dtheta)^T u = dC2/dtheta     (Lorraine et al. 2020; for the options
                                                                of the update rule Clarke et al. 2022)

A Neumann series solves this system if U is a contraction; each term accounts for one more step.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from midflight._tensors import Tensors, add_scaled, leaves
from midflight.hypergrad.base import Estimator
from midflight.hypergrad.mixed import train_loss_of
from midflight.hypergrad.problem import Step, gradient


@dataclass(frozen=True)
class ImplicitNeumann(Estimator):
    """Estimate by a truncated Neumann series, u = sum of ((dU/dtheta)^T)^k v; one term gives `one_step`.

    Exact as terms -> infinity at a fixed point of a contracting update. Costs one validation pass and
    `terms` double backwards. Ignores momentum beyond one step, because the state is held constant.

    Args:
        terms: number of terms of the series.
    """

    terms: int = 10
    needs_train_loss: ClassVar = True

    def __call__(self, step: Step, v: Tensors) -> Tensors:
        train_loss = train_loss_of(step)
        params = leaves(step.params)
        grads = gradient(train_loss(params, step.values), params, create_graph=True)
        new = {
            name: u.rule.step(params[name], grads[name], step.state[name], u.options)[0]
            for name, u in step.updates.items()
        }
        term = total = v
        for _ in range(self.terms - 1):
            found = torch.autograd.grad(
                list(new.values()),
                list(params.values()),
                [term[name] for name in new],
                retain_graph=True,
                materialize_grads=True,
            )
            term = dict(zip(params, found, strict=True))
            total = add_scaled(total, term, 1.0)
        return step.chain([(new[name], total[name]) for name in new])


implicit_neumann = ImplicitNeumann()
