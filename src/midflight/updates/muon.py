"""Muon, momentum with an orthogonalised direction for matrices, as `torch.optim.Muon`.

b' = momentum b + (1 - momentum) g
d = b'                                        (Nesterov: momentum b' + (1 - momentum) g)
theta' = theta - lr weight_decay theta - lr scale(shape) O(d)

O(d) is `ns_steps` Newton-Schulz steps from X = d / max(|d|_F, eps),
    X <- a X + (b X X^T + c (X X^T)^2) X,     (a, b, c) = ns_coefficients

As in torch, these steps are computed in bfloat16. Rounding makes O piecewise constant in g, with derivative 0
almost everywhere. So a step can be differentiated only with respect to lr and weight_decay.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from midflight.updates.base import Options, State, UpdateRule, decayed


class Muon(UpdateRule):
    """Muon (Jordan et al. 2024) for one matrix; see the module for the formula."""

    tunable: ClassVar = frozenset({"lr", "weight_decay"})
    elementwise: ClassVar = False
    why_not_differentiable: ClassVar = "rounds its step to bfloat16"
    decoupled: ClassVar = True

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        start, total = decayed(param, grad, options, decoupled=self.decoupled)
        momentum = options["momentum"]
        buffer = _lerp(state.get("momentum_buffer", torch.zeros_like(grad)), total, 1 - momentum)
        direction = _lerp(total, buffer, momentum) if options["nesterov"] else buffer
        rate = options["lr"] * _scale(param.shape, options["adjust_lr_fn"])
        return start - rate * _orthogonalised(direction, options).to(param), {"momentum_buffer": buffer}


def _lerp(start: Tensor, end: Tensor, weight: float | Tensor) -> Tensor:
    """Interpolate exactly as torch does; in bfloat16, an error in the last digit can grow to percents."""
    return start.lerp(end, torch.as_tensor(weight, dtype=start.dtype, device=start.device))


def _scale(shape: torch.Size, adjust_lr_fn: str | None) -> float:
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _orthogonalised(direction: Tensor, options: Options) -> Tensor:
    a, b, c = options["ns_coefficients"]
    tall = direction.shape[0] > direction.shape[1]
    x = direction.detach().bfloat16()
    x = x.T if tall else x  # so that X X^T is the smaller of the two products
    x = x / x.norm().clamp(min=options["eps"])
    for _ in range(options["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
