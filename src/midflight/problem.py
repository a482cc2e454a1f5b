"""The bilevel problem and its linearisation at one optimiser step.

    theta' = U(theta, s, g, phi),   g = dC1~(theta, lambda)/dtheta,   minimise C2(theta') over lambda, phi

`Problem` is the pure statement of it. `Step` is what every estimator reads: the pieces of one step,
whether they come from a `Problem` or from a user's live training loop.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from midflight.errors import UnreachedHyperparameter
from midflight.trees import Tensors, leaves
from midflight.updates import State, Update

Updates = Mapping[str, Update]


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

    train_loss: Callable[[Tensors, Tensors], Tensor]
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
            training loss reads none.
        state: optimiser state before the step, weight name -> state.
        updates: weight name -> rule and options; tuned options carry the graph to hparams.
        hparams: the leaves that are tuned, name -> tensor.
        values: what the model sees of them, differentiable with respect to hparams.
        valid_grad: params -> dC2/dtheta there, shaped like params.
    """

    params: Tensors
    grads: Tensors
    grads_with_graph: Tensors
    state: Mapping[str, State]
    updates: Updates
    hparams: Tensors
    values: Tensors
    valid_grad: Callable[[Tensors], Tensors]

    def next_params(self) -> Tensors:
        """theta' = U(theta, s, g, phi), without graph; a second copy of the weights."""
        with torch.no_grad():
            return {
                name: u.rule.step(self.params[name], self.grads[name], self.state[name], u.options)[0]
                for name, u in self.updates.items()
            }

    def pullback(self, v: Tensors) -> Tensors:
        """From dC2/dtheta' to the hypergradient: d/dlambda <(dU/dg)^T v, g> and v . dU/dphi.

        Raises:
            UnreachedHyperparameter: an entry of hparams reaches neither g nor an option.
        """
        outputs: list[Tensor] = []
        cotangents: list[Tensor] = []
        for name, u in self.updates.items():
            w, option_grads = u.rule.pullback(
                v[name], self.params[name], self.grads[name], self.state[name], u.options
            )
            if name in self.grads_with_graph:
                outputs.append(self.grads_with_graph[name])
                cotangents.append(w)
            for option, gradient in option_grads.items():
                outputs.append(u.options[option])
                cotangents.append(gradient.to(u.options[option]))
        return self.chain(outputs, cotangents)

    def chain(self, outputs: list[Tensor], cotangents: list[Tensor]) -> Tensors:
        """The sum of <cotangent, d output/d hparams>, name -> tensor shaped like hparams."""
        found = (
            torch.autograd.grad(outputs, list(self.hparams.values()), cotangents, allow_unused=True)
            if outputs
            else [None] * len(self.hparams)
        )
        missing = [name for name, g in zip(self.hparams, found, strict=True) if g is None]
        if missing:
            raise UnreachedHyperparameter(
                f"each hyperparameter must reach the gradient of the training loss or a tuned option, but "
                f"{', '.join(missing)} did not; use it in the model or the loss, or bind it to an option "
                "of the optimiser with bind=."
            )
        return {name: g for name, g in zip(self.hparams, found, strict=True) if g is not None}
