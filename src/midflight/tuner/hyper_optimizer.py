"""How far the hyperparameters move, given a hypergradient.

The hypergradient's scale carries the learning rate, the batch and the optimiser's state; its sign
over time is the signal. So the default step is a fixed fraction of the range in the direction of
the sign, annealed to zero over the run.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from midflight.trees import Tensors


class SignSteps(torch.optim.Optimizer):
    """raw -= lr ((1 - a) s + a m |m|),   s = sign(hypergradient), m = mean of the recent signs

    Where the signs agree a step has the full length lr, where they do not, the part a of it stays
    away. The rest is always taken: at a bound, or where the hypergradient is weak, it is what finds the
    way out.

    Args:
        params: raw coordinates of a `Space`.
        lr: the longest step, as a fraction of the range.
        agreement: a, in [0, 1]; 0 steps by the last sign alone. None: AVERAGED under the horizon `Averaged`,
            ALONE otherwise.

    Raises:
        ValueError: lr > 0 or 0 <= agreement <= 1 does not hold.
    """

    MEMORY = 0.9
    """What m keeps of itself at a step."""
    ALONE, AVERAGED = 0.5, 0.75
    """a, unless given. Without averaged weights nothing else finds the way out from where signs disagree."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.08, agreement: float | None = None) -> None:
        if isinstance(lr, bool) or not 0 < lr < math.inf:
            raise ValueError(f"lr > 0, and finite, must hold, but lr={lr}.")
        if agreement is not None and not 0 <= agreement <= 1:
            raise ValueError(f"0 <= agreement <= 1 must hold, but agreement={agreement}.")
        self._given = agreement
        super().__init__(params, {"lr": lr, "agreement": self.ALONE if agreement is None else agreement})

    def set_calm(self, calm: float) -> None:
        """Adapt to the averaged horizon: once a model memorises (calm 0), signs disagree, yet each step
        counts."""
        for group in self.param_groups:
            group["agreement"] = calm * (self.AVERAGED if self._given is None else self._given)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Move every coordinate that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            lr, a = group["lr"], group["agreement"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, sign = self.state[p], p.grad.sign()
                if not state:
                    state["step"], state["signs"] = 0, torch.zeros_like(p)
                state["step"] += 1
                m = state["signs"].lerp_(sign, 1 - self.MEMORY) / (1 - self.MEMORY ** state["step"])
                p.sub_(lr * ((1 - a) * sign + a * m * m.abs()))
        return loss


def annealing(progress: Callable[[], float | None]) -> Callable[[int], float]:
    """The factor on the step length after n hyper-steps.

    Linear to 0 in the share of the run that is over; with an open end (None), 1/sqrt(1 + n/50), whose
    sum still reaches any point of the range.
    """

    def factor(n: int) -> float:
        done = progress()
        return 1 / math.sqrt(1 + n / 50) if done is None else max(0.0, 1 - done)

    return factor


class Move:
    """Moves raw coordinates along hypergradients, by steps that anneal over the run.

    Args:
        raws: unit coordinates, name -> leaf tensor with entries in [0, 1]; changed in place.
        hyper_optimizer: raw tensors -> torch optimiser.
        progress: the share of the run that is over; None where its length is not known.
    """

    def __init__(
        self,
        raws: Tensors,
        hyper_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        progress: Callable[[], float | None],
    ) -> None:
        self._raws = raws
        self.optimizer = hyper_optimizer(list(raws.values()))
        self.scale = 1.0
        """A further factor on the length of the steps."""
        factor = annealing(progress)
        self._annealing = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: factor(n) * self.scale)

    @torch.no_grad()
    def __call__(self, hypergradients: Tensors, scale: float = 1.0) -> None:
        """One step of the hyperparameters that have a hypergradient; the others stay.

        Args:
            hypergradients: name -> tensor shaped like the raw coordinates.
            scale: of the steps after this one.
        """
        self.scale = scale
        try:
            for name, hypergradient in hypergradients.items():
                self._raws[name].grad = hypergradient.to(self._raws[name])
            self.optimizer.step()
            self._annealing.step()
        finally:
            for raw in self._raws.values():
                raw.grad = None
                raw.clamp_(0, 1)

    def shrink(self, scale: float) -> None:
        """Steps are so long from now on, without one having been taken."""
        for group, base, factor in zip(
            self.optimizer.param_groups, self._annealing.base_lrs, self._annealing.lr_lambdas, strict=True
        ):
            self.scale = scale
            group["lr"] = base * factor(self._annealing.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume."""
        return {"optimizer": self.optimizer.state_dict(), "annealing": self._annealing.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._annealing.load_state_dict(state["annealing"])
