"""SGD with momentum, dampening, Nesterov and coupled L2, as `torch.optim.SGD`.

g~ = g + weight_decay theta
b' = momentum b + (1 - dampening) g~          (b' = g~ at the first step)
theta' = theta - lr b'                        (Nesterov: theta - lr (g~ + momentum b'))
"""

from typing import ClassVar

from torch import Tensor

from midflight.updates.base import Options, State, UpdateRule, decayed, is_zero, numbers, tuned_options

LARGEST = 1 - 1e-6
"""The largest momentum for which `shrinkage` is computed."""


class SGD(UpdateRule):
    """Stochastic gradient descent; see the module for the formula."""

    tunable: ClassVar = frozenset({"lr", "momentum", "weight_decay"})

    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        lr, momentum = options["lr"], options["momentum"]
        _, total = decayed(param, grad, options)
        if is_zero(momentum):
            return param - lr * total, {}
        buffer = state.get("momentum_buffer")
        buffer = total if buffer is None else momentum * buffer + (1 - options["dampening"]) * total
        direction = total + momentum * buffer if options["nesterov"] else buffer
        return param - lr * direction, {"momentum_buffer": buffer}

    def shrinkage(self, options: Options) -> float:
        o = numbers(options, but=("weight_decay",))
        longer = (1 - o["dampening"]) / (1 - min(o["momentum"], LARGEST)) if o["momentum"] else 1.0
        return float(o["lr"] * longer)

    def pullback(
        self, v: Tensor, param: Tensor, grad: Tensor, state: State, options: Options
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if set(tuned_options(options)) - {"weight_decay"}:
            return super().pullback(v, param, grad, state, options)
        momentum = options["momentum"]
        passed = 1.0 if state.get("momentum_buffer") is None else 1 - options["dampening"]
        scale = 1 + momentum * passed if options["nesterov"] else passed if momentum else 1.0
        w = v * (-options["lr"] * scale)
        tuned = {"weight_decay": (w * param).sum()} if tuned_options(options) else {}
        return (-w if options["maximize"] else w), tuned
