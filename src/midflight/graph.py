"""The graph that torch records of a loss: its nodes, its leaves, and its products with weights."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from midflight.errors import NotTwiceDifferentiable
from midflight.trees import Tensors

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
                "one is differentiable once only; use estimator='central_difference' and "
                "tuner.backward(lambda: loss_fn(model(x), y))."
            )


@dataclass(frozen=True)
class Factors:
    """The gradient of a weight as the two factors delta^T x of which it is made, for y = x W^T + b.

    <w, delta^T x> = <delta, x w^T>, so that a directional derivative needs thin products only, where the
    gradient itself, as large as the weight, would be made to be read once.

    Attributes:
        weight, bias: names; bias is None where there is none, or where its gradient is formed.
        x, version: the input, shape (..., in), with its graph, and how often it was changed in place by then.
        delta: d loss/dy, shape (..., out), with its graph.
    """

    weight: str
    bias: str | None
    x: Tensor
    version: int
    delta: Tensor

    @torch.no_grad()
    def along(self, w: Tensors) -> Pairs:
        """The pairs of <w, g>, of weight and bias together; none where `w` has none for the weight.

        Raises:
            RuntimeError: x was changed in place in the meantime, as torch would say of a double backward.
        """
        if self.weight not in w:
            return []
        if self.x._version != self.version:
            raise RuntimeError(
                f"the input of {self.weight} must stay as it was until the hyper-step is over, but it was "
                "changed in place; let the probe and the validation have tensors of their own."
            )
        weight, bias = w[self.weight], w.get(self.bias) if self.bias else None
        of_delta = F.linear(self.x.to(weight), weight, bias)
        return [(self.delta, of_delta), (self.x, self.delta.to(weight) @ weight)]


class Product(NamedTuple):
    """y = x W^T + b, as it was called; both y, kept as its edge, and x may be changed in place afterwards."""

    y: GradientEdge
    x: Tensor
    version: int
    weight: Tensor
    bias: Tensor | None


class Products(TorchFunctionMode):
    """Sees the calls of `F.linear` within it, as all of `nn.Linear` are, and changes nothing.

    Not those that somebody may have redefined: another function mode, or a tensor of a type of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Product] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and result.grad_fn is not None and not torch._C._len_torch_function_stack():
            x, weight, bias = _operands(*args, **(kwargs or {}))
            if set(types) <= {Tensor, nn.Parameter} and weight.ndim == 2 and not x.is_inference():
                self._seen.append(Product(get_gradient_edge(result), x, x._version, weight, bias))
        return result

    def sole_ways(self, loss: Tensor) -> list[Product]:
        """The products through which alone their weight reaches the loss; bias None if it has others.

        Not those whose operands have hooks, or whose x was changed since: torch may have kept a copy of it.
        Hooks of autograd nodes, and of modules in the old way (`register_backward_hook`), are not seen.
        """
        parents: dict[Node, list[Node]] = {}
        ends: dict[int, Node] = {}
        for node in graph_nodes([loss]):
            if hasattr(node, "variable"):
                ends[id(node.variable)] = node
            for following, _ in node.next_functions:
                if following is not None:
                    parents.setdefault(following, []).append(node)

        def leads_only_to(operand: Tensor | None, y: GradientEdge) -> bool:
            at = ends.get(id(operand))
            while at is not None and at is not y.node:
                above = parents.get(at, [])
                at = above[0] if len(above) == 1 else None
            return at is not None and operand is not None and not operand._backward_hooks

        return [
            product if leads_only_to(product.bias, product.y) else product._replace(bias=None)
            for product in self._seen
            if product.x._version == product.version and leads_only_to(product.weight, product.y)
        ]


def _operands(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias
