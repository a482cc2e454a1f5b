"""Define the interface of an update rule: one optimiser step as a pure function, with exact derivatives.

theta' = U(theta, s, g, phi): weights theta, optimiser state s, gradient g, options phi. In the formulas a
prime marks a value after the step. t counts the steps from 1, and g~ is g with weight decay.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Options = Mapping[str, Any]
"""A torch `param_group` as `read_options` returns it; a tunable option may be a tensor."""

State = Mapping[str, Tensor]
"""The optimiser's state of one weight, under the names of `torch.optim`; empty before the first step."""

Weight = tuple[Tensor, Tensor, State, Options]
"""A weight, its gradient, its state and its options."""


class UpdateRule(ABC):
    """One optimiser step theta' = U(theta, s, g, phi) of one weight tensor."""

    tunable: ClassVar[frozenset[str]]
    """Options with respect to which the step can be differentiated."""
    elementwise: ClassVar[bool] = True
    """Whether each entry of theta' depends only on the same entry of theta, s and g, and on scalars."""
    why_not_differentiable: ClassVar[str] = ""
    """Why dU/dg is 0 almost everywhere, as "rounds its step to bfloat16"; "" for a differentiable step."""
    decoupled: ClassVar[bool] = False
    """Whether weight decay shrinks theta instead of changing g~.

    If the optimiser has an option `decoupled_weight_decay`, as Adam, that decides.
    """
    certain: ClassVar[bool] = True
    """Whether the rule is known to equal the optimiser; otherwise it is compared with real steps of a run."""
    one_pass: ClassVar[bool] = False
    """Whether `ahead` and `pullback` pass over memory once, so that splitting a weight gains nothing."""
    per_row_options: ClassVar[frozenset[str]] = frozenset()
    """Options that `ahead` and `pullback` accept with one entry per row of the weight."""

    @abstractmethod
    def step(self, param: Tensor, grad: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
        """Return the weight and the state after one step, differentiable in every tensor argument.

        Equals `torch.optim` up to rounding. Changes nothing in place.
        """

    def step_all(self, weights: Sequence[Weight]) -> list[tuple[Tensor, State]]:
        """Apply `step` to many weights without a graph; a rule may override this with a faster method."""
        with torch.no_grad():
            return [self.step(*weight) for weight in weights]

    def require_usable(self, weights: Sequence[Weight]) -> None:
        """Raise `UnsupportedOptimizer` if the first step of a run shows that the rule does not hold."""
        return

    def shrinkage(self, options: Options) -> float:
        """Return the share by which weight decay in one step shrinks the weights in the end, per unit of it.

        It is 0 if this differs from entry to entry, as for coupled weight decay under Adam.
        """
        decoupled = options.get("decoupled_weight_decay", self.decoupled)
        return float(numbers(options, but=("weight_decay",))["lr"]) if decoupled else 0.0

    def ahead(self, param: Tensor, grad: Tensor, state: State, options: Options) -> Tensor:
        """Return the weight after one step without a graph; a rule may override this with a faster method."""
        return self.step(param, grad, state, options)[0].detach()

    def pullback(
        self, v: Tensor, param: Tensor, grad: Tensor, state: State, options: Options
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return w = (dU/dg)^T v, and v . dU/dphi for every option that is a tensor requiring a gradient.

        Args:
            v: gradient of a loss with respect to theta', shaped like `param`.

        Returns:
            w, shaped like `param`, and option -> tensor shaped like the option.

        This default differentiates `step`. A rule overrides it where a closed form is cheaper; the tests
        compare the two.
        """
        grad = grad.detach().requires_grad_()
        tuned = {name: options[name].detach().requires_grad_() for name in tuned_options(options)}
        with torch.enable_grad():
            new, _ = self.step(param.detach(), grad, state, {**options, **tuned})
        if not new.requires_grad:  # for example Muon without a tuned option
            return torch.zeros_like(v), {}
        w, *rest = torch.autograd.grad(new, [grad, *tuned.values()], v, materialize_grads=True)
        return w, dict(zip(tuned, rest, strict=True))


@dataclass(frozen=True)
class Update:
    """The rule and the options by which one weight is updated."""

    rule: UpdateRule
    options: Options


def read_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `param_group` without its params, and with a pair of `betas` split into beta1 and beta2."""
    options = {name: x for name, x in group.items() if name != "params"}
    if len(options.get("betas", ())) == 2:
        options["beta1"], options["beta2"] = options.pop("betas")
    return options


def read_option(group: Mapping[str, Any], option: str) -> float:
    """Return one option of a `param_group` as a number."""
    if option in ("beta1", "beta2"):
        return float(group["betas"][option == "beta2"])
    return float(group[option])


def write_option(group: dict[str, Any], option: str, value: float) -> None:
    """Set one option of a `param_group`; the inverse of `read_option`."""
    if option in ("beta1", "beta2"):
        betas = list(group["betas"])
        index = int(option == "beta2")
        if isinstance(betas[index], Tensor):
            betas[index].fill_(value)
        else:
            betas[index] = value
            group["betas"] = type(group["betas"])(betas)
    elif isinstance(group[option], Tensor):
        group[option].fill_(value)
    else:
        group[option] = value


def tuned_options(options: Options) -> list[str]:
    """Return the names of the tuned options: tensors that require a gradient."""
    return [name for name, x in options.items() if isinstance(x, Tensor) and x.requires_grad]


def numbers(options: Options, but: Collection[str] = ()) -> dict[str, Any]:
    """Return the options with tensors of one entry as numbers, without those named in `but`."""
    given = {name: x for name, x in options.items() if name not in but}
    return {name: x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for name, x in given.items()}


def is_zero(option: float | Tensor) -> bool:
    """Return whether an option is the constant 0, so that its term can be left out."""
    return not isinstance(option, Tensor) and option == 0


def plain(x: float | Tensor) -> float | Tensor:
    """Return a scalar of the state as a number, as torch reads it; unchanged if it carries a graph."""
    return x.item() if isinstance(x, Tensor) and not x.requires_grad else x


def step_number(state: State) -> int:
    """Return t of the next step; 1 before the first step."""
    return int(state["step"]) + 1 if "step" in state else 1


def decayed(
    param: Tensor, grad: Tensor, options: Options, *, decoupled: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply `maximize` and `weight_decay`; return (theta, g~), the start and the gradient of the step.

    coupled (an L2 penalty):  theta,                          g~ = +-g + weight_decay theta
    decoupled:                theta - lr weight_decay theta,  g~ = +-g

    If the optimiser has an option `decoupled_weight_decay`, that decides instead of the argument.
    """
    decay = options["weight_decay"]
    decoupled = options.get("decoupled_weight_decay", decoupled)
    total = -grad if options.get("maximize", False) else grad
    if is_zero(decay):
        return param, total
    if decoupled:
        return param - (options["lr"] * decay) * param, total
    return param, total + decay * param


def safe_sqrt(x: Tensor) -> Tensor:
    """Return sqrt(x) with derivative 0 instead of infinity at 0, for denominators sqrt(x) + eps.

    An average of squared gradients is 0 only where every gradient so far was 0. There the numerator, which
    multiplies this derivative, is 0 too.
    """
    positive = x > 0
    return torch.where(positive, x, 1).sqrt() * positive
