"""Compute with named tensors, name -> tensor."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def detach(tree: Mapping[str, Tensor]) -> Tensors:
    """Return the same storage without its autograd graph."""
    return {name: t.detach() for name, t in tree.items()}


def unalias(tree: Mapping[str, Tensor]) -> Tensors:
    """Copy entries that alias another or themselves, so that each can be written in place.

    For f(a + b) torch returns one tensor as both gradients. For sum(a) it returns one expanded number.
    """
    shared = Counter(t.untyped_storage().data_ptr() for t in tree.values())
    return {
        name: t.clone() if shared[t.untyped_storage().data_ptr()] > 1 or 0 in t.stride() else t
        for name, t in tree.items()
    }


def leaves(tree: Mapping[str, Tensor]) -> Tensors:
    """Return the same storage as new leaves that require a gradient."""
    return {name: t.detach().requires_grad_() for name, t in tree.items()}


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product over all entries, a scalar tensor."""
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def norm(a: Mapping[str, Tensor]) -> Tensor:
    """Return the Euclidean norm over all entries, a scalar tensor."""
    length: Tensor = torch.stack(torch._foreach_norm(list(a.values()))).norm()
    return length


def add_scaled(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: Tensor | float) -> Tensors:
    """Return a + scale b, entry by entry."""
    return {name: a[name] + scale * b[name] for name in a}


def write(source: Tensor, into: Tensor) -> None:
    """Copy a tensor into another one, unless that has another shape or is expanded from fewer entries."""
    if source.shape == into.shape and not (0 in into.stride() and into.numel() > 1):
        into.copy_(source)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no entry is NaN or infinite."""
    present = [t for t in tensors if t.numel() and (t.is_floating_point() or t.is_complex())]
    if not present:
        return True
    largest = torch._foreach_norm(present, math.inf)
    together = torch.stack([x.to(largest[0]) for x in largest])
    return float(together.max()) < math.inf  # one synchronisation with a GPU; NaN is not below
