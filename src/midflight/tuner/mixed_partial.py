"""How the training gradient g depends on the hyperparameters, on a few examples of T1 and the live model.

    d/dlambda <w, g(theta, lambda)>

There are three methods. The first one that works for the user's code is chosen at the first hyper-step:

    difference          of first derivatives at theta + e w and theta - e w, if all of the space are
                        weights of losses, as of `midflight.Mixture` and `midflight.ExampleWeights`, and
                        nothing is computed in half precision
    forward mode        if the loss is linear in all that it reads of the space
    double backward     with plain attention kernels, because fused ones are differentiable only once
    difference          for any other code; also if a double backward runs out of memory

Values that the loss takes out of the graph are differenced in the hyperparameter; see `stop_gradient`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from midflight._tensors import Tensors, detach, leaves
from midflight.errors import InvalidLoss, NotTwiceDifferentiable
from midflight.hypergrad.graph import graph_leaves, has_own_backward, require_twice_differentiable
from midflight.hypergrad.mixed import (
    is_coarse,
    is_linear,
    knows_forward_mode,
    mixed_partial_of,
    relative_epsilon,
    rounding_of,
)
from midflight.hypergrad.problem import double_backward, reached
from midflight.nn.magnitude import held_constants
from midflight.space import Space
from midflight.tuner.data import first_examples
from midflight.tuner.distributed import Processes
from midflight.tuner.live import LiveModel, Loss, reenters, weights_at, with_tensors
from midflight.tuner.randomness import Randomness
from midflight.tuner.sharded import part
from midflight.tuner.stop_gradient import ByDifference, StoppedReads

_Failures = type[Exception] | tuple[type[Exception], ...]
_FAILURES = (RuntimeError, NotTwiceDifferentiable, CheckpointError, NotImplementedError)
"""How code fails that is not differentiable twice; running out of memory is a `RuntimeError` as well."""

DOUBLE_BACKWARD, FORWARD_MODE, DIFFERENCE = "double backward", "forward mode", "difference"


@contextmanager
def plain_attention() -> Iterator[None]:
    """Run attention without fused kernels, even inside a `sdpa_kernel` of the model's own."""
    with sdpa_kernel(SDPBackend.MATH), _PlainAttention():
        yield


class _PlainAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class MixedPartial:
    """Compute d/draw <w, g> on batches of T1; use it inside `LiveModel.borrowed`.

    Args:
        live: the model.
        randomness: the tuner's random numbers; all passes over one batch draw the same ones.
        space: the hyperparameters; derivatives are with respect to their raw coordinates.
        loss_fn: (model, batch) -> training loss.
        examples: how many examples of a batch are used, the first ones along dimension 0; None for all.
        method: one of the three methods; None chooses.
        processes: the processes that train the model together.

    Attributes:
        method: the method in use; None before the first hyper-step.
        whole_batches: whether all examples of a batch are used.
    """

    def __init__(
        self,
        live: LiveModel,
        randomness: Randomness,
        space: Space,
        loss_fn: Loss,
        examples: int | None,
        method: str | None,
        processes: Processes,
    ) -> None:
        self._processes = processes
        self._live, self._randomness, self._space, self._loss_fn = live, randomness, space, loss_fn
        self._examples = examples or 0
        self._checked = False
        self._rounding = 0.0
        self._stopped: ByDifference | None = None
        self._only_weights = all(space[name].spec.are_weights for name in space)
        self.method = method
        self.whole_batches = examples is None or _is_time_first(live.model)

    def train_loss(self, batch: Any) -> Callable[[Tensors, Tensors], Tensor]:
        """Return the training loss on the batch as a function of weights and values, differentiable in both.

        The function draws the same random numbers at each call.
        """
        states = self._randomness.snapshot()
        model = self._live.model
        buffers = dict(model.named_buffers())

        def loss(params: Tensors, values: Tensors) -> Tensor:
            self._randomness.rewind(states)
            copies = {name: b.clone() for name, b in buffers.items()}
            with self._space.seeing(values):
                return with_tensors(
                    model, lambda: self._live.train_loss(self._loss_fn, batch), {**params, **copies}
                )

        return loss

    def subsample(self, batch: Any) -> Any:
        """Return the examples of a batch that are used; all of them if the loss does not work on fewer."""
        return batch if self.whole_batches else first_examples(batch, self._examples)

    def __call__(
        self, batch: Any, params: Mapping[str, Tensor]
    ) -> tuple[Tensors, Callable[[Tensors], Tensors]]:
        """Return the training gradient on these examples, and how it depends on the hyperparameters.

        Args:
            batch: of T1, as `subsample` gave it.
            params: the live weights that require a gradient, name -> leaf.

        Returns:
            First g, name -> tensor, for the weights that affect the loss; {} where it is not computed, which
            is so for weights of losses after the first hyper-step. Second the function
            w -> d/draw <w, g>, which returns name -> tensor shaped like the raw coordinate, for the
            hyperparameters that g depends on.
        """
        if self._stopped is not None and not self._stopped.names:
            return self._by_autograd(batch, params)
        states = self._randomness.snapshot()
        with StoppedReads(self._space) if self._stopped is None else nullcontext() as reads:
            grads, along = self._by_autograd(batch, params)

        def loss() -> Tensor:
            self._randomness.rewind(states)
            return self._live.train_loss(self._loss_fn, batch)

        def gradient() -> Tensors:
            return self._live.gradients(loss, dict(params), hooks=True)[1]

        def mixed_partial(w: Tensors) -> Tensors:
            found, after = along(w), self._randomness.snapshot()
            if self._processes.sharded:  # gradients of sharded weights are those of the mean loss
                found = self._processes.mean_where_present(found, self._space.raws)
            with held_constants():  # layers of this library take values out on purpose
                if self._stopped is None:
                    suspects = set() if reads is None else reads.names
                    slope = partial(self._live.gradients, loss)
                    rounding = partial(self._rounding_of, batch, params)
                    self._stopped = ByDifference(self._space, self._processes.parts)
                    self._stopped.judge(suspects, loss, slope, rounding)
                    hooked = _is_hooked(params) and self.method != DOUBLE_BACKWARD
                    if hooked or has_own_backward(loss()):
                        self._stopped.judge_backward(found, gradient, w, rounding())
                found = self._stopped(found, gradient, w)
            self._randomness.rewind(after)
            return found

        return grads, mixed_partial

    def _by_autograd(
        self, batch: Any, params: Mapping[str, Tensor]
    ) -> tuple[Tensors, Callable[[Tensors], Tensors]]:
        first = self.method is None
        if first:
            self.method = self._choose(batch, params)
        if self.method == DOUBLE_BACKWARD:
            found = self._try_double_backward(batch, params, _FAILURES if first else torch.OutOfMemoryError)
            if found is not None:
                return found
            self.method = DIFFERENCE
        states, grads = self._randomness.snapshot(), dict[str, Tensor]()
        if not (self._only_weights and self._stopped is not None):  # w needs it at the first steps only
            _, grads = self._live.gradients(
                lambda: self._live.train_loss(self._loss_fn, batch), dict(params), hooks=True
            )
        along = self._forward_mode if self.method == FORWARD_MODE else self._difference

        def mixed_partial(w: Tensors) -> Tensors:
            self._randomness.rewind(states)
            return along(batch, params, w)

        return grads, mixed_partial

    def _try_double_backward(
        self, batch: Any, params: Mapping[str, Tensor], failures: _Failures
    ) -> tuple[Tensors, Callable[[Tensors], Tensors]] | None:
        """Return the double backward, or None if its first half fails.

        If its second half fails, a difference takes its place.
        """
        states = self._randomness.snapshot()
        along: Callable[[Tensors], Tensors] | None
        try:
            grads, along = self._double_backward(batch, params)
        except InvalidLoss:
            raise
        except failures:
            self._randomness.rewind(states)
            return None

        def mixed_partial(w: Tensors) -> Tensors:
            nonlocal along
            if along is not None:
                try:
                    return along(w)
                except failures:  # the graph goes with `along`, before the difference needs memory
                    along, self.method = None, DIFFERENCE
            self._randomness.rewind(states)
            return self._difference(batch, params, w)

        return grads, mixed_partial

    def _double_backward(
        self, batch: Any, params: Mapping[str, Tensor]
    ) -> tuple[Tensors, Callable[[Tensors], Tensors]]:
        states = self._randomness.snapshot()
        with plain_attention():
            loss = self._live.train_loss(self._loss_fn, batch)
            if reenters(loss):
                raise CheckpointError("reentrant checkpointing cannot be differentiated twice.")
            found = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
        grads = {name: g for name, g in zip(params, found, strict=True) if g is not None}
        if not self._checked:
            require_twice_differentiable(grads.values())
            self._checked = True
        after = self._randomness.snapshot()

        def mixed_partial(w: Tensors) -> Tensors:
            self._randomness.rewind(states)  # for checkpoints, which recompute in this backward
            try:
                with plain_attention():
                    return double_backward(grads, self._space.raws, w)
            finally:
                self._randomness.rewind(after)  # so that the next hyper-step draws new numbers

        return detach(grads), mixed_partial

    def _difference(self, batch: Any, params: Mapping[str, Tensor], w: Tensors) -> Tensors:
        at = {name: part(params[name]).detach() for name in w if name in params}
        sized = self._processes.parts.norm
        length = sized({name: w[name] for name in at})
        states = self._randomness.snapshot()
        values = {name: self._space[name].value for name in self._space}
        inputs = leaves(values)

        def loss() -> Tensor:
            self._randomness.rewind(states)
            return self._live.train_loss(self._loss_fn, batch)

        e = (
            relative_epsilon(self._rounding_of(batch, params))
            * sized(at)
            / torch.where(length > 0, length, 1)
        )
        along = {name: w[name].to(p) for name, p in at.items()}
        moved = {name: p + e.to(p) * along[name] for name, p in at.items()}
        with weights_at(params, moved), self._space.seeing(inputs):
            up = self._live.gradients(loss, inputs)[1]
        for name, x in moved.items():
            x.addcmul_(along[name], e.to(x), value=-2)
        with weights_at(params, moved), self._space.seeing(inputs):
            down = self._live.gradients(loss, inputs)[1]
        found = {name: (up[name] - down[name]) / (2 * e).to(up[name]) for name in up if name in down}
        return self._at_raws(values, found)

    def _rounding_of(self, batch: Any, params: Mapping[str, Tensor]) -> float:
        """Return the relative rounding of the training loss; measure it once."""
        if not self._rounding:
            loss = partial(self._live.train_loss, self._loss_fn, batch)
            self._rounding = rounding_of(loss, detach(params))
        return self._rounding

    def _forward_mode(self, batch: Any, params: Mapping[str, Tensor], w: Tensors) -> Tensors:
        values = {name: self._space[name].value for name in self._space}
        at = {name: params[name].detach() for name in w if name in params}
        with plain_attention():  # fused kernels have no forward mode
            found = mixed_partial_of(FORWARD_MODE, self.train_loss(batch), at, detach(values), w)
        return self._at_raws(values, found)

    def _at_raws(self, values: Tensors, found: Tensors) -> Tensors:
        """Return derivatives with respect to values as those with respect to the raw coordinates."""
        names = list(found)
        return reached([values[n] for n in names], self._space.raws, [found[n] for n in names])

    def _choose(self, batch: Any, params: Mapping[str, Tensor]) -> str:
        """Return forward mode if it is exact for this loss; otherwise double backward, to be tried next.

        For weights of losses, return difference, which takes two forward passes.
        """
        if self._only_weights and not is_coarse(self._rounding_of(batch, params)):
            return DIFFERENCE
        values = leaves({name: self._space[name].value for name in self._space})
        names = {name for name, _ in self._live.model.named_parameters()}
        at = {name: p.detach() for name, p in params.items() if name in names}
        states = self._randomness.snapshot()
        with plain_attention():
            plain = self._live.train_loss(self._loss_fn, batch)  # errors in it are the user's and pass on
            self._randomness.rewind(states)
            try:
                train_loss = self.train_loss(batch)
                linear = (
                    not _is_hooked(params)
                    and set(params) <= names
                    and self._sees_all(train_loss, plain, at, values)
                    and is_linear(train_loss, at, values)
                    and knows_forward_mode(train_loss, at, values)
                    and _same_in_forward_mode(train_loss, plain, at, values)
                )
            except Exception:  # the user's code may not work with replaced weights
                linear = False
        self._randomness.rewind(states)
        return FORWARD_MODE if linear else DOUBLE_BACKWARD

    def _sees_all(
        self, train_loss: Callable[[Tensors, Tensors], Tensor], plain: Tensor, at: Tensors, values: Tensors
    ) -> bool:
        """Return whether the loss uses the replaced weights throughout, and has the same value with them.

        Code may keep references to parameters, or branch on flags such as `requires_grad`.
        """
        replaced = train_loss(leaves(at), values)
        live = {id(p) for p in self._live.model.parameters()}
        return (
            torch.equal(replaced.detach(), plain.detach())
            and not reenters(replaced)
            and not any(id(leaf) in live for leaf in graph_leaves(replaced))
        )

    def try_subsample(self, batch: Any) -> Any:
        """Return `subsample`, or the whole batch if the first try shows that the loss needs all of it."""
        few = self.subsample(batch)
        if self.method is not None or few is batch:
            return few
        states = self._randomness.snapshot()
        try:
            self._live.number(partial(self._live.train_loss, self._loss_fn, few))
        except Exception:  # errors not due to the cut will recur with the whole batch
            self.whole_batches = True
            few = batch
        self._randomness.rewind(states)
        return few

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned about the loss."""
        return {
            "method": self.method,
            "whole_batches": self.whole_batches,
            "by_difference": None if self._stopped is None else list(self._stopped.names),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self.method, self.whole_batches = state["method"], state["whole_batches"]
        self._stopped = None
        if state["by_difference"] is not None:
            self._stopped = ByDifference(self._space, self._processes.parts)
            self._stopped.names = list(state["by_difference"])

    def log(self) -> dict[str, float]:
        """Return what a logger takes: the method, and the examples that it uses, 0 for whole batches."""
        if not self.method:
            return {}
        examples = 0 if self.whole_batches else self._examples
        return {f"mixed_partial/{self.method.replace(' ', '_')}": 1.0, "mixed_partial/examples": examples}


def _same_in_forward_mode(
    train_loss: Callable[[Tensors, Tensors], Tensor], plain: Tensor, at: Tensors, values: Tensors
) -> bool:
    """Return whether the loss has the same value at weights that carry tangents."""
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, torch.zeros_like(p)) for name, p in at.items()}  # type: ignore[no-untyped-call]
        moving = forward_ad.unpack_dual(train_loss(duals, values)).primal  # type: ignore[no-untyped-call]
        return torch.equal(moving.detach(), plain.detach())


def _is_hooked(params: Mapping[str, Tensor]) -> bool:
    """Return whether hooks of the user's may change gradients of weights; a double backward includes them."""
    return any(p._backward_hooks for p in params.values())


def _is_time_first(model: nn.Module) -> bool:
    """Return whether the input of some layer has time as dimension 0, which must not be cut."""
    return any(getattr(module, "batch_first", True) is False for module in model.modules())
