"""The derivative of the validation loss after several optimiser steps.

    d/dh C2(theta_K),   theta_{k+1}, s_{k+1} = U(theta_k, s_k, dC1~/dtheta(theta_k, h), h)

(Maclaurin et al. 2015; truncated: Shaban et al. 2019.)
"""

from midflight.problem import Step, gradient, reevaluates
from midflight.trees import Tensors, detach, leaves
from midflight.updates import State


@reevaluates
def unrolled(step: Step, steps: int = 5) -> Tensors:
    """Exact for `steps` steps on the current batch, moments of the optimiser included.

    Costs `steps` double backwards and one validation pass; holds `steps` copies of the weights, of
    the state and of the training graph. Needs the loss as a function.

    Args:
        step: the optimiser step.
        steps: how far it looks ahead; 1 is `one_step`.
    """
    train_loss = step.training_loss()
    params = leaves(step.params)
    state: dict[str, State] = dict(step.state)
    for _ in range(steps):
        grads = gradient(train_loss(params, step.values), params, create_graph=True)
        new = {}
        for name, u in step.updates.items():
            new[name], state[name] = u.rule.step(params[name], grads[name], state[name], u.options)
        params = new
    v = step.valid_grad(lambda: detach(params))
    return step.chain([(params[name], v[name]) for name in params])
