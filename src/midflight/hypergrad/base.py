"""The interface of an estimator of the hypergradient.

The caller asks the estimator where it needs v = dC2/dtheta (`at`), computes v there, and passes it in.
"""

from typing import Protocol, runtime_checkable

from midflight._tensors import Tensors
from midflight.hypergrad.problem import Step


@runtime_checkable
class Estimator(Protocol):
    """A method to compute the hypergradient of one optimiser step.

    Attributes:
        mixed: how the mixed partial must be computed: "double backward", "forward mode" or "difference"; None
            leaves the choice to the caller.
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
