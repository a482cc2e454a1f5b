"""The training gradient as `loss.backward()` leaves it, and how it depends on the hyperparameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from midflight.capture import RandomState, buffers_apart, reevaluated
from midflight.graph import Factors, Products, graph_leaves, require_twice_differentiable
from midflight.hypergrad import Estimator
from midflight.hypergrad.mixed import is_linear, knows_forward_mode
from midflight.problem import TrainLoss, is_reevaluating
from midflight.space import Space
from midflight.trees import Tensors, detach, leaves

DOUBLE_BACKWARD = "double backward"
FORWARD_MODE = "forward over reverse: the loss is linear in what it reads of the space"
BY_ESTIMATOR = "by the estimator"


@dataclass(frozen=True)
class Dependence:
    """How the training gradient depends on the hyperparameters: in one of two ways, or not at all.

    Attributes:
        grads, factors: the gradients with their graph; see `Step`.
        train_loss: the loss as a function of weights and values, where the graph is not the way.
    """

    grads: Tensors = field(default_factory=dict)
    factors: Sequence[Factors] = ()
    train_loss: TrainLoss | None = None


class TrainingGradient:
    """Takes the training gradient of a live loop.

    Attributes:
        mixed_partial: how d/dlambda <w, g> is found; chosen when a function for the loss first comes.
    """

    def __init__(
        self, model: nn.Module, params: Mapping[str, Tensor], space: Space, estimate: Estimator
    ) -> None:
        self._model, self._params, self._space, self._estimate = model, params, space, estimate
        self._checked = False
        self.mixed_partial: str | None = None

    def take(
        self, loss: Tensor | Callable[[], Tensor], probe: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Dependence]:
        """Fill `.grad`, and say how the gradient depends on the hyperparameters.

        Args:
            loss: the training loss, or a function that computes it.
            probe: computes the same loss on fewer examples; all but `.grad` then comes from it.

        Returns:
            the loss, and how its gradient depends on the hyperparameters.
        """
        random = RandomState(self._params)
        again = probe or (loss if callable(loss) else None)
        function = again and reevaluated(self._model, again, self._space, random, self._params)
        if function is not None and self.mixed_partial is None:
            self.mixed_partial = self._choose(function)
        recorded = self.mixed_partial in (None, DOUBLE_BACKWARD)
        self._space.requires_grad_(recorded and probe is None)
        value = loss() if callable(loss) else loss
        found = Dependence()
        if probe is None:
            found = Dependence(self._backward(value))
        else:
            value.backward(inputs=self._split(value)[0])  # type: ignore[no-untyped-call]
            if recorded:
                self._space.requires_grad_()
                with random.replayed(), buffers_apart(self._model):
                    found = self._of_probe(probe)
        self._space.requires_grad_()
        return value, found if recorded else Dependence(train_loss=function)

    def _backward(self, loss: Tensor) -> Tensors:
        """Accumulate into `.grad`; give the gradients with their graph if the loss reads the space."""
        others, reads_space = self._split(loss)
        if not reads_space:
            loss.backward()  # type: ignore[no-untyped-call]
            return {}
        grads = self._differentiable(loss, others)
        for leaf, g in zip(others, grads, strict=True):
            leaf.grad = g.detach() if leaf.grad is None else leaf.grad + g.detach()
        return self._named(others, grads)

    def _of_probe(self, probe: Callable[[], Tensor]) -> Dependence:
        """Without `.grad` to be filled, the gradients of most weights need not be formed."""
        with Products() as products:
            loss = probe()
        others, reads_space = self._split(loss)
        if not reads_space:
            return Dependence()
        names = {id(p): name for name, p in self._params.items()}
        factored = [product for product in products.sole_ways(loss) if id(product.weight) in names]
        unformed = {id(operand) for product in factored for operand in (product.weight, product.bias)}
        formed = [leaf for leaf in others if id(leaf) not in unformed]
        inputs = [product.x for product in factored]
        found = self._differentiable(loss, [*formed, *(product.y for product in factored)], inputs)
        factors = [
            Factors(names[id(product.weight)], names.get(id(product.bias)), product.x, product.version, delta)
            for product, delta in zip(factored, found[len(formed) :], strict=True)
        ]
        return Dependence(self._named(formed, found[: len(formed)]), factors)

    def _split(self, loss: Tensor) -> tuple[list[Tensor], bool]:
        """The leaves of the loss that are no hyperparameters; and whether others are."""
        reached = graph_leaves(loss)
        raws = {id(raw) for raw in self._space.raws.values()}
        others = [leaf for leaf in reached if id(leaf) not in raws]
        return others, len(others) < len(reached)

    def _differentiable(self, loss: Tensor, at: list[Any], also: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """The gradients at tensors or edges, with their graph; `also` is what else will be differentiated."""
        grads = torch.autograd.grad(loss, at, create_graph=True)
        if not self._checked:
            require_twice_differentiable([*grads, *also])
            self._checked = True
        return grads

    def _named(self, at: list[Tensor], grads: tuple[Tensor, ...]) -> Tensors:
        by_id = {id(leaf): g for leaf, g in zip(at, grads, strict=True) if g.requires_grad}
        return {name: by_id[id(p)] for name, p in self._params.items() if id(p) in by_id}

    def _choose(self, train_loss: TrainLoss) -> str:
        """Forward mode where it is cheaper: the loss is linear in every hyperparameter that it reads."""
        if is_reevaluating(self._estimate):
            return BY_ESTIMATOR
        params = detach(self._params)
        values = leaves({name: self._space[name].value for name in self._space})
        try:
            linear = is_linear(train_loss, params, values)
        except CheckpointError:  # which compute again when the weights are no longer those given
            linear = False
        if linear and knows_forward_mode(train_loss, params, values):
            return FORWARD_MODE
        return DOUBLE_BACKWARD
