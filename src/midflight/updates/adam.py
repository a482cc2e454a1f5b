"""Adam and AdamW, as `torch.optim.Adam` and `torch.optim.AdamW`.

g~ = g + weight_decay theta                   (Adam: coupled L2)
m' = beta1 m + (1 - beta1) g~,  s' = beta2 s + (1 - beta2) g~^2
theta' = theta - lr m^ / (sqrt(s^) + eps),    m^ = m' / (1 - beta1^t),  s^ = s' / (1 - beta2^t)
theta' -= lr weight_decay theta               (AdamW: decoupled)
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from midflight.updates.base import (
    Options,
    State,
    UpdateRule,
    decayed,
    numbers,
    safe_sqrt,
    step_number,
    tuned_options,
)


class Adam(UpdateRule):
    """Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019); see the module for the formula."""

    tunable: ClassVar = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay"})

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        start, total = decayed(param, grad, options)
        before = state.get("exp_avg", 0.0), state.get("exp_avg_sq", 0.0)
        m, s = moments(total, *before, options["beta1"], options["beta2"])
        new_state = {"step": torch.tensor(float(step_number(state))), "exp_avg": m, "exp_avg_sq": s}
        if options["amsgrad"]:
            s = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(s)), s)
            new_state["max_exp_avg_sq"] = s
        return moved(start, m, s, *corrected(state, options)), new_state

    @torch.no_grad()
    def ahead(self, param: Tensor, grad: Tensor, state: State, options: Options) -> Tensor:
        o = numbers(options)
        _, m, root = _fast_moments(param, grad, state, o)
        start = param * (1 - o["lr"] * o["weight_decay"]) if o["decoupled_weight_decay"] else param
        scale, eps = corrected(state, o)
        return torch.addcdiv(start, m, root.add_(eps), value=-scale)

    @torch.no_grad()
    def pullback(
        self, v: Tensor, param: Tensor, grad: Tensor, state: State, options: Options
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tuned = tuned_options(options)
        if options["amsgrad"] or set(tuned) - {"weight_decay"}:
            return super().pullback(v, param, grad, state, options)
        o = numbers(options)
        total, m, root = _fast_moments(param, grad, state, o)
        scale, eps = corrected(state, o)
        # d(m / (root + eps))/dg~ = (1 - beta1 - (1 - beta2) m g~ / (root (root + eps))) / (root + eps)
        denom = root + eps
        w = v / denom
        both = root.mul_(denom).clamp_min_(torch.finfo(root.dtype).tiny)  # m is 0 where root is 0
        slope = root.new_tensor(-scale * (1 - o["beta1"]))
        w.mul_(torch.addcdiv(slope, m.mul_(total), both, value=scale * (1 - o["beta2"])))
        derivatives = {}
        if tuned:
            along, factor = (v, -o["lr"]) if o["decoupled_weight_decay"] else (w, 1.0)
            derivatives["weight_decay"] = factor * torch.dot(along.reshape(-1), param.reshape(-1))
        return (w.neg_() if o["maximize"] else w), derivatives


def moments(
    total: Tensor, m: float | Tensor, s: float | Tensor, beta1: float | Tensor, beta2: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return m' and s', given g~."""
    return beta1 * m + (1 - beta1) * total, beta2 * s + (1 - beta2) * total * total


def moved(start: Tensor, m: Tensor, s: Tensor, scale: float | Tensor, eps: float | Tensor) -> Tensor:
    """Return theta', given m' and s'; scale and eps as in `corrected`."""
    return start - scale * (m / (safe_sqrt(s) + eps))


def corrected(state: State, o: Options) -> tuple[Any, Any]:
    """Return a and e of theta' = theta - a m' / (sqrt(s') + e), which contain both bias corrections."""
    t = step_number(state)
    correction = (1 - o["beta2"] ** t) ** 0.5
    return o["lr"] * correction / (1 - o["beta1"] ** t), o["eps"] * correction


def _fast_moments(param: Tensor, grad: Tensor, state: State, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return g~, m' and sqrt(s') in few passes over memory; the caller may overwrite the last two."""
    total = -grad if o["maximize"] else grad
    if o["weight_decay"] and not o["decoupled_weight_decay"]:
        total = total.add(param, alpha=o["weight_decay"])
    if state:
        m = state["exp_avg"].lerp(total, 1 - o["beta1"])
        s = (state["exp_avg_sq"] * o["beta2"]).addcmul_(total, total, value=1 - o["beta2"])
        if o["amsgrad"]:
            s = torch.maximum(state["max_exp_avg_sq"], s)
    else:
        m = total * (1 - o["beta1"])
        s = total * total * (1 - o["beta2"])
    return total, m, s.sqrt_()
