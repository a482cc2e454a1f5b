"""Named tensors: the one data structure of the mathematics."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def detach(tree: Mapping[str, Tensor]) -> Tensors:
    """The same storage without its autograd graph."""
    return {name: t.detach() for name, t in tree.items()}


def leaves(tree: Mapping[str, Tensor]) -> Tensors:
    """The same storage as fresh leaves that require a gradient."""
    return {name: t.detach().requires_grad_() for name, t in tree.items()}


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)
