"""`one_step` with the mixed partial found in forward mode; nothing is recorded for a double backward."""

from midflight.hypergrad.mixed import forward_over_reverse as mixed_partial
from midflight.hypergrad.mixed import pullback
from midflight.problem import Step, reevaluates
from midflight.trees import Tensors


@reevaluates
def forward_over_reverse(step: Step) -> Tensors:
    """Exact for one step, as `one_step`.

    Costs one validation pass, one copy of the weights and one forward-mode pass over the loss with
    its reverse. Needs the loss as a function, and operations that know forward mode.
    """
    return pullback(step, step.valid_grad(step.next_params), mixed_partial)
