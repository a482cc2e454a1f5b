"""Compute with named tensors, name -> tensor, and with the parts of a batch."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from copy import copy
from typing import Any

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


def one_per_example(losses: Tensor, index: Tensor) -> Tensor:
    """Return losses of shape (B, ...) as their means over the rest, shape (B,).

    Raises:
        ValueError: the losses do not have one entry for each entry of `index`, shape (B,).
    """
    if losses.ndim == 0 or index.shape != losses.shape[:1]:
        raise ValueError(
            f"losses must have one entry for each of {index.numel()} examples, but have shape "
            f'{tuple(losses.shape)}; compute them with reduction="none", for all examples of the batch.'
        )
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def with_part(batch: Any, name: str, part: Any) -> Any:
    """Return a batch, or an example, with one more part: under its name in a dict, else at the end."""
    if isinstance(batch, Mapping):
        found = copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        found[name] = part
        return found
    return (*batch, part) if isinstance(batch, tuple | list) else (batch, part)
