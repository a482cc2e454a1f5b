"""Levels of randomness (a noise's std, a dropout's rate) and the floor below which none is drawn.

    drawn = max(level, floor),   d drawn / d level = 1

At level 0 a derivative says nothing: noise and its mirror image do the same, so it has mean zero, and
a dropout that drops nothing has nothing to learn from. So a level that may be tuned down to 0 is
drawn at no less than a floor, 5 % of its range, where the derivative still tells something, while
the hyperparameter itself may reach 0.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from midflight.space import Hyperparameter

Level = Hyperparameter | Callable[[], Tensor] | Tensor | float
"""A hyperparameter, a fixed number, or a function of hyperparameters: for a layer, which reads it at every
pass, one without arguments (`lambda: space["noise"][2]`); for a single call the tensor itself."""


def default_floor(level: Level) -> float:
    """5 % of the range if the level is a hyperparameter that may be tuned down to 0, else 0."""
    tuned_to_zero = isinstance(level, Hyperparameter) and level.spec.low == 0
    return 0.05 * level.spec.high if tuned_to_zero else 0.0  # type: ignore[union-attr]


def drawn(level: Level, floor: float, like: Tensor) -> Tensor:
    """The level at which to draw, at least `floor`, on the device of `like`; the derivative passes."""
    now: Any = level.value if isinstance(level, Hyperparameter) else level() if callable(level) else level
    x = now.to(like.device) if isinstance(now, Tensor) else like.new_tensor(now)
    return x + constant((level, floor), (floor - x).clamp(min=0).detach())


_held: dict[Any, Tensor] | None = None


def constant(what: Any, value: Tensor) -> Tensor:
    """A value that derivatives take for a constant; inside `held_constants` the first one of its kind."""
    return value if _held is None else _held.setdefault(what, value)


@contextmanager
def held_constants() -> Iterator[None]:
    """Keep each `constant` at its first value, so that differences see the function that is differentiated.

    Floors and the masks of dropout follow a level, though the derivative does not count it.
    """
    global _held
    before, _held = _held, {}
    try:
        yield
    finally:
        _held = before


def describe(level: Level) -> str:
    """The level in a few characters, for `repr(model)`."""
    if isinstance(level, Hyperparameter):
        return repr(level).split("  ")[0]
    return "a function" if callable(level) else f"{float(level):.4g}"
