"""What an estimator of the hypergradient is.

An estimator says where it wants v = dC2/dtheta (`at`), and is called with it. Control flows one way: the
caller asks for the place, takes v there, and hands it down.
"""

from typing import Protocol, runtime_checkable

from midflight._tensors import Tensors
from midflight.hypergrad.problem import Step


@runtime_checkable
class Estimator(Protocol):
    """The hypergradient of one optimiser step.

    Attributes:
        mixed: how the mixed partial must be found: "double backward", "forward mode" or "difference"; None
            leaves the choice to the caller.
        needs_train_loss: whether `Step.train_loss` is evaluated.
    """

    @property
    def mixed(self) -> str | None: ...

    @property
    def needs_train_loss(self) -> bool: ...

    def at(self, step: Step) -> Tensors:
        """The weights at which v is taken, name -> tensor, shaped like step.params."""

    def __call__(self, step: Step, v: Tensors) -> Tensors:
        """The hypergradient.

        Args:
            step: the optimiser step.
            v: dC2/dtheta at the weights that `at` gave; used up.

        Returns:
            name -> tensor shaped like step.hparams, for the hyperparameters that the step depends on.
        """
