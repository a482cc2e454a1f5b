"""The derivative of the validation loss after one optimiser step.

    d/dh C2(U(theta, s, dC1~/dtheta(theta, h), h))              (Luketina et al. 2016, Eq. 4, for any U)

with v = dC2/dtheta taken after the step (exact) or before it (cheap).
"""

from midflight.hypergrad.mixed import pullback
from midflight.problem import Step
from midflight.trees import Tensors


def one_step(step: Step) -> Tensors:
    """Exact for one step: v = dC2/dtheta taken at theta'; blind to effects beyond it.

    Costs one validation pass, one copy of the weights and, if the training loss reads a
    hyperparameter, one mixed partial.
    """
    return pullback(step, step.valid_grad(step.next_params))


def one_step_cheap(step: Step) -> Tensors:
    """The same with v taken at theta, before the step: off by O(learning rate), needs no copy."""
    return pullback(step, step.valid_grad(lambda: step.params))
