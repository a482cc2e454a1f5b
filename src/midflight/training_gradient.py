"""The training gradient as `loss.backward()` leaves it, and how it depends on the hyperparameters."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from midflight.capture import RandomState, buffers_apart, graph_leaves, reevaluated
from midflight.hypergrad import Estimator
from midflight.hypergrad.mixed import is_linear, knows_forward_mode
from midflight.problem import TrainLoss, is_reevaluating, require_twice_differentiable
from midflight.space import Space
from midflight.trees import Tensors, detach, leaves

DOUBLE_BACKWARD = "double backward"
FORWARD_MODE = "forward over reverse: the loss is linear in what it reads of the space"
BY_ESTIMATOR = "by the estimator"


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
    ) -> tuple[Tensor, Tensors, TrainLoss | None]:
        """Fill `.grad`, and say how the gradient depends on the hyperparameters.

        Args:
            loss: the training loss, or a function that computes it.
            probe: computes the same loss on fewer examples; all but `.grad` then comes from it.

        Returns:
            the loss, its gradients with their graph (empty if they have none), and the loss as a
            function of weights and values where the graph is not the way.
        """
        random = RandomState(self._params)
        again = probe or (loss if callable(loss) else None)
        function = again and reevaluated(self._model, again, self._space, random, self._params)
        if function is not None and self.mixed_partial is None:
            self.mixed_partial = self._choose(function)
        recorded = self.mixed_partial in (None, DOUBLE_BACKWARD)
        self._space.requires_grad_(recorded and probe is None)
        value = loss() if callable(loss) else loss
        grads: Tensors = {}
        if probe is None:
            grads = self._backward(value)
        else:
            value.backward(inputs=self._split(value)[0])  # type: ignore[no-untyped-call]
            if recorded:
                self._space.requires_grad_()
                with random.replayed(), buffers_apart(self._model):
                    grads = self._with_graph(probe())
        self._space.requires_grad_()
        return value, grads, None if recorded else function

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

    def _with_graph(self, loss: Tensor) -> Tensors:
        others, reads_space = self._split(loss)
        return self._named(others, self._differentiable(loss, others)) if reads_space else {}

    def _split(self, loss: Tensor) -> tuple[list[Tensor], bool]:
        """The leaves of the loss that are no hyperparameters; and whether others are."""
        reached = graph_leaves(loss)
        raws = {id(raw) for raw in self._space.raws.values()}
        others = [leaf for leaf in reached if id(leaf) not in raws]
        return others, len(others) < len(reached)

    def _differentiable(self, loss: Tensor, at: list[Tensor]) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(loss, at, create_graph=True)
        if not self._checked:
            require_twice_differentiable({str(i): g for i, g in enumerate(grads)})
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
        if is_linear(train_loss, params, values) and knows_forward_mode(train_loss, params, values):
            return FORWARD_MODE
        return DOUBLE_BACKWARD
