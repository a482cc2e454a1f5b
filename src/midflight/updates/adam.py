"""Adam and AdamW, as `torch.optim.Adam` and `torch.optim.AdamW`.

g~ = g + weight_decay theta                   (Adam: coupled L2)
m' = beta1 m + (1 - beta1) g~,  s' = beta2 s + (1 - beta2) g~^2
theta' = theta - lr m^ / (sqrt(s^) + eps),    m^ = m' / (1 - beta1^t),  s^ = s' / (1 - beta2^t)
theta' -= lr weight_decay theta               (AdamW: decoupled)
"""

from typing import ClassVar

import torch
from torch import Tensor

from midflight.updates.base import Options, State, UpdateRule, decayed, safe_sqrt, step_number, tuned_options


class Adam(UpdateRule):
    """Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019); see the module for the formula."""

    tunable: ClassVar = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay"})

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        lr, beta1, beta2 = options["lr"], options["beta1"], options["beta2"]
        start, total = decayed(param, grad, options, decoupled=options["decoupled_weight_decay"])
        t = step_number(state)
        m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * total
        s = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * total * total
        new_state = {"step": torch.tensor(float(t)), "exp_avg": m, "exp_avg_sq": s}
        if options["amsgrad"]:
            s = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(s)), s)
            new_state["max_exp_avg_sq"] = s
        denom = safe_sqrt(s) / (1 - beta2**t) ** 0.5 + options["eps"]
        return start - lr / (1 - beta1**t) * (m / denom), new_state

    def pullback(
        self, v: Tensor, param: Tensor, grad: Tensor, state: State, options: Options
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tuned = tuned_options(options)
        if options["amsgrad"] or set(tuned) - {"weight_decay"}:
            return super().pullback(v, param, grad, state, options)
        beta1, beta2 = options["beta1"], options["beta2"]
        coupled = not options["decoupled_weight_decay"]
        with torch.no_grad():
            _, total = decayed(param, grad, options, decoupled=not coupled)
            t = step_number(state)
            m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * total
            root = (beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * total * total).sqrt()
            correction = (1 - beta2**t) ** 0.5
            denom = root / correction + options["eps"]
            # d(m / denom)/dg~; where root is 0 so is m, and the second term is 0
            slope = (1 - beta1) - (1 - beta2) / correction * m * total / (root * denom).where(root > 0, 1)
            w = v * slope / denom * (-options["lr"] / (1 - beta1**t))
            option_grads = {}
            if tuned:
                direction = w if coupled else -options["lr"] * v
                option_grads["weight_decay"] = (direction * param).sum()
            return (-w if options["maximize"] else w), option_grads
