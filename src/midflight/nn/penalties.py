"""Compute penalties of weights or activations; weight them by a hyperparameter and add them to the loss.

    loss + space["l1"] * l1(model.parameters())

The loss is linear in this hyperparameter, so its hypergradient does not vanish at 0. Any function of tensors
that returns a scalar can be a penalty.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from midflight.nn.magnitude import value_of
from midflight.space import Hyperparameter


def l1(weights: Iterable[Tensor]) -> Tensor:
    """Return sum |w| over all entries (Tibshirani 1996). Default range of its weight: 1e-7 to 1e-2, log."""
    return torch.stack([w.abs().sum() for w in weights]).sum()


def l2(weights: Iterable[Tensor]) -> Tensor:
    """Return sum w^2 / 2 over all entries. Default range of its weight: 1e-6 to 1e-1, log.

    Its gradient is w, so `h * l2(...)` in the loss equals the optimiser's coupled `weight_decay=h`. Weight
    decay in the optimiser is cheaper, but this penalty can exclude weights.
    """
    return torch.stack([w.square().sum() for w in weights]).sum() / 2


def activation_l2(*activations: Tensor) -> Tensor:
    """Return the sum of each activation's mean square (activation regularisation, Merity et al. 2017).

        hidden = body(x)
        loss = F.cross_entropy(head(hidden), y) + space["activation"] * activation_l2(hidden)

    Default range of its weight: 1e-4 to 10, log.
    """
    return torch.stack([a.square().mean() for a in activations]).sum()


def max_norm(weight: Tensor, limit: Hyperparameter | Tensor | float) -> Tensor:
    """Return sum max(0, |row| - limit)^2, a soft max-norm constraint (Srivastava et al. 2014, sec. 5.1).

    Args:
        weight: (units, ...), one row of incoming weights per unit.
        limit: positive, shape () or (units,). A tuned limit has derivative 0 unless some row is longer, so
            start low. Default range 0.5 to 5, log.

    Returns:
        a scalar; default range of its weight 1e-4 to 1, log.
    """
    squares = weight.flatten(1).square().sum(1)
    # sqrt has no second derivative at 0, where a row is below any limit
    norms = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
    return (norms - value_of(limit)).clamp(min=0).square().sum()


def orthogonality(weight: Tensor) -> Tensor:
    """Return |W W^T - 1|^2 in the Frobenius norm, or with W^T W if it is smaller (Brock et al. 2017, Eq. 2).

    Args:
        weight: (units, ...), read as a matrix with one row per unit.

    Returns:
        a scalar; default range of its weight 1e-6 to 1e-1, log.
    """
    w = weight.flatten(1)
    gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
    return (gram - torch.eye(len(gram), dtype=w.dtype, device=w.device)).square().sum()
