"""Pull the gradient after the step back to the hyperparameters.

    dC2/dh = d/dlambda <w, g(theta, lambda)> + v . dU/dphi,     w = J^T (dU/dg)^T v

J is the Jacobian of changes to the gradient before the step, such as clipping. `UpdateRule.pullback` computes
the second term. Three methods compute the first term, the mixed partial:

    double backward     reverse over reverse; exact
    forward mode        one dual pass over the loss, then reverse; exact, cheapest for a loss linear in lambda
    difference          dC1~/dlambda at theta +- e w; first derivatives only, off by O(e^2) and rounding
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from midflight._tensors import Tensors, add_scaled, leaves, norm
from midflight.errors import NoForwardMode, UnsupportedSetting
from midflight.hypergrad.graph import require_twice_differentiable
from midflight.hypergrad.problem import Step, TrainLoss, added, double_backward, gradient, reached
from midflight.updates import step_pullback

METHODS = ("double backward", "forward mode", "difference")

_TF32 = 2.0**-10
"""Rounding unit of TF32; torch has no type for it."""
_HALF = 1e-5
"""Half precision and TF32 have rounding units above this, float32 and float64 below."""


def through_step(step: Step, v: Tensors) -> Tensors:
    """Return the hypergradient for v = dC2/dtheta': the sum of both terms.

    `step_pullback` and `Step.chain` alone give the second term, the direct effect of the options.

    Args:
        step: the optimiser step.
        v: gradient with respect to the weights after the step, shaped like step.params; overwritten.

    Returns:
        name -> tensor shaped like step.hparams, for the hyperparameters that the step depends on.
    """
    found = step.dependence()
    w, pairs = step_pullback(v, step.params, step.grads, step.state, step.updates, found.others, found.share)
    options = step.chain(pairs)
    return added(options, found.mixed_partial(step.clipped(w) if step.clipped else w))


def train_loss_of(step: Step) -> TrainLoss:
    """Return `Step.train_loss`, for estimators that differentiate the step themselves.

    Raises:
        UnsupportedSetting: the step has no training loss, or clips the gradient.
    """
    if step.train_loss is None or step.clipped is not None:
        raise UnsupportedSetting(
            "this estimator needs the training loss as a function, so it supports neither populations nor "
            "clipped gradients; use 'one_step'."
        )
    return step.train_loss


def mixed_partial_of(
    method: str, train_loss: TrainLoss, params: Tensors, values: Tensors, w: Tensors
) -> Tensors:
    """Return d/dvalues <w, dC1~/dparams> by one of `METHODS`, for the values that the gradient depends on.

    Raises:
        NotTwiceDifferentiable: "double backward" meets an operation that is differentiable only once.
        NoForwardMode: "forward mode" meets an operation that lacks it.
    """
    if method == "difference":
        return difference_along(train_loss, params, values, w)
    if method == "forward mode":
        return forward_over_reverse_along(train_loss, params, values, w)
    params, values = leaves(params), leaves(values)
    grads = gradient(train_loss(params, values), params, create_graph=True)
    require_twice_differentiable(grads.values())
    return double_backward(grads, values, w)


def forward_over_reverse_along(
    train_loss: TrainLoss, params: Tensors, values: Tensors, w: Tensors
) -> Tensors:
    """Return d/de of dC1~/dlambda at theta + e w, by a forward-mode pass over the loss, then a reverse one.

    The reverse pass covers only what depends on lambda. It costs almost nothing for hyperparameters that
    enter after the network, such as loss weights, label smoothing and penalties. For noise at the input it
    costs a whole backward pass.
    """
    values = leaves(values)
    with forward_ad.dual_level():
        return {
            name: torch.zeros_like(g) if tangent is None else tangent.detach()
            for name, g in _dual_value_grads(train_loss, params, w, values).items()
            for tangent in [forward_ad.unpack_dual(g).tangent]  # type: ignore[no-untyped-call]
        }


def difference_along(
    train_loss: TrainLoss, params: Tensors, values: Tensors, w: Tensors, epsilon: float | None = None
) -> Tensors:
    """Return (dC1~/dlambda at theta + e w - dC1~/dlambda at theta - e w) / 2e, e = epsilon |theta| / |w|.

    Both passes must see the same random numbers, because fresh noise would exceed the difference.
    """
    epsilon = epsilon or relative_epsilon(rounding_of(lambda: train_loss(params, values), params))
    length = norm(w)
    e = epsilon * norm(params) / torch.where(length > 0, length, 1)
    up, down = (
        value_grads(train_loss(add_scaled(params, w, sign * e), shifted), shifted)
        for sign in (1.0, -1.0)
        for shifted in [leaves(values)]
    )
    return {name: (up[name] - down[name]) / (2 * e) for name in up}


def relative_epsilon(rounding: float) -> float:
    """Return the step size of a difference relative to |theta|, from the rounding unit of the loss.

    The cube root balances truncation and rounding in a typical direction. But w is large where Adam takes
    long steps, and the loss curves about 300 times faster along w (measured). So the root is divided by 300.
    In half precision rounding dominates, and dividing by 10 is best (measured: dev/log/2026-11.md).

    | computed in | step |
    |---|---|
    | float64 | 2e-8 |
    | float32 | 1.6e-5 |
    | float16, TF32 | 1e-2 |
    | bfloat16 | 2e-2 |
    """
    return float(rounding ** (1 / 3) / (10 if is_coarse(rounding) else 300))


def is_coarse(rounding: float) -> bool:
    """Return whether a rounding unit is that of half precision or TF32."""
    return rounding > _HALF


def rounding_of(loss: Callable[[], object], params: Tensors) -> float:
    """Return the largest rounding unit among the operations of the loss, with those under autocast.

    On a GPU, float32 weights always count as TF32. cuDNN uses TF32 by default, and some versions of torch
    cannot read the flags safely.
    """
    units = [torch.finfo(p.dtype).eps for p in params.values()]
    try:
        with _Dtypes() as seen:
            loss()
        units += [torch.finfo(dtype).eps for dtype in seen.dtypes]
    except Exception:  # code that does not run under a dispatch mode, such as a compiled function
        units.append(torch.finfo(torch.bfloat16).eps)
    if torch.float32 in {p.dtype for p in params.values()}:
        if any(p.is_cuda for p in params.values()):
            units.append(_TF32)
        if torch.get_float32_matmul_precision() != "highest":
            units.append(torch.finfo(torch.bfloat16).eps)
    return max(units)


class _Dtypes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collect the floating-point dtypes of all results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else [out]
        self.dtypes |= {t.dtype for t in outs if isinstance(t, Tensor) and t.is_floating_point()}
        return out


def value_grads(loss: Tensor, values: Tensors) -> Tensors:
    """Return dC1~/dlambda for the values that the loss reads."""
    return reached([loss], values)


def is_linear(train_loss: TrainLoss, params: Tensors, values: Tensors) -> bool:
    """Return whether the loss reads values and, in its graph, dC1~/dvalues does not depend on them."""
    loss = train_loss(params, values)
    if not loss.requires_grad:
        return False
    slopes = reached([loss], values, create_graph=True).values()
    return not reached([slope.sum() for slope in slopes], values)


def knows_forward_mode(train_loss: TrainLoss, params: Tensors, values: Tensors) -> bool:
    """Return whether each operation of the loss has a forward-mode derivative with a backward pass."""
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    try:
        with forward_ad.dual_level():
            _dual_value_grads(train_loss, params, zeros, values)
    except (NoForwardMode, RuntimeError):
        return False
    return True


class _NoTangentsUnderNoGrad(TorchFunctionMode):
    """Make `torch.no_grad` stop tangents as well; torch stops only gradients."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stopped = nullcontext() if torch.is_grad_enabled() else forward_ad._set_fwd_grad_enabled(False)
        with stopped:
            return func(*args, **(kwargs or {}))


def _dual_value_grads(train_loss: TrainLoss, params: Tensors, tangents: Tensors, values: Tensors) -> Tensors:
    """Return dC1~/dlambda as dual numbers, for weights with the given tangents."""
    duals = {
        name: forward_ad.make_dual(p, tangents[name].to(p)) if name in tangents else p  # type: ignore[no-untyped-call]
        for name, p in params.items()
    }
    try:
        with _NoTangentsUnderNoGrad():
            return value_grads(train_loss(duals, values), values)
    except NotImplementedError as error:
        raise NoForwardMode(
            "each operation of the training loss must have a forward-mode derivative for this estimator, but "
            f"one has none; use 'one_step' or 'central_difference'. ({str(error).splitlines()[0]})"
        ) from error
