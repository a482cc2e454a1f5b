"""Adadelta, as `torch.optim.Adadelta`.

g~ = g + weight_decay theta
s' = rho s + (1 - rho) g~^2
d = sqrt(a + eps) / sqrt(s' + eps) g~,  a' = rho a + (1 - rho) d^2
theta' = theta - lr d
"""

from typing import ClassVar

import torch
from torch import Tensor

from midflight.updates.base import Options, State, UpdateRule, decayed, step_number


class Adadelta(UpdateRule):
    """Adadelta (Zeiler 2012); see the module for the formula."""

    tunable: ClassVar = frozenset({"lr", "rho", "eps", "weight_decay"})

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        rho, eps = options["rho"], options["eps"]
        _, total = decayed(param, grad, options)
        s = rho * state.get("square_avg", 0.0) + (1 - rho) * total * total
        a = state.get("acc_delta", torch.zeros_like(param))
        delta = (a + eps).sqrt() / (s + eps).sqrt() * total
        new_state = {
            "step": torch.tensor(float(step_number(state))),
            "square_avg": s,
            "acc_delta": rho * a + (1 - rho) * delta * delta,
        }
        return param - options["lr"] * delta, new_state
