"""Check that a gradient is the slope of its loss.

Hooks may change a gradient, a layer may reverse it, or a part of the loss may be detached. Then the gradient
v = dC2/dtheta is not the slope, and hypergradients are wrong.
"""

import math
from collections.abc import Callable

from midflight._tensors import Tensors
from midflight.errors import warn
from midflight.tuner.sharded import WHOLE, Parts

STEP = 1e-3
"""How far each weight is moved, relative to the norm of all weights."""
NOISE = 0.01
"""Nothing is checked if rounding is a larger part of the change of the loss, as in half precision."""
WRONG = 0.2
"""Relative difference from the slope beyond which a gradient is wrong."""


def warn_unless_slope(
    loss: Callable[[Tensors], float], at: Tensors, v: Tensors, rounding: float, parts: Parts = WHOLE
) -> None:
    """Warn if the validation loss rises along its gradient faster or more slowly than the gradient says.

    The direction has equal parts along the gradient of each weight, so that each counts.

    Args:
        loss: weights -> loss, with the same random numbers at each call.
        at: weights, name -> tensor.
        v: the gradient there, for some of the weights.
        rounding: absolute rounding of the loss.
        parts: sums over the processes, if the weights are sharded.
    """
    lengths = dict(zip(v, parts.norms([float(t.norm()) for t in v.values()]), strict=True))
    expected = sum(lengths.values())
    unit = STEP * float(parts.norm(at)) if at else 0.0
    if not rounding / NOISE < unit * expected < math.inf:
        return

    def moved(step: float) -> Tensors:
        return {
            name: at[name].to(t).add(t, alpha=step / lengths[name]).to(at[name])
            for name, t in v.items()
            if lengths[name]
        }

    long, short = ((loss(moved(e)) - loss(moved(-e))) / (2 * e) for e in (2 * unit, unit))
    off = abs(short - expected)
    if off > WRONG * max(abs(short), expected) and abs(long - short) < off / 4:
        times = f"{short / expected:.3g} times as fast"
        warn(
            f"the validation loss rises {times} along its gradient as the gradient says, and so "
            "hypergradients are wrong. The cause may be hooks that change gradients, gradient reversal or "
            "detached parts; leave them out in valid_loss_fn."
        )
