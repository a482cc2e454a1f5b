"""Named tensors: the one data structure of the mathematics."""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def detach(tree: Mapping[str, Tensor]) -> Tensors:
    """The same storage without its autograd graph."""
    return {name: t.detach() for name, t in tree.items()}


def unalias(tree: Mapping[str, Tensor]) -> Tensors:
    """Copy entries that share memory with another or with themselves, so that each can be written in place.

    The gradients a and b of f(a + b) are one tensor, and that of sum(a) is one number.
    """
    shared = Counter(t.untyped_storage().data_ptr() for t in tree.values())
    return {
        name: t.clone() if shared[t.untyped_storage().data_ptr()] > 1 or 0 in t.stride() else t
        for name, t in tree.items()
    }


def leaves(tree: Mapping[str, Tensor]) -> Tensors:
    """The same storage as fresh leaves that require a gradient."""
    return {name: t.detach().requires_grad_() for name, t in tree.items()}


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """The inner product over all entries, a scalar tensor."""
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def norm(a: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm over all entries, a scalar tensor."""
    return dot(a, a).sqrt()


def add_scaled(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: Tensor | float) -> Tensors:
    """a + scale b, entry by entry."""
    return {name: a[name] + scale * b[name] for name in a}


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)
