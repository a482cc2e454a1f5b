"""What an update rule is: one optimiser step as a pure function, and its exact derivatives."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Options = Mapping[str, Any]
"""What `read_options` makes of a torch `param_group`; a tunable option may be a scalar tensor."""

State = Mapping[str, Tensor]
"""The optimiser's state of one weight, named as in `torch.optim`; empty before the first step."""

Weight = tuple[Tensor, Tensor, State, Options]
"""A weight, its gradient, its state and its options."""


class UpdateRule(ABC):
    """theta' = U(theta, s, g, phi) for one weight tensor."""

    tunable: ClassVar[frozenset[str]]
    """The options with respect to which the step can be differentiated."""
    elementwise: ClassVar[bool] = True
    """Whether an entry of the new weight depends on the same entry of the rest, and on numbers, alone."""
    differentiable: ClassVar[bool] = True
    """Whether the step has a derivative with respect to g; options may have one all the same."""
    one_pass: ClassVar[bool] = False
    """Whether `ahead` and `pullback` go through memory once and gain nothing from working in pieces."""

    of_many: ClassVar[frozenset[str]] = frozenset()
    """The options that may have one entry per row of the weight in `ahead` and `pullback`."""

    @abstractmethod
    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        """The weight and the state after one step; differentiable in every tensor it is given.

        Equals `torch.optim` up to rounding. Nothing is changed in place.
        """

    def step_all(self, weights: Sequence[Weight]) -> list[tuple[Tensor, State]]:
        """`step` of many weights, without a graph; a rule may have a faster way."""
        with torch.no_grad():
            return [self.step(*weight) for weight in weights]

    def ahead(self, param: Tensor, grad: Tensor, state: State, options: Options) -> Tensor:
        """The weight after one step, as `step`, without a graph; a rule may have a faster way."""
        return self.step(param, grad, state, options)[0].detach()

    def pullback(
        self, v: Tensor, param: Tensor, grad: Tensor, state: State, options: Options
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(dU/dg)^T v, and v . dU/dphi for every option that is a tensor requiring a gradient.

        Args:
            v: gradient of some loss with respect to theta', shaped like `param`.

        Returns:
            a tensor shaped like `param`, and option -> tensor shaped like the option.

        This default differentiates `step`; a rule overrides it with a closed form where that is
        cheaper, and the tests hold the two against each other.
        """
        grad = grad.detach().requires_grad_()
        tuned = {name: options[name].detach().requires_grad_() for name in tuned_options(options)}
        with torch.enable_grad():
            new, _ = self.step(param.detach(), grad, state, {**options, **tuned})
        if not new.requires_grad:  # such as a step of Muon, none of whose options is tuned
            return torch.zeros_like(v), {}
        w, *rest = torch.autograd.grad(new, [grad, *tuned.values()], v, materialize_grads=True)
        return w, dict(zip(tuned, rest, strict=True))


@dataclass(frozen=True)
class Update:
    """How one weight is updated: its rule and its options."""

    rule: UpdateRule
    options: Options


def read_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A `param_group` without its params; `betas` becomes beta1 and beta2."""
    options = {name: x for name, x in group.items() if name not in ("params", "betas")}
    if "betas" in group:
        options["beta1"], options["beta2"] = group["betas"]
    return options


def read_option(group: Mapping[str, Any], option: str) -> float:
    """One option of a `param_group` as a number."""
    if option in ("beta1", "beta2"):
        return float(group["betas"][option == "beta2"])
    return float(group[option])


def write_option(group: dict[str, Any], option: str, value: float) -> None:
    """Set one option of a `param_group`; the inverse of `read_option`."""
    if option in ("beta1", "beta2"):
        beta1, beta2 = group["betas"]
        group["betas"] = (value, beta2) if option == "beta1" else (beta1, value)
    elif isinstance(group[option], Tensor):
        group[option].fill_(value)
    else:
        group[option] = value


def tuned_options(options: Options) -> list[str]:
    """The options that are being tuned: tensors that require a gradient."""
    return [name for name, x in options.items() if isinstance(x, Tensor) and x.requires_grad]


def numbers(options: Options, but: Collection[str] = ()) -> dict[str, Any]:
    """Options without tensors, `but` left out."""
    return {name: x.item() if isinstance(x, Tensor) else x for name, x in options.items() if name not in but}


def is_zero(option: float | Tensor) -> bool:
    """Whether an option is the constant 0, whose term can be left out."""
    return not isinstance(option, Tensor) and option == 0


def plain(x: float | Tensor) -> float | Tensor:
    """A scalar of the state as a number, as torch reads it; unchanged if it carries a graph."""
    return x.item() if isinstance(x, Tensor) and not x.requires_grad else x


def step_number(state: State) -> int:
    """t of the step about to be taken; 1 before the first."""
    return int(state["step"]) + 1 if "step" in state else 1


def decayed(
    param: Tensor, grad: Tensor, options: Options, *, decoupled: bool = False
) -> tuple[Tensor, Tensor]:
    """Where the step starts and what it descends, (theta, g~), after `maximize` and `weight_decay`.

    coupled (an L2 penalty):  theta,                          g~ = +-g + weight_decay theta
    decoupled:                theta - lr weight_decay theta,  g~ = +-g
    """
    decay = options["weight_decay"]
    total = -grad if options.get("maximize", False) else grad
    if is_zero(decay):
        return param, total
    if decoupled:
        return param - (options["lr"] * decay) * param, total
    return param, total + decay * param


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt(x) with derivative 0 instead of infinity at 0, for denominators sqrt(x) + eps.

    An average of squared gradients is 0 only where every gradient so far was, and there the
    numerator, which multiplies this derivative, is 0 as well.
    """
    positive = x > 0
    return torch.where(positive, x, 1).sqrt() * positive
