"""RMSprop with momentum, centered or not, as `torch.optim.RMSprop`.

g~ = g + weight_decay theta
s' = alpha s + (1 - alpha) g~^2,  a' = alpha a + (1 - alpha) g~
d = g~ / (sqrt(s') + eps)                     (centered: s' - a'^2, the variance, in place of s')
b' = momentum b + d
theta' = theta - lr b'
"""

from typing import ClassVar

import torch
from torch import Tensor

from midflight.updates.base import Options, State, UpdateRule, decayed, is_zero, safe_sqrt, step_number


class RMSprop(UpdateRule):
    """RMSprop (Tieleman & Hinton 2012), centered as in Graves 2013; see the module for the formula."""

    tunable: ClassVar = frozenset({"lr", "alpha", "eps", "weight_decay", "momentum"})

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        alpha, momentum = options["alpha"], options["momentum"]
        _, total = decayed(param, grad, options)
        s = alpha * state.get("square_avg", 0.0) + (1 - alpha) * total * total
        new_state = {"step": torch.tensor(float(step_number(state))), "square_avg": s}
        if options["centered"]:
            average = alpha * state.get("grad_avg", 0.0) + (1 - alpha) * total
            new_state["grad_avg"] = average
            s = s - average * average
        direction = total / (safe_sqrt(s) + options["eps"])
        if not is_zero(momentum):
            direction = momentum * state.get("momentum_buffer", 0.0) + direction
            new_state["momentum_buffer"] = direction
        return param - options["lr"] * direction, new_state
