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
        epsilon: length of the difference relative to |theta|; the cube root of the rounding unit,
            where truncation and rounding balance, if not given: 5e-3 in float32, 6e-6 in float64.
    """
    if epsilon is None:
        epsilon = max(torch.finfo(p.dtype).eps for p in step.params.values()) ** (1 / 3)
    return pullback(step, step.valid_grad(step.next_params()), partial(difference_along, epsilon=epsilon))
