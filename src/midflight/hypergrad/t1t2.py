"""Estimate by T1-T2 as printed: treat any optimiser as gradient descent with learning rate eta.

dC2/dlambda = -eta d/dlambda <dC2/dtheta(theta'), dC1~/dtheta>     (Luketina et al. 2016, Eq. 4 and 5)
"""

from dataclasses import replace

from midflight._tensors import Tensors
from midflight.hypergrad.base import Estimator
from midflight.hypergrad.mixed import through_step
from midflight.hypergrad.problem import Step
from midflight.updates import SGD, Update

_PLAIN = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, "maximize": False}


class T1T2(Estimator):
    """Estimate without the optimiser's preconditioner and momentum; exact for plain SGD only.

    Costs as much as `one_step`. Treats a tuned weight decay as coupled L2.
    """

    def __call__(self, step: Step, v: Tensors) -> Tensors:
        plain = {
            name: Update(SGD(), _PLAIN | {k: u.options[k] for k in ("lr", "weight_decay")})
            for name, u in step.updates.items()
        }
        return through_step(replace(step, updates=plain), v)


t1t2 = T1T2()
