"""Define the base class of the estimators of the hypergradient.

`hypergradient`, `Population` and `Tuner(horizon="step")` ask `at` for weights, compute v = dC2/dtheta there
and pass v in. `Tuner(horizon="run")` does not ask. It takes v at averaged weights, and uses `one_step` for
options of the step, such as lr. So an estimator must not assume that v belongs to the weights of `at`.

An estimator sees the validation loss C2 only through v. It can neither evaluate C2 nor get a second v.
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
    """Whether `mf.Tuner` adds the effect through running statistics, such as those of BatchNorm.

    True for an estimate of the whole step; False for a formula that stays as published.
    """

    def at(self, step: Step) -> Tensors:
        """Return the weights at which v should be taken, shaped like step.params; by default theta'."""
        return step.next_params()

    @abstractmethod
    def __call__(self, step: Step, v: Tensors) -> Tensors:
        """Return the hypergradient.

        Args:
            step: the optimiser step.
            v: dC2/dtheta, weight name -> tensor; the estimator may overwrite it.

        Returns:
            name -> tensor shaped like step.hparams, for the hyperparameters that the step depends on. Give
            zeros for one whose effect is ignored; a missing one counts as not reached, which is an error.
        """
