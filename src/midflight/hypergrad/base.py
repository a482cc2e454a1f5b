"""Define the interface of an estimator of the hypergradient.

The caller asks `at` for the weights, computes v = dC2/dtheta at these weights and passes v in.
"""

from typing import Protocol, runtime_checkable

from midflight._tensors import Tensors
from midflight.hypergrad.problem import Step


@runtime_checkable
class Estimator(Protocol):
    """Compute the hypergradient of one optimiser step.

    Attributes:
        mixed: required method for the mixed partial, a name in `mixed.METHODS`; None: the caller chooses.
        needs_train_loss: whether the estimator evaluates `Step.train_loss`.
    """

    @property
    def mixed(self) -> str | None: ...

    @property
    def needs_train_loss(self) -> bool: ...

    def at(self, step: Step) -> Tensors:
        """Return the weights at which v is taken, name -> tensor, shaped like step.params."""

    def __call__(self, step: Step, v: Tensors) -> Tensors:
        """Return the hypergradient.

        Args:
            step: the optimiser step.
            v: dC2/dtheta at the weights that `at` returned; overwritten.

        Returns:
            name -> tensor shaped like step.hparams, for the hyperparameters that the step depends on.
        """
