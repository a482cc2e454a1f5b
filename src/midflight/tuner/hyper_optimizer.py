"""Move the hyperparameters, given their hypergradients.

The size of a hypergradient depends on the learning rate, the batch and the optimiser's state. Only its sign
over time is informative. So the default step is a fraction of a usual range against the sign. It anneals to
zero over the run.

The optimiser's own options, such as lr, can ruin a run in one step. They move as far as their signs agree,
and faster the longer these agree.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from midflight._tensors import Tensors
from midflight.tuner.saved import Saved
from midflight.updates import read_option, write_option

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
"""Raw tensors -> the torch optimiser that moves them."""


class SignSteps(torch.optim.Optimizer):
    """Steps by the sign of the hypergradient, further if recent signs agree.

    raw -= lr ((1 - a) s + a m |m|),   s = sign(hypergradient), m = mean of the recent signs
    raw -= WEIGHTS lr h / rms(h),      h = hypergradient of weights; the mean is over entries that are not 0

    If recent signs agree, a step has the full length lr. If they do not, its part a vanishes. The other part,
    1 - a, is always taken. It lets a value leave a bound, or a region of weak hypergradients. Hypergradients
    of weights of losses have one unit, so their sizes can be compared. The weight of a source or example that
    was not drawn stays where it is.

    Args:
        params: raw coordinates of a `Space`.
        lr: the longest step, as a fraction of the range.
        agreement: a, in [0, 1]; 0 steps by the last sign alone. None means AVERAGED with the horizon
            `Averaged`, and ALONE otherwise.

    Raises:
        ValueError: lr > 0 or 0 <= agreement <= 1 does not hold.
    """

    MEMORY = 0.9
    """The decay of m per step."""
    STEADY, EARLY, FASTER, FASTEST = 0.9, 5, 1.2, 3.0
    """An option that moves fully by agreement goes FASTER with each step while |m| > STEADY, up to FASTEST
    times as fast, but not in the first EARLY steps."""
    WEIGHTS = 0.8
    """The length of a step of weights, over that of others."""
    ALONE, AVERAGED = 0.5, 0.75
    """The defaults of a, without and with averaged weights. Without them a is lower, because only the part
    1 - a lets a value leave a region where signs disagree."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.08, agreement: float | None = None) -> None:
        if isinstance(lr, bool) or not 0 < lr < math.inf:
            raise ValueError(f"lr > 0, and finite, must hold, but lr={lr}.")
        if agreement is not None and not 0 <= agreement <= 1:
            raise ValueError(f"0 <= agreement <= 1 must hold, but agreement={agreement}.")
        self._given = agreement
        self._by_agreement: list[Tensor] = []
        self._by_size: list[Tensor] = []
        super().__init__(params, {"lr": lr, "agreement": self.ALONE if agreement is None else agreement})

    def set_averaging(self, averaging: float) -> None:
        """Set a to its usual value times `averaging`, for the horizon `Averaged`.

        Signs disagree once a model memorises its training data, but then each step is needed in full.

        Args:
            averaging: in [0, 1]; 0 if the model memorises.
        """
        for group in self.param_groups:
            group["agreement"] = averaging * (self.AVERAGED if self._given is None else self._given)

    def move_by_agreement(self, params: Iterable[Tensor]) -> None:
        """Move these with a = 1, and faster while their signs agree, unless `agreement` was given."""
        self._by_agreement = [] if self._given is not None else list(params)

    def move_by_size(self, params: Iterable[Tensor]) -> None:
        """Move these weights of losses by the sizes of their hypergradients, unless `agreement` was given."""
        self._by_size = [] if self._given is not None else list(params)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Move every coordinate that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            lr, a = group["lr"], group["agreement"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if any(p is other for other in self._by_size):
                    p.sub_(self.WEIGHTS * lr * _by_root_mean_square(p.grad))
                    continue
                state, sign = self.state[p], p.grad.sign()
                if not state:
                    state["step"], state["signs"] = 0, torch.zeros_like(p)
                state["step"] += 1
                m = state["signs"].lerp_(sign, 1 - self.MEMORY) / (1 - self.MEMORY ** state["step"])
                if any(p is other for other in self._by_agreement):
                    p.sub_(lr * self._pace(state, m) * m * m.abs())
                else:
                    p.sub_(lr * ((1 - a) * sign + a * m * m.abs()))
        return loss

    def _pace(self, state: dict[str, Any], m: Tensor) -> Tensor:
        """Return how many times as fast a coordinate moves, given the mean m of its recent signs."""
        before: Tensor = state.get("pace", torch.ones_like(m))
        steady = (m.abs() > self.STEADY) & (state["step"] > self.EARLY)
        pace = torch.where(steady, (self.FASTER * before).clamp(max=self.FASTEST), 1.0)
        state["pace"] = pace
        return pace


def _by_root_mean_square(h: Tensor) -> Tensor:
    """Return h over its root mean square, the mean over entries larger than rounding."""
    counted = h[h.abs() > 1e-4 * h.abs().max()]
    return h / counted.square().mean().sqrt() if len(counted) else torch.zeros_like(h)


class Move(Saved):
    """Moves raw coordinates against hypergradients, by steps that anneal over the run.

    The length of a step is set after the step before it. It falls linearly to 0 with the share of the run
    that is over. If the length of the run is not known, its factor is 1/sqrt(1 + n/50) after n hyper-steps.
    The sum of these diverges, so any point of the range can be reached.

    Args:
        raws: unit coordinates, name -> leaf tensor with entries in [0, 1]; changed in place.
        hyper_optimizer: raw tensors -> torch optimiser.
        progress: returns the share of the run that is over; None if its length is not known.
        stride: (name, raw) -> the fraction of a step to take, a number or shaped like raw; by default 1.
    """

    SAVED = ("optimizer", "_longest", "_count")

    def __init__(
        self,
        raws: Tensors,
        hyper_optimizer: MakeOptimizer,
        progress: Callable[[], float | None],
        stride: Callable[[str, Tensor], float | Tensor] | None = None,
    ) -> None:
        self._raws, self._progress, self._stride = raws, progress, stride
        self.optimizer = hyper_optimizer(list(raws.values()))
        self.scale = 1.0
        """The factor on the length of the steps in addition to annealing."""
        self._longest = [read_option(group, "lr") for group in self.optimizer.param_groups]
        self._count = 0
        self._anneal()

    @torch.no_grad()
    def __call__(self, hypergradients: Tensors, scale: float = 1.0) -> None:
        """Move the hyperparameters that have a hypergradient by one step; leave the others unchanged.

        Args:
            hypergradients: name -> tensor shaped like the raw coordinates.
            scale: the factor on the length of the steps after this one.
        """
        self.scale = scale
        try:
            for name, hypergradient in hypergradients.items():
                self._raws[name].grad = hypergradient.to(self._raws[name])
            before = self._limited(hypergradients)
            self.optimizer.step()
            for name, (raw, stride) in before.items():
                self._raws[name].copy_(torch.lerp(raw, self._raws[name], stride))
            self._count += 1
            self._anneal()
        finally:
            for raw in self._raws.values():
                raw.grad = None
                raw.clamp_(0, 1)

    def _limited(self, names: Iterable[str]) -> dict[str, tuple[Tensor, float | Tensor]]:
        """Return (raw now, stride) of the coordinates that take less than whole steps."""
        if self._stride is None:
            return {}
        strides = {name: self._stride(name, self._raws[name]) for name in names}
        return {
            name: (self._raws[name].clone(), s)
            for name, s in strides.items()
            if isinstance(s, Tensor) or s != 1
        }

    def forget(self) -> None:
        """Drop what the optimiser knows of earlier hypergradients, because the guard has restored weights."""
        self.optimizer.state.clear()

    def shrink(self, scale: float) -> None:
        """Set the factor on the length of the coming steps, without taking one."""
        self.scale = scale
        self._anneal()

    def _anneal(self) -> None:
        done = self._progress()
        factor = 1 / math.sqrt(1 + self._count / 50) if done is None else max(0.0, 1 - done)
        for group, longest in zip(self.optimizer.param_groups, self._longest, strict=True):
            write_option(group, "lr", longest * (factor * self.scale))
