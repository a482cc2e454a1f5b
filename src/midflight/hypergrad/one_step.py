"""Differentiate the validation loss after one optimiser step.

    d/dh C2(U(theta, s, dC1~/dtheta(theta, h), h))              (Luketina et al. 2016, Eq. 4, for any U)

v = dC2/dtheta is taken after the step (exact) or before it (cheaper).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from midflight._tensors import Tensors
from midflight.hypergrad.base import Estimator
from midflight.hypergrad.mixed import through_step
from midflight.hypergrad.problem import Step


@dataclass(frozen=True)
class OneStep(Estimator):
    """Estimate exactly for one step; ignore effects beyond it.

    Costs one validation pass and one copy of the weights. If the training loss reads a hyperparameter, one
    mixed partial is added.

    Args:
        place: "next" takes v at theta', which gives the exact derivative. "current" takes it at theta, which
            is off by O(learning rate) and needs no copy of the weights.
        mixed: required method for the mixed partial; see `Estimator`.
    """

    place: Literal["next", "current"] = "next"
    mixed: str | None = None
    through_statistics: ClassVar = True

    def at(self, step: Step) -> Tensors:
        return step.next_params() if self.place == "next" else step.params

    def __call__(self, step: Step, v: Tensors) -> Tensors:
        return through_step(step, v)


one_step = OneStep()
one_step_cheap = OneStep("current")
forward_over_reverse = OneStep(mixed="forward mode")
central_difference = OneStep(mixed="difference")
