"""RAdam, Adam that adapts its rate only after enough gradients, as `torch.optim.RAdam`.

g~ = g + weight_decay theta                   (decoupled: theta -= lr weight_decay theta instead)
m' = beta1 m + (1 - beta1) g~,  s' = beta2 s + (1 - beta2) g~^2,  m^ = m' / (1 - beta1^t)
theta' = theta - lr m^                                              while rho_t <= 5
theta' = theta - lr m^ r_t sqrt(1 - beta2^t) / (sqrt(s') + eps)     afterwards

rho_inf = 2 / (1 - beta2) - 1,  rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)
r_t^2 = (rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t)

While rho_t <= 5 (five steps at the default beta2), beta2 and eps do not act and have derivative 0.
"""

from typing import ClassVar

import torch
from torch import Tensor

from midflight.updates.base import Options, State, UpdateRule, decayed, safe_sqrt, step_number


class RAdam(UpdateRule):
    """Rectified Adam (Liu et al. 2020); see the module for the formula."""

    tunable: ClassVar = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay"})

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        lr, beta1, beta2 = options["lr"], options["beta1"], options["beta2"]
        start, total = decayed(param, grad, options)
        t = step_number(state)
        m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * total
        s = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * total * total
        new_state = {"step": torch.tensor(float(t)), "exp_avg": m, "exp_avg_sq": s}
        direction = m / (1 - beta1**t)
        rectification = _rectification(beta2, t)
        if rectification is not None:
            direction = direction * (rectification / (safe_sqrt(s) + options["eps"]))
        return start - lr * direction, new_state


def _rectification(beta2: float | Tensor, t: int) -> float | Tensor | None:
    """Return r_t sqrt(1 - beta2^t), or None while rho_t <= 5.

    Computed in float64, because rho_t is the small difference of two large numbers.
    """
    b = beta2.double() if isinstance(beta2, Tensor) else beta2
    rho_inf = 2 / (1 - b) - 1
    rho = rho_inf - 2 * t * b**t / (1 - b**t)
    if rho <= 5:
        return None
    r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
    result = r * (1 - b**t) ** 0.5
    return result.to(beta2) if isinstance(beta2, Tensor) else result
