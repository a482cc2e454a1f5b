"""Adafactor, which stores the second moment of a matrix as two vectors, as `torch.optim.Adafactor`.

beta_t = t^beta2_decay,  alpha_t = max(eps2, RMS(theta)) min(lr, 1 / sqrt(t))
r' = (1 - beta_t) r + beta_t mean of g^2 over columns,  c' likewise over rows
v = r' c' / max(mean of r', eps1)             (a vector or scalar: v' = (1 - beta_t) v + beta_t g^2)
u = g / max(sqrt(v), eps1)
theta' = theta - lr weight_decay theta - alpha_t u / max(1, RMS(u) / d)

The minimum and the maxima have kinks. Apart from decay, the derivative in lr is 0 unless lr < 1 / sqrt(t).
The derivative in d is 0 unless d clips, that in beta2_decay is 0 at the first step (beta_t = 1).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from midflight.updates.base import Options, State, UpdateRule, decayed, step_number


class Adafactor(UpdateRule):
    """Adafactor (Shazeer & Stern 2018) without momentum; see the module for the formula."""

    tunable: ClassVar = frozenset({"lr", "beta2_decay", "d", "weight_decay"})
    elementwise: ClassVar = False
    decoupled: ClassVar = True

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        eps1, eps2 = options["eps"]
        eps1 = torch.finfo(param.dtype).eps if eps1 is None else eps1
        start, total = decayed(param, grad, options, decoupled=self.decoupled)
        t = step_number(state)
        beta = t ** options["beta2_decay"]
        square = total * total
        new_state = {"step": torch.tensor(float(t))}
        if param.ndim > 1:
            r = (1 - beta) * state.get("row_var", 0.0) + beta * square.mean(dim=-1, keepdim=True)
            c = (1 - beta) * state.get("col_var", 0.0) + beta * square.mean(dim=-2, keepdim=True)
            new_state |= {"row_var": r, "col_var": c}
            v = r @ c / r.mean(dim=-2, keepdim=True).clamp(min=eps1)
        else:
            v = (1 - beta) * state.get("variance", 0.0) + beta * square
            new_state["variance"] = v
        u = total * v.clamp(min=eps1 * eps1).rsqrt()
        alpha = _rms(param).clamp(min=eps2) * _minimum(options["lr"], t**-0.5)
        return start - alpha * u / (_rms(u) / options["d"]).clamp(min=1), new_state


def _rms(x: Tensor) -> Tensor:
    norm: Tensor = x.norm()
    return norm / math.sqrt(x.numel())  # at x = 0 its derivative is 0; that of square().mean().sqrt() is NaN


def _minimum(x: float | Tensor, y: float) -> float | Tensor:
    return x.clamp(max=y) if isinstance(x, Tensor) else min(x, y)
