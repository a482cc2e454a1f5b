"""From the gradient after the step back to the hyperparameters.

    dC2/dh = d/dlambda <w, g(theta, lambda)> + v . dU/dphi,     w = (dU/dg)^T v

The second term is closed or elementwise in every update rule. The first, the mixed partial, is found
in one of three ways; all give the same number.
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from midflight.errors import NoForwardMode
from midflight.graph import Pairs
from midflight.problem import Step, TrainLoss
from midflight.trees import Tensors, add_scaled, leaves, norm
from midflight.updates import pull_back

Mixed = Callable[[Step, Tensors], Pairs]
"""(step, w) -> d/dlambda <w, g>, as pairs for `Step.chain`"""


def pullback(step: Step, v: Tensors, mixed: Mixed | None = None) -> Tensors:
    """The hypergradient that belongs to v = dC2/dtheta'.

    Args:
        step: the optimiser step.
        v: gradient with respect to the weights after the step, shaped like step.params; used up.
        mixed: how the mixed partial is found: `double_backward` where g was recorded with its graph,
            else `forward_over_reverse`.

    Raises:
        UnreachedHyperparameter: a hyperparameter reaches neither g nor an option.
        NoForwardMode: forward mode was asked for and an operation does not know it.
    """
    w, pairs = pull_back(v, step.params, step.grads, step.state, step.updates)
    if mixed is None:
        mixed = forward_over_reverse if step.train_loss and not step.grads_with_graph else double_backward
    return step.chain(pairs + mixed(step, w))


def double_backward(step: Step, w: Tensors) -> Pairs:
    """Reverse over reverse, through the recorded graph of g."""
    pairs = [(g, w[name]) for name, g in step.grads_with_graph.items()]
    return pairs + [pair for factors in step.factors for pair in factors.along(w)]


def forward_over_reverse(step: Step, w: Tensors) -> Pairs:
    """d/de of dC1~/dlambda at theta + e w: one forward-mode pass over the loss, then a reverse one.

    The reverse pass covers only what depends on lambda: for hyperparameters that enter after the
    network (loss weights, per-example weights, label smoothing, penalties) next to nothing, so that
    the whole is one jvp of the vector of losses; for noise at the input it is a whole backward.
    """
    train_loss = step.training_loss()
    values = leaves(step.values)
    with forward_ad.dual_level():
        grads = _dual_value_grads(train_loss, step.params, w, values)
        return [
            (step.values[name], torch.zeros_like(g) if tangent is None else tangent.detach())
            for name, g in grads.items()
            for tangent in [forward_ad.unpack_dual(g).tangent]  # type: ignore[no-untyped-call]
        ]


def difference_along(step: Step, w: Tensors, epsilon: float) -> Pairs:
    """(dC1~/dlambda at theta + e w - dC1~/dlambda at theta - e w) / 2e, e = epsilon |theta| / |w|.

    First order only: nothing is differentiated twice.
    """
    train_loss = step.training_loss()
    length = norm(w)
    e = epsilon * norm(step.params) / torch.where(length > 0, length, 1)
    up, down = (
        _value_grads(train_loss(add_scaled(step.params, w, sign * e), values), values)
        for sign in (1.0, -1.0)
        for values in [leaves(step.values)]
    )
    return [(step.values[name], (up[name] - down[name]) / (2 * e)) for name in up]


def _value_grads(loss: torch.Tensor, values: Tensors) -> Tensors:
    """dC1~/dlambda for the values that the loss reads."""
    if not loss.requires_grad:
        return {}
    grads = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    return {name: g for name, g in zip(values, grads, strict=True) if g is not None}


def is_linear(train_loss: TrainLoss, params: Tensors, values: Tensors) -> bool:
    """Whether the loss reads values, and dC1~/dvalues does not depend on them, as the graph tells."""
    loss = train_loss(params, values)
    if not loss.requires_grad:
        return False
    found = torch.autograd.grad(loss, list(values.values()), create_graph=True, allow_unused=True)
    slopes = [g.sum() for g in found if g is not None and g.requires_grad]
    again = torch.autograd.grad(slopes, list(values.values()), allow_unused=True) if slopes else ()
    return all(g is None for g in again)


def knows_forward_mode(train_loss: TrainLoss, params: Tensors, values: Tensors) -> bool:
    """Whether every operation of the loss has a forward-mode derivative, with its reverse."""
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    try:
        with forward_ad.dual_level():
            _dual_value_grads(train_loss, params, zeros, values)
    except (NoForwardMode, RuntimeError):
        return False
    return True


def _dual_value_grads(train_loss: TrainLoss, params: Tensors, tangents: Tensors, values: Tensors) -> Tensors:
    """dC1~/dlambda as dual numbers, for weights that move along `tangents`."""
    duals = {
        name: forward_ad.make_dual(p, tangents[name].to(p))  # type: ignore[no-untyped-call]
        for name, p in params.items()
    }
    try:
        return _value_grads(train_loss(duals, values), values)
    except NotImplementedError as error:
        raise NoForwardMode(
            "each operation of the training loss must have a forward-mode derivative for this estimator, but "
            f"one has none; use 'one_step' or 'central_difference'. ({str(error).splitlines()[0]})"
        ) from error
