"""Define the bilevel problem and its linearisation at one optimiser step.

    theta' = U(theta, s, g, phi),   g = dC1~(theta, lambda)/dtheta,   minimise C2(theta') over lambda, phi

theta are the weights, C1~ is the training loss on one batch and C2 the validation loss. U is the optimiser's
update and s its state. lambda are the hyperparameters that the loss reads, phi the tuned options of the
optimiser. v is dC2/dtheta. For a given w, d/dlambda <w, g> is called the mixed partial.

`Problem` holds these as pure functions. Every estimator reads a `Step`, which describes one optimiser step of
a `Problem` or of a user's training loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from midflight._tensors import Tensors, leaves
from midflight.errors import UnreachedHyperparameter
from midflight.hypergrad.graph import Pairs
from midflight.updates import State, Updates, step_ahead

TrainLoss = Callable[[Tensors, Tensors], Tensor]
"""(weights, values of the hyperparameters) -> training loss, on one batch with the same random numbers."""


def gradient(loss: Tensor, params: Tensors, *, create_graph: bool = False) -> Tensors:
    """Return d loss/d params, name -> tensor; 0 for an entry that the loss does not use."""
    grads = torch.autograd.grad(
        loss, list(params.values()), create_graph=create_graph, materialize_grads=True
    )
    return dict(zip(params, grads, strict=True))


def reached(
    outputs: Sequence[Tensor], inputs: Tensors, cotangents: Sequence[Tensor] | None = None, **options: bool
) -> Tensors:
    """Return the gradients of the outputs at those inputs on which an output depends, name -> tensor.

    Args:
        outputs: those without a graph depend on no input.
        cotangents: one for each output; None for outputs of shape ().
        options: of `torch.autograd.grad`.
    """
    given: Sequence[Tensor | None] = cotangents or [None] * len(outputs)
    pairs = [(y, c if c is None else c.to(y)) for y, c in zip(outputs, given, strict=True) if y.requires_grad]
    if not pairs:
        return {}
    found = torch.autograd.grad(
        [y for y, _ in pairs], list(inputs.values()), [c for _, c in pairs], allow_unused=True, **options
    )
    return {name: g for name, g in zip(inputs, found, strict=True) if g is not None}


@dataclass(frozen=True)
class Problem:
    """Hold a training step and the validation loss as pure functions.

    Attributes:
        train_loss: C1~(params, hparams), a scalar; uses the same random numbers at every call.
        valid_loss: C2(params), a scalar.
        updates: hparams -> weight name -> `Update`; tuned options are functions of hparams.
    """

    train_loss: TrainLoss
    valid_loss: Callable[[Tensors], Tensor]
    updates: Callable[[Tensors], Updates]

    def train_grads(self, params: Tensors, hparams: Tensors, *, create_graph: bool = False) -> Tensors:
        """Return g(params, hparams), weight name -> tensor; 0 for a weight that the loss does not use."""
        return gradient(self.train_loss(params, hparams), params, create_graph=create_graph)

    def valid_grads(self, params: Tensors) -> Tensors:
        """Return dC2/dtheta at params, weight name -> tensor."""
        params = leaves(params)
        return gradient(self.valid_loss(params), params)


@dataclass(frozen=True)
class Dependence:
    """Describe how the training gradient g depends on the hyperparameters.

    Attributes:
        mixed_partial: w -> d/dhparams <w, g>, for those hparams that g depends on.
        others: g on the n examples that `mixed_partial` uses; None if these are the step's own examples.
        share: n/B, B the number of examples of a step. dU/dg is taken at (1 - share) g + share others. So its
            noise is correlated with that of dg/dlambda, as if both used the step's own examples.
    """

    mixed_partial: Callable[[Tensors], Tensors]
    others: Tensors | None = None
    share: float = 0.0


@dataclass(frozen=True)
class Step:
    """Hold one optimiser step before it is taken, with all that an estimator reads except v = dC2/dtheta.

    Attributes:
        params: theta, weight name -> tensor; not modified.
        grads: g as the optimiser receives it, without graph.
        state: optimiser state before the step, weight name -> state.
        updates: weight name -> rule and options; tuned options carry the graph to hparams.
        hparams: the tuned leaf tensors, name -> tensor.
        values: the values that the model sees, differentiable with respect to hparams.
        dependence: computes how g depends on hparams. Call it after v is known; it may hold much memory.
        train_loss: the training loss as a function; None in a population.
        clipped: w -> J^T w, J the Jacobian of what the loop does to the gradient between `backward` and
            `step`; None if it does nothing.
        members: size of a population, the first dimension of every tensor; None for a single training.
        shards: number of processes over which each weight is split; 1 for whole weights. If above 1, `params`
            and all other trees hold this process's parts. `chain` multiplies by this number, so that a mean
            over the processes is a sum over the parts.
    """

    params: Tensors
    grads: Tensors
    state: Mapping[str, State]
    updates: Updates
    hparams: Tensors
    values: Tensors
    dependence: Callable[[], Dependence]
    train_loss: TrainLoss | None = None
    clipped: Callable[[Tensors], Tensors] | None = None
    members: int | None = None
    shards: int = 1

    def next_params(self) -> Tensors:
        """Return theta' = U(theta, s, g, phi) without a graph, in new memory."""
        return step_ahead(self.params, self.grads, self.state, self.updates)

    def chain(self, pairs: Pairs) -> Tensors:
        """Return the sum of <cotangent, d output/d hparams> over the pairs (output, cotangent).

        The result has an entry for each of the hparams on which an output depends.
        """
        if self.shards > 1:
            pairs = [(output, self.shards * cotangent) for output, cotangent in pairs]
        return reached([output for output, _ in pairs], self.hparams, [cotangent for _, cotangent in pairs])


def double_backward(grads: Tensors, hparams: Tensors, w: Tensors) -> Tensors:
    """Return d/dhparams <w, g> through the recorded graph of g, reverse over reverse.

    Args:
        grads: g with its graph; entries without a graph do not depend on the hyperparameters.
        hparams: leaves of that graph.
        w: name -> tensor, for at least the names of grads that have a graph.

    Returns:
        name -> tensor, for the hparams that g depends on.
    """
    names = [name for name in grads if name in w]
    return reached([grads[name] for name in names], hparams, [w[name] for name in names])


def recorded(grads: Tensors, hparams: Tensors) -> Callable[[], Dependence]:
    """Return the `Step.dependence` for a g that was recorded with its graph."""
    return partial(Dependence, partial(double_backward, grads, hparams))


def added(a: Tensors, b: Tensors) -> Tensors:
    """Return a + b, where a missing entry counts as zero."""
    return {**a, **{name: a[name] + t if name in a else t for name, t in b.items()}}


def require_reached(found: Tensors, hparams: Tensors) -> Tensors:
    """Return `found` if it has every hyperparameter; raise `UnreachedHyperparameter` otherwise."""
    missing = [name for name in hparams if name not in found]
    if missing:
        raise UnreachedHyperparameter(
            "each hyperparameter must influence the training gradient or the update, but "
            f"{', '.join(missing)} did not; use it in the model or the loss, or pass bind=."
        )
    return {name: found[name] for name in hparams}
