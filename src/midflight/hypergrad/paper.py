"""Estimate as printed in the paper "Online hyper-parameters optimization", to reproduce it.

    L2:     dC2/dlambda = -eta dC2/dtheta . theta                      (Eq. 5)
    noise:  dC2/dn0     = N(0, n0) . w0 . dC2/dw0                      (Eq. 6)

eta is the learning rate, n0 the noise magnitude. Eq. 5 is T1-T2 for plain gradient descent. Eq. 6 uses only
the validation pass and is not the derivative of C2 after the step. N(0, n0) is a fresh vector with one entry
per input and mean 0, so the estimate has mean 0 at every n0. `paper` is never a default.
"""

import torch
from torch import Tensor

from midflight._tensors import Tensors
from midflight.errors import UnreachedHyperparameter
from midflight.hypergrad.base import Estimator
from midflight.hypergrad.graph import Pairs
from midflight.hypergrad.problem import Step, reached
from midflight.updates import tuned_options


class Paper(Estimator):
    """Apply Eq. 5 to a weight decay bound to the optimiser and Eq. 6 to one other hyperparameter.

    w0 is the first matrix among the weights, shape (outputs, inputs).

    Raises:
        UnreachedHyperparameter: there is more than one other hyperparameter, or no matrix.
    """

    def __call__(self, step: Step, v: Tensors) -> Tensors:
        pairs: Pairs = []
        for name, u in step.updates.items():
            if "weight_decay" in tuned_options(u.options):
                decay, lr = u.options["weight_decay"], u.options["lr"]
                along = (v[name] * step.params[name]).sum_to_size(decay.shape)
                pairs.append((decay, -(lr.detach() if isinstance(lr, Tensor) else lr) * along))

        noises = _unbound(step, [decay for decay, _ in pairs])
        members = 0 if step.members is None else 1  # number of leading dimensions
        first = next((name for name, p in step.params.items() if p.ndim == members + 2), None)
        if noises and (len(noises) > 1 or first is None or step.hparams[noises[0]].ndim > members):
            raise UnreachedHyperparameter(
                "the estimator 'paper' allows one input noise of shape () beside weight decay, and needs a "
                f"weight matrix, but got {', '.join(noises)}; use 'one_step'."
            )
        if noises and first is not None:
            noise, weight = step.values[noises[0]], step.params[first]
            shape = (*weight.shape[:members], weight.shape[-1])
            draw = noise.detach().to(weight)[..., None] * torch.randn(
                shape, dtype=weight.dtype, device=weight.device
            )
            pairs.append((noise, torch.linalg.vecdot(draw, (weight * v[first]).sum(-2))))
        return step.chain(pairs)


paper = Paper()


def _unbound(step: Step, options: list[Tensor]) -> list[str]:
    """Return the hyperparameters on which none of these options depends."""
    bound = reached(options, step.hparams, [torch.ones_like(x) for x in options], retain_graph=True)
    return [name for name in step.hparams if name not in bound]
