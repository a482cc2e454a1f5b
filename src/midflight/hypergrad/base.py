"""Define the base class of the estimators of the hypergradient.

The caller asks `at` for weights, computes v = dC2/dtheta and passes v in. An estimator sees the validation loss
C2 only through this one v: it can neither evaluate C2 nor ask for a second gradient.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from midflight._tensors import Tensors
from midflight.hypergrad.problem import Step


class Estimator(ABC):
    """Compute the hypergradient of one optimiser step."""

    @property
    def mixed(self) -> str | None:
        """The method required for the mixed partial, a name in `mixed.METHODS`; None: the caller chooses."""
        return None

    needs_train_loss: ClassVar[bool] = False
    """Whether the estimator evaluates `Step.train_loss`."""
    through_statistics: ClassVar[bool] = False
    """Whether `Tuner` adds what reaches C2 through running statistics, such as those of BatchNorm.

    True for an estimate of the whole step; False for one that stays as published.
    """

    def at(self, step: Step) -> Tensors:
        """Return the weights at which v is taken, name -> tensor, shaped like step.params; by default theta'.

        `Tuner(horizon="run")` does not call this: it takes v at averaged weights (see `Averaged`).
        """
        return step.next_params()

    @abstractmethod
    def __call__(self, step: Step, v: Tensors) -> Tensors:
        """Return the hypergradient.

        Args:
            step: the optimiser step.
            v: dC2/dtheta at the weights of `at`, or where the horizon takes it; may be overwritten.

        Returns:
            name -> tensor shaped like step.hparams, for the hyperparameters that the step depends on.
        """
