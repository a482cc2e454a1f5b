"""`one_step` with first derivatives only: a central difference of dC1~/dlambda along w.

    d/dlambda <w, g> ~ (dC1~/dlambda(theta + e w) - dC1~/dlambda(theta - e w)) / 2e

For code that cannot be differentiated twice (fused attention, cuDNN's recurrent layers, compiled
graphs). Both passes see the same random numbers: fresh noise would be all that is left.
"""

from functools import partial

import torch

from midflight.hypergrad.mixed import difference_along, pullback
from midflight.problem import Step, reevaluates
from midflight.trees import Tensors


@reevaluates
def central_difference(step: Step, epsilon: float | None = None) -> Tensors:
    """As `one_step` up to O(epsilon^2) and rounding; nothing is differentiated twice.

    Costs one validation pass, one copy of the weights and two more training passes. Needs the loss
    as a function.

    Args:
        step: the optimiser step.
        epsilon: length of the difference relative to |theta|. If not given, a 300th of the cube root
            of the rounding unit, 1.6e-5 in float32 and 2e-8 in float64: the cube root would balance
            truncation and rounding in a typical direction, but w singles out the weights to which
            Adam gives long steps, and the loss bends about 300 times faster along it
            (docs/LOG.md).
    """
    if epsilon is None:
        epsilon = max(torch.finfo(p.dtype).eps for p in step.params.values()) ** (1 / 3) / 300
    return pullback(step, step.valid_grad(step.next_params), partial(difference_along, epsilon=epsilon))
