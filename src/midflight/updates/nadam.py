"""NAdam, Adam with Nesterov momentum, as `torch.optim.NAdam`.

g~ = g + weight_decay theta                   (decoupled: theta -= lr weight_decay theta instead)
m' = beta1 m + (1 - beta1) g~,  s' = beta2 s + (1 - beta2) g~^2
mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2),  M_t = mu_1 ... mu_t
theta' = theta - lr ((1 - mu_t) / (1 - M_t) g~ + mu_t+1 / (1 - M_t+1) m') / (sqrt(s^) + eps)
                                              s^ = s' / (1 - beta2^t)
"""

from typing import ClassVar

import torch
from torch import Tensor

from midflight.updates.base import Options, State, UpdateRule, decayed, plain, safe_sqrt, step_number


class NAdam(UpdateRule):
    """NAdam (Dozat 2016); see the module for the formula.

    torch stores M_t in float32 for weights of any dtype. So does this rule, unless beta1 or momentum_decay
    is a float64 tensor. Rounding would then hide the derivative.
    """

    tunable: ClassVar = frozenset({"lr", "beta1", "beta2", "eps", "weight_decay", "momentum_decay"})

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        lr, beta1, beta2 = options["lr"], options["beta1"], options["beta2"]
        start, total = decayed(param, grad, options)
        t = step_number(state)
        m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * total
        s = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * total * total
        mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (i * options["momentum_decay"])) for i in (t, t + 1))
        mu_product = state.get("mu_product", torch.tensor(1.0)) * mu
        new_state = {"step": torch.tensor(float(t)), "mu_product": mu_product, "exp_avg": m, "exp_avg_sq": s}
        product = plain(mu_product)
        denom = safe_sqrt(s) / (1 - beta2**t) ** 0.5 + options["eps"]
        lookahead = (1 - mu) / (1 - product) * total + mu_next / (1 - product * mu_next) * m
        return start - lr * (lookahead / denom), new_state
