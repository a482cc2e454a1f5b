"""ASGD, SGD that also averages the weights, as `torch.optim.ASGD`.

g~ = g + weight_decay theta
theta' = theta - eta (lambd theta + g~)       (eta = lr before the first step)
ax' = ax + mu (theta' - ax)
eta' = lr / (1 + lambd lr t)^alpha,  mu' = 1 / max(1, t - t0)
"""

from typing import ClassVar

import torch
from torch import Tensor

from midflight.updates.base import Options, State, UpdateRule, decayed, plain, step_number


class ASGD(UpdateRule):
    """Averaged SGD (Polyak & Juditsky 1992); see the module for the formula.

    `lr`, `alpha` and `t0` are not tunable. A step reads eta and mu from the state of the previous step. So
    these options act one step too late for a one-step derivative.
    """

    tunable: ClassVar = frozenset({"lambd", "weight_decay"})

    def shrinkage(self, options: Options) -> float:
        return float(plain(options["lr"]))

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        lr, lambd = options["lr"], options["lambd"]
        _, total = decayed(param, grad, options)
        t = step_number(state)
        eta = plain(state["eta"] if "eta" in state else _as_torch_keeps_it(lr))
        mu = plain(state["mu"]) if "mu" in state else 1.0
        new = param - eta * (lambd * param + total)
        average = state.get("ax", torch.zeros_like(param))
        return new, {
            "step": torch.tensor(float(t)),
            "eta": _as_torch_keeps_it(lr / (1 + lambd * lr * t) ** options["alpha"]),
            "mu": _as_torch_keeps_it(1 / max(1.0, t - options["t0"])),
            "ax": average + mu * (new - average),
        }


def _as_torch_keeps_it(x: float | Tensor) -> Tensor:
    """Return a scalar of the state in torch's default dtype, whatever the dtype of the weights."""
    return torch.as_tensor(x, dtype=torch.get_default_dtype())
