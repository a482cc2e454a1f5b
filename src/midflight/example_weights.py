"""Tune a weight for each training example, while the model trains.

    C1 = mean over the batch of w_i loss_i,   0 <= w_i <= 1

    dC2/dw_i = <w*, gradient of loss_i> / batch size,   w* = (dU/dg)^T v           (`hypergrad.mixed`)

C1 is the training loss, C2 the validation loss, U the optimiser's step from the training gradient g, and v
the gradient of C2. So a weight falls if training on its example raises the validation loss, as training on
a wrong label does. Ren et al. 2018 (Eq. 5, 6) take this derivative at w = 0 for plain SGD, and forget it
after the step. Here it is that of the optimiser's own step. One derivative says little about an example, so
a weight adds up many.

All examples of a batch share w*, so the sizes of their hypergradients can be compared. A weight moves by
its hypergradient over the root mean square in the batch, times the number of batches in a pass. The weights
of all other examples stay (`SignSteps.move_by_size`). The mean divides by the batch size, not by the sum of
the weights, because the weights would then compete.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from midflight._tensors import one_per_example, with_part
from midflight.errors import SpaceError
from midflight.space.hyperparameter import Hyperparameter
from midflight.space.specs import PerExample


class ExampleWeights(Hyperparameter):
    """The weights of the training examples: numbers in [0, 1], all 1 at first.

        weights = mf.ExampleWeights(len(dataset))
        space = mf.Space(weights=weights)
        loader = weights.loader(dataset, batch_size=100)                  # of (x, y, index)

        def loss_fn(model, batch):
            x, y, index = batch
            return weights.loss(F.cross_entropy(model(x), y, reduction="none"), index)

    A weight moves only when the training batch that the tuner reads has its example. So give the tuner larger
    batches than the loop has, such as `weights.loader(dataset, batch_size=1000)`. It uses all their examples.

    Args:
        n: how many training examples there are.

    Raises:
        SpaceError: n is not a whole number of at least 1.
    """

    def __init__(self, n: int) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise SpaceError(f"n must be a whole number of at least 1, but n={n!r}.")
        super().__init__(
            "example_weights", PerExample(0.0, 1.0, init=1.0, shape=(n,)), torch.get_default_dtype()
        )

    def loss(self, losses: Tensor, index: Tensor) -> Tensor:
        """Return the weighted loss of a batch, shape (); differentiable in the weights.

        Args:
            losses: one loss per example, shape (B,) or (B, ...); the mean over the rest is taken.
            index: which training examples these are, whole numbers, shape (B,).

        Raises:
            ValueError: there is not one loss per example.
        """
        losses = one_per_example(losses, index)
        return (self.value[index.to(self.raw.device)].to(losses) * losses).mean()

    def lowest(self, k: int) -> Tensor:
        """Return the indices of the k examples with the lowest weights, the lowest first, shape (k,)."""
        return self.value.detach().argsort(stable=True)[:k]

    def loader(self, dataset: Dataset[Any], batch_size: int, **options: Any) -> "DataLoader[Any]":
        """Return a loader of the training data, in random order, that also says which examples a batch has.

        A batch is what the dataset gives, with the indices at its end, or under "index" in a dict.

        Args:
            dataset: the training examples, in the order of the weights.
            batch_size: examples of a batch.
            options: further arguments of `torch.utils.data.DataLoader`, such as `num_workers`.

        Raises:
            ValueError: the dataset has another length.
        """
        size = len(dataset)  # type: ignore[arg-type]
        if size != len(self.raw):
            raise ValueError(
                f"there must be one example for each of {len(self.raw)} weights, but got {size}."
            )
        return DataLoader(_Indexed(dataset), batch_size, **{"shuffle": True, **options})


class _Indexed(Dataset[Any]):
    """Gives an example and its index."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return with_part(self.dataset[index], "index", index)
