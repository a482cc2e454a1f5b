"""Limit how far one hyper-step moves lr, momentum and other options of a step.

They act on all weights at each step. So their steps are shorter than those of other hyperparameters, and in
units of the option: a factor for lr, a factor of 1 - beta for what must stay below 1.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from midflight.space.transforms import Linear, Transform
from midflight.tuner.binding import BELOW_ONE
from midflight.updates.base import tuned_options

LENGTHS = {"lr", "momentum"}
"""Options that set the length of steps: they are proportional to lr and to 1 / (1 - momentum)."""
USUAL, USUAL_OF_OTHERS = 2.5, 0.1
"""The usual width of a range, in units of ln(option): of LENGTHS, and of all others. It is small for others,
because one step does not show what a longer memory does, such as a higher beta1."""
LEAST = 1e-3
"""The smallest stride on a linear scale, so that a value can leave 0."""
RISKY = {"lr", "momentum", "beta1"}
"""Options that step back when a run diverges."""
CUT, LOGITS = 0.3, 1.0
"""They step back by the factor CUT, or by LOGITS on a logit scale if they must stay below 1."""
ERASED = 10.0
"""No hyper-step raises weight decay so far that, at the present learning rate, it would shrink weights
without a gradient by more than the factor exp(-ERASED) in the whole run. Over one step a smaller network
often validates better, even where a higher weight decay harms the trained one."""


def stride(option: str, transform: Transform, raw: Tensor) -> float | Tensor:
    """Return min(1, usual width / width of the range), a number or shaped like raw."""
    usual = USUAL if option in LENGTHS else USUAL_OF_OTHERS
    if not isinstance(transform, Linear):
        return transform.stride(raw, usual)
    return (usual * _unit(option, transform.value(raw).abs()) / transform.width).clamp(LEAST, 1.0)


def stepped_back(option: str, value: Tensor) -> Tensor:
    """Return the value that a risky option has after a run has diverged with this value."""
    if option in BELOW_ONE:
        return (value.clamp(1e-6, 1 - 1e-6).logit() - LOGITS).sigmoid()
    return CUT * value


def slopes_of_length(options: Mapping[str, Any]) -> list[tuple[Tensor, float]]:
    """Return (option, d log(length of a step) / d option) for the tuned options of LENGTHS."""
    found = []
    for name in LENGTHS & set(tuned_options(options)):
        unit = float(_unit(name, options[name].detach()))
        if unit > 0:
            found.append((options[name], 1 / unit))
    return found


def _unit(option: str, value: Tensor) -> Tensor:
    """Return d value / d logarithm of the value, or of 1 / (1 - value) for what must stay below 1."""
    return 1 - value if option in BELOW_ONE else value
