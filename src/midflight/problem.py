"""The bilevel problem and its linearisation at one optimiser step.

    theta' = U(theta, s, g, phi),   g = dC1~(theta, lambda)/dtheta,   minimise C2(theta') over lambda, phi

`Problem` is the pure statement of it. `Step` is what every estimator reads: the pieces of one step,
whether they come from a `Problem` or from a user's live training loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from midflight.errors import NeedsClosure, UnreachedHyperparameter
from midflight.graph import Factors, Pairs
from midflight.trees import Tensors, leaves
from midflight.updates import State, Updates, step_ahead

_Estimator = TypeVar("_Estimator", bound=Callable[..., Tensors])
TrainLoss = Callable[[Tensors, Tensors], Tensor]


def gradient(loss: Tensor, params: Tensors, *, create_graph: bool = False) -> Tensors:
    """d loss/d params, name -> tensor; 0 for an entry the loss does not use."""
    grads = torch.autograd.grad(
        loss, list(params.values()), create_graph=create_graph, materialize_grads=True
    )
    return dict(zip(params, grads, strict=True))


@dataclass(frozen=True)
class Problem:
    """A training step and the validation loss that judges it, as pure functions.

    Attributes:
        train_loss: C1~(params, hparams), a scalar; the same random numbers at every call.
        valid_loss: C2(params), a scalar.
        updates: hparams -> weight name -> `Update`; tuned options are functions of hparams.
    """

    train_loss: TrainLoss
    valid_loss: Callable[[Tensors], Tensor]
    updates: Callable[[Tensors], Updates]

    def train_grads(self, params: Tensors, hparams: Tensors, *, create_graph: bool = False) -> Tensors:
        """g(params, hparams), weight name -> tensor; 0 for a weight the loss does not use."""
        return gradient(self.train_loss(params, hparams), params, create_graph=create_graph)

    def valid_grads(self, params: Tensors) -> Tensors:
        """dC2/dtheta at params, weight name -> tensor."""
        params = leaves(params)
        return gradient(self.valid_loss(params), params)


@dataclass(frozen=True)
class Step:
    """One optimiser step about to be taken, everything an estimator may look at.

    Attributes:
        params: theta, weight name -> tensor; not modified.
        grads: g as the optimiser will receive it, without graph.
        grads_with_graph: g as a differentiable function of the hyperparameters; empty if the
            training loss reads none, or if `train_loss` is to be asked instead. From a probe not all, see
            `factors`; `hypergrad.mixed.double_backward` reads both.
        state: optimiser state before the step, weight name -> state.
        updates: weight name -> rule and options; tuned options carry the graph to hparams.
        hparams: the leaves that are tuned, name -> tensor.
        values: what the model sees of them, differentiable with respect to hparams.
        valid_grad: function that gives weights -> dC2/dtheta there, named like params, new tensors that the
            estimator uses up; the function is called only if its weights matter, which spares
            `next_params` where they do not.
        train_loss: (params, values) -> training loss, to be evaluated again on the same batch under
            the same random numbers; None where the user gave a loss rather than a function.
        members: of a population: the first dimension of every tensor; None for one training.
        factors: g of the weights that `grads_with_graph` leaves out, as products that were not carried out.
    """

    params: Tensors
    grads: Tensors
    grads_with_graph: Tensors
    state: Mapping[str, State]
    updates: Updates
    hparams: Tensors
    values: Tensors
    valid_grad: Callable[[Callable[[], Tensors]], Tensors]
    train_loss: TrainLoss | None = None
    members: int | None = None
    factors: Sequence[Factors] = ()

    def next_params(self) -> Tensors:
        """theta' = U(theta, s, g, phi), without graph; a second copy of the weights."""
        return step_ahead(self.params, self.grads, self.state, self.updates)

    def training_loss(self) -> TrainLoss:
        """`train_loss`; raises `NeedsClosure` where it is not there."""
        if self.train_loss is None:
            raise NeedsClosure(
                "this estimator evaluates the training loss again and needs it as a function, but got a "
                "tensor; call tuner.backward(lambda: loss_fn(model(x), y)) instead of tuner.backward(loss)."
            )
        return self.train_loss

    def chain(self, pairs: Pairs) -> Tensors:
        """The sum of <cotangent, d output/d hparams> over (output, cotangent), shaped like hparams.

        Raises:
            UnreachedHyperparameter: no output is a function of some entry.
        """
        pairs = [(output, cotangent) for output, cotangent in pairs if output.requires_grad]
        found: tuple[Tensor | None, ...] = (None,) * len(self.hparams)
        if pairs:
            outputs = [output for output, _ in pairs]
            cotangents = [cotangent.to(output) for output, cotangent in pairs]
            found = torch.autograd.grad(outputs, list(self.hparams.values()), cotangents, allow_unused=True)
        missing = [name for name, g in zip(self.hparams, found, strict=True) if g is None]
        if missing:
            raise UnreachedHyperparameter(
                f"each hyperparameter must reach the gradient of the training loss or a tuned option, but "
                f"{', '.join(missing)} did not; use it in the model or the loss, or bind it to an option "
                "of the optimiser with bind=."
            )
        return {name: g for name, g in zip(self.hparams, found, strict=True) if g is not None}


def reevaluates(estimator: _Estimator) -> _Estimator:
    """Mark an estimator that asks `Step.train_loss`: g is then not recorded with its graph."""
    estimator.__dict__["reevaluates"] = True
    return estimator


def is_reevaluating(estimator: Any) -> bool:
    """Whether an estimator, or what it is a `functools.partial` of, was marked by `reevaluates`."""
    return getattr(estimator.func if isinstance(estimator, partial) else estimator, "reevaluates", False)
