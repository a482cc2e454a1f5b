"""Adamax, Adam with the maximum norm, as `torch.optim.Adamax`.

g~ = g + weight_decay theta
m' = beta1 m + (1 - beta1) g~,  u' = max(beta2 u, |g~| + eps)
theta' = theta - lr / (1 - beta1^t) m' / u'

The maximum has a kink. Where beta2 u is larger, the derivative in eps is 0. Elsewhere that in beta2 is 0.
"""

from typing import ClassVar

import torch
from torch import Tensor

from midflight.updates.base import Options, State, UpdateRule, decayed, step_number


class Adamax(UpdateRule):
    """Adamax (Kingma & Ba 2015, section 7.1); see the module for the formula."""

    tunable: ClassVar = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay"})

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        lr, beta1, beta2 = options["lr"], options["beta1"], options["beta2"]
        _, total = decayed(param, grad, options)
        t = step_number(state)
        m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * total
        u = torch.maximum(beta2 * state.get("exp_inf", torch.zeros_like(param)), total.abs() + options["eps"])
        new_state = {"step": torch.tensor(float(t)), "exp_avg": m, "exp_inf": u}
        return param - lr / (1 - beta1**t) * (m / u), new_state
