"""Read the magnitude of a random change (std of noise, rate of dropout) and keep it above a floor.

    drawn = max(magnitude, floor),   d drawn / d magnitude = 1

At magnitude 0 the derivative gives no information. For noise its mean is zero, because z and -z are equally
likely. Dropout at rate 0 drops nothing. So a magnitude whose range begins at 0 is never drawn below a floor,
5 % of this range. The hyperparameter itself may reach 0.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from midflight.space import Hyperparameter

Magnitude = Hyperparameter | Callable[[], Tensor] | Tensor | float
"""A hyperparameter, a number, or a function of hyperparameters. A layer takes a function without arguments
(`lambda: space["noise"][2]`) and calls it at every pass; a single call such as `mixup` takes its tensor."""


def default_floor(magnitude: Magnitude) -> float:
    """Return 5 % of the range if the magnitude is a hyperparameter whose range begins at 0, else 0."""
    tuned_to_zero = isinstance(magnitude, Hyperparameter) and magnitude.spec.low == 0
    return 0.05 * magnitude.spec.high if tuned_to_zero else 0.0  # type: ignore[union-attr]


def value_of(magnitude: Magnitude) -> Tensor | float:
    """Return the magnitude now, differentiable in the hyperparameters that it reads."""
    if isinstance(magnitude, Hyperparameter):
        return magnitude.value
    return magnitude() if callable(magnitude) else magnitude


def drawn(magnitude: Magnitude, floor: float, like: Tensor) -> Tensor:
    """Return max(magnitude, floor) on the device of `like`, with derivative 1 in the magnitude."""
    now = value_of(magnitude)
    x = now.to(like.device) if isinstance(now, Tensor) else like.new_tensor(now)
    return x + constant((magnitude, floor), (floor - x).clamp(min=0).detach())


_held: dict[Any, Tensor] | None = None


def constant(what: Any, value: Tensor) -> Tensor:
    """Return `value`, or inside `held_constants` the first value for `what`; derivatives ignore it."""
    return value if _held is None else _held.setdefault(what, value)


@contextmanager
def held_constants() -> Iterator[None]:
    """Keep each `constant` at its first value, for central differences.

    Floors and dropout masks depend on a magnitude, but the derivative ignores this dependence.
    """
    global _held
    before, _held = _held, {}
    try:
        yield
    finally:
        _held = before


def describe(magnitude: Magnitude) -> str:
    """Return a short text of the magnitude for `repr(model)`."""
    if isinstance(magnitude, Hyperparameter):
        return repr(magnitude).split("  ")[0]
    return "a function" if callable(magnitude) else f"{float(magnitude):.4g}"
