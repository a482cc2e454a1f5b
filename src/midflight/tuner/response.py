"""How the trained weights respond to weight decay in the long run.

Over one step, weight decay shrinks all weights. Later steps undo this in directions in which the training
loss is curved. What remains is the response. With the optimiser's update U and v = dC2/dtheta,

    dtheta/dh = (I - dU/dtheta)^-1 dU/dh
    dC2/dh = u . dU/dh,     A u = v,     A = (I - dU/dtheta)^T

(Lorraine et al. 2020, Eq. 5; for options of an optimiser Clarke et al. 2022). A solution from the start takes
many products with A. So u is kept, and one hyper-step in EVERY improves it by one product (Dagreou et al.
2022), with the momentum of Polyak (1964):

    u <- u + (v - A u) / bound + MOMENTUM (u - u before)

`bound` is the largest eigenvalue of A, which the power method follows. A is proportional to the learning
rate. This rate changes, so A is divided by it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from midflight._tensors import Tensors, dot, norm
from midflight.hypergrad.one_step import one_step
from midflight.hypergrad.problem import Step
from midflight.tuner.horizon import KEPT_MEAN
from midflight.updates import Update, pull_back

Product = Callable[[Tensors], Tensors]
"""u -> A u, both with the names and shapes of the weights."""

MOMENTUM = 0.9
"""The momentum of u per improvement."""
EVERY, EARLY = 5, 3
"""u is improved at one hyper-step in EVERY, and at each of the first EARLY."""
POWER = 2
"""The power method takes a step at one improvement in POWER, and at each of the first EARLY."""
FORGET = 0.98
"""The factor on the bound per improvement, because the curvature changes."""


class Solution:
    """Follows the solution u of A u = v, by one or two products with A per improvement.

    Stores u, its last change and a vector of the power method, in the types of KEPT_MEAN.
    """

    def __init__(self) -> None:
        self._count = 0
        self._bound = 0.0
        self._u: Tensors = {}
        self._change: Tensors = {}
        self._power: Tensors = {}

    @torch.no_grad()
    def __call__(self, v: Tensors, product: Product) -> Tensors:
        """Return u, improved by one step, in new memory."""
        if self._u.keys() != v.keys() or any(self._u[name].shape != t.shape for name, t in v.items()):
            self._count, self._bound = 0, 0.0
            self._power = _kept({name: torch.randn_like(t) for name, t in v.items()})
            self._begin(v)
        u = _like(v, self._u)
        along = product(u)
        self._bound = max(FORGET * self._bound, _stretch(u, along))
        if self._count < EARLY or self._count % POWER == 0:
            self._follow_bound(_like(v, self._power), product)
        self._count += 1
        if not (self._bound > 0 and dot(u, along) >= 0):  # not finite, or along a negative curvature
            self._begin(v)
            return {name: t.clone() for name, t in v.items()}
        change = _like(v, self._change)
        moving, changes = list(u.values()), list(change.values())
        torch._foreach_mul_(changes, MOMENTUM)
        torch._foreach_add_(changes, list(v.values()), alpha=1 / self._bound)
        torch._foreach_add_(changes, [along[name] for name in v], alpha=-1 / self._bound)
        torch._foreach_add_(moving, changes)
        self._u, self._change = _kept(u), _kept(change)
        return u

    def _begin(self, v: Tensors) -> None:
        self._u, self._change = _kept(v), _kept({name: torch.zeros_like(t) for name, t in v.items()})

    def _follow_bound(self, power: Tensors, product: Product) -> None:
        moved = product(power)
        self._bound = max(self._bound, _stretch(power, moved))
        if (length := float(norm(moved))) > 0:
            self._power = _kept(
                dict(zip(moved, torch._foreach_div(list(moved.values()), length), strict=True))
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume."""
        tensors = {"u": self._u, "change": self._change, "power": self._power}
        return {"count": self._count, "bound": self._bound, **{k: dict(t) for k, t in tensors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self._count, self._bound = state["count"], state["bound"]
        self._u, self._change, self._power = (dict(state[k]) for k in ("u", "change", "power"))


class Response:
    """Gives the hypergradients of weight decay through the response of the weights, at each hyper-step."""

    def __init__(self) -> None:
        self._solution = Solution()
        self._hypersteps = 0
        self._found: Tensors = {}
        """The last hypergradients."""

    @property
    def due(self) -> bool:
        """Whether the coming hyper-step improves u."""
        return self._hypersteps < EARLY or self._hypersteps % EVERY == 0

    def unchanged(self) -> Tensors:
        """Return the last hypergradients, at a hyper-step that does not improve u."""
        self._hypersteps += 1
        return dict(self._found)

    def __call__(self, step: Step, v: Tensors, curvature: Product) -> Tensors:
        """Return the hypergradients, with u improved by one step.

        Args:
            step: the optimiser step U, whose hyperparameters are those of weight decay.
            v: dC2/dtheta, name -> tensor.
            curvature: w -> H w, H the Hessian of the training loss; weights that it does not reach may be
                missing.
        """
        rate = max(_number(update.options["lr"]) for update in step.updates.values()) or 1.0
        u = self._solution(v, partial(product_of, step, curvature, 1 / rate))
        self._found = {name: g / rate for name, g in one_step(step, u).items()}
        return self.unchanged()

    def forget(self) -> None:
        """Begin anew, because the guard has restored earlier weights."""
        self._solution, self._hypersteps, self._found = Solution(), 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume."""
        return {
            "solution": self._solution.state_dict(),
            "hypersteps": self._hypersteps,
            "found": dict(self._found),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self._solution.load_state_dict(state["solution"])
        self._hypersteps, self._found = state["hypersteps"], dict(state["found"])


@torch.enable_grad()
def product_of(step: Step, curvature: Product, scale: float, u: Tensors) -> Tensors:
    """Return scale A u = scale (u - (dU/dtheta)^T u), the optimiser's state held constant."""
    copy = {name: t.clone() for name, t in u.items()}  # `pull_back` overwrites it
    w, _ = pull_back(copy, step.params, step.grads, step.state, step.updates)
    w = step.clipped(w) if step.clipped else w
    curved = curvature(w)
    found = {name: _through_decay(step.updates[name], t, w[name]) for name, t in u.items()}
    for name, t in curved.items():
        found[name] = found[name] - t
    torch._foreach_mul_(list(found.values()), scale)
    return found


def _through_decay(update: Update, u: Tensor, w: Tensor) -> Tensor:
    """Return the part of A u that weight decay adds, in new memory; w = (dU/dg)^T u."""
    decay = _number(update.options.get("weight_decay", 0.0))
    decoupled = update.options.get("decoupled_weight_decay", update.rule.decoupled)
    return _number(update.options["lr"]) * decay * u if decoupled else -decay * w


def _number(option: float | Tensor) -> float:
    return float(option.detach() if isinstance(option, Tensor) else option)


def _kept(tensors: Tensors) -> Tensors:
    return {name: t.to(KEPT_MEAN.get(t.dtype, t.dtype), copy=True) for name, t in tensors.items()}


def _like(others: Tensors, tensors: Tensors) -> Tensors:
    """Return copies of the tensors in the types and the order of others."""
    return {name: tensors[name].to(t, copy=True) for name, t in others.items()}


def _stretch(before: Tensors, after: Tensors) -> float:
    """Return by which factor a product stretched a vector."""
    length = float(norm(before))
    return float(norm(after)) / length if length > 0 else 0.0
