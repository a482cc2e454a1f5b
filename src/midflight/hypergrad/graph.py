"""The graph that torch records of a loss: its nodes and its leaves."""

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.autograd.graph import Node

from midflight.errors import NotTwiceDifferentiable

Pairs = list[tuple[Tensor, Tensor]]
"""(a function of the hyperparameters, the cotangent to pull back through it)"""


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """The nodes of the recorded graphs behind these tensors, each once."""
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
    """The leaf tensors that `loss.backward()` would give a gradient."""
    return [node.variable for node in graph_nodes([loss]) if hasattr(node, "variable")]


_DEAD_ENDS = {f"torch::autograd::{name}" for name in ("Error", "DelayedError", "NotImplemented")}


def require_twice_differentiable(grads: Iterable[Tensor]) -> None:
    """Raise `NotTwiceDifferentiable` if a part of these gradients was recorded as a constant.

    torch leaves a node in such a place that raises when it is run; but it is cut off from the
    hyperparameters, so that torch would never run it and the missing part would go unnoticed.
    """
    for node in graph_nodes(grads):
        if node.name() in _DEAD_ENDS:
            raise NotTwiceDifferentiable(
                "each operation of the training loss must be differentiable twice for this estimator, but "
                "one is differentiable once only; use estimator='central_difference'."
            )
