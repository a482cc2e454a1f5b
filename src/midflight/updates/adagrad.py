"""Adagrad, as `torch.optim.Adagrad`.

g~ = g + weight_decay theta
s' = s + g~^2                                 (s = initial_accumulator_value before the first step)
theta' = theta - lr / (1 + (t - 1) lr_decay) g~ / (sqrt(s') + eps)
"""

from typing import ClassVar

import torch
from torch import Tensor

from midflight.updates.base import Options, State, UpdateRule, decayed, safe_sqrt, step_number


class Adagrad(UpdateRule):
    """Adagrad (Duchi et al. 2011); see the module for the formula.

    `initial_accumulator_value` is not tunable: torch copies it into the state when the optimiser is
    constructed, and no step reads it afterwards.
    """

    tunable: ClassVar = frozenset({"lr", "lr_decay", "eps", "weight_decay"})

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        _, total = decayed(param, grad, options)
        t = step_number(state)
        s = state.get("sum", options["initial_accumulator_value"]) + total * total
        rate = options["lr"] / (1 + (t - 1) * options["lr_decay"])
        new = param - rate * (total / (safe_sqrt(s) + options["eps"]))
        return new, {"step": torch.tensor(float(t)), "sum": s}
