"""Read the graph that torch records of a loss: its nodes and its leaves."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from midflight.errors import NotTwiceDifferentiable

Pairs = list[tuple[Tensor, Tensor]]
"""Pairs of (tensor computed from the hyperparameters, cotangent to pull back through it)."""


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """Yield the nodes of the recorded graphs behind these tensors, each once."""
    todo = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def graph_leaves(loss: Tensor) -> list[Tensor]:
    """Return the leaf tensors to which `loss.backward()` would give a gradient."""
    return [node.variable for node in graph_nodes([loss]) if hasattr(node, "variable")]


def has_own_backward(loss: Tensor) -> bool:
    """Return whether code of the user's computes a part of the gradient of a loss.

    This code is an `autograd.Function`, or a hook of a module.
    """
    functions: Iterator[Any] = (type(n) for n in graph_nodes([loss]) if isinstance(n, BackwardCFunction))
    return any(
        f.__name__.startswith("BackwardHook") or not f._forward_cls.__module__.startswith("torch.")
        for f in functions
    )


_DEAD_ENDS = {f"torch::autograd::{name}" for name in ("Error", "DelayedError", "NotImplemented")}


def require_twice_differentiable(grads: Iterable[Tensor]) -> None:
    """Raise `NotTwiceDifferentiable` if torch recorded a part of these gradients as a constant.

    For such a part torch records a node that raises when it runs. No path leads from this node to the
    hyperparameters. So torch would never run it, and the hypergradient would silently lack this part.
    """
    for node in graph_nodes(grads):
        if node.name() in _DEAD_ENDS:
            raise NotTwiceDifferentiable(
                "each operation of the training loss must be differentiable twice for this estimator, but "
                "one is differentiable once only; use estimator='central_difference'."
            )
