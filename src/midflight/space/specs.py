"""Declare the kinds of hyperparameters and their bounds."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from midflight.errors import SpaceError
from midflight.space.transforms import Linear, Log, Logit, Simplex, Transform

Value = float | Sequence[float] | Tensor
Choice: TypeAlias = str | int | float | bool | None
When: TypeAlias = Mapping[str, Choice | tuple[Choice, ...]]
"""Name of an `Int` or `Categorical` -> its required value, or a tuple of allowed values; all must hold."""
ROUNDING = 1e-6  # a few float32 rounding errors, relative to the bound


@dataclass(frozen=True)
class Float:
    """A continuous hyperparameter between `low` and `high`, both included.

    Args:
        low: smallest value, finite.
        high: largest value, finite; low < high.
        log: move on a logarithmic scale; needs low > 0.
        logit: move on a logit scale, for rates close to 0 or 1; needs 0 < low and high < 1.
        init: initial value, one number for all entries or one per entry; default: the middle of the
            (log, logit) range.
        shape: shape of the value; () for one number, (n,) for one per parameter group, layer, class or
            training example.
        online: for `midflight.search`: tune it inside each trial instead of searching it.
        when: for `midflight.search`: use it only if other hyperparameters have these values; see `When`.

    Raises:
        SpaceError: one of the conditions above does not hold.
    """

    is_shares: ClassVar[bool] = False
    """Whether the value is shares of a whole, which regularise nothing and may well be at their least."""
    is_per_example: ClassVar[bool] = False
    """Whether the value has one entry per training example, of which a batch reaches few."""

    low: float
    high: float
    log: bool = False
    init: Value | None = None
    logit: bool = False
    shape: tuple[int, ...] = ()
    online: bool = field(default=False, kw_only=True)
    when: When | None = field(default=None, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            if not _is_real(bound) or not math.isfinite(bound):
                raise SpaceError(f"{name} must be a finite number, but {name}={bound!r}.")
        _require_bounds(self.low, self.high, self.log)
        object.__setattr__(self, "shape", _as_shape(self.shape))
        if self.logit and not 0 < self.low < self.high < 1:
            raise SpaceError(
                f"0 < low and high < 1 must hold for logit=True, but low={self.low} and high={self.high}."
            )
        if self.log and self.logit:
            raise SpaceError("log and logit exclude each other; pass one of them.")
        if self.init is not None:
            self.check(self.init, "init")

    def check(self, value: Value, name: str = "a value") -> Tensor:
        """Return `value` in this shape as float64; raise `SpaceError` unless low <= value <= high.

        A value just past a bound by float32 rounding is set to the bound.

        Args:
            value: one number for all entries or one per entry.
            name: for messages.
        """
        try:
            tensor = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            tensor = None
        if tensor is None or isinstance(value, bool):
            raise SpaceError(f"{name} must be a number or a list of numbers, but got {value!r}.")
        if tensor.shape not in ((), self.shape):
            raise SpaceError(f"{name} of shape {self.shape} is needed, but got {tuple(tensor.shape)}.")
        low, high = self.low - ROUNDING * abs(self.low), self.high + ROUNDING * abs(self.high)
        wrong = tensor[~((tensor >= low) & (tensor <= high))]
        if len(wrong):
            raise SpaceError(
                f"{name} in [{self.low:g}, {self.high:g}] is needed, but got {float(wrong[0]):g}."
            )
        return tensor.clamp(self.low, self.high).expand(self.shape)

    @property
    def transform(self) -> Transform:
        """The map from the unit interval onto [low, high]."""
        if self.log or self.logit:
            return (Log if self.log else Logit)(self.low, self.high)
        init = 0.0 if self.init is None else float(self.check(self.init).abs().max())
        return Linear(self.low, self.high, init)


@dataclass(frozen=True)
class Shares(Float):
    """Shares of a whole, positive numbers with the sum 1; `midflight.Mixture` makes it.

    Args:
        ratio: the largest factor between two shares, apart from `floor`; above 1.
        floor: the part of the whole that is shared equally; in [0, 1).

    Raises:
        SpaceError: one of these does not hold.
    """

    is_shares: ClassVar[bool] = True

    ratio: float = field(default=1000.0, kw_only=True)
    floor: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not _is_real(self.ratio) or not 1 < self.ratio < math.inf:
            raise SpaceError(f"1 < ratio must hold, and ratio be finite, but ratio={self.ratio}.")
        if not _is_real(self.floor) or not 0 <= self.floor < 1:
            raise SpaceError(f"0 <= floor < 1 must hold, but floor={self.floor}.")
        super().__post_init__()

    def check(self, value: Value, name: str = "a value") -> Tensor:
        """Return `value` divided by its sum, as float64; raise `SpaceError` if it is out of reach.

        A share out of reach by float32 rounding alone is set to the least one.
        """
        try:
            given = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            given = torch.tensor(math.nan)
        if given.shape != self.shape or not bool((given > 0).all()) or not bool(given.isfinite().all()):
            raise SpaceError(f"{name} must be {self.shape[0]} positive numbers, but got {value!r}.")
        shares: Tensor = given / given.sum()
        equal = self.floor / len(shares)
        least = equal + float(shares.max() - equal) / self.ratio
        if least <= equal or bool((shares < least - ROUNDING * shares).any()):
            raise SpaceError(
                f"{name} must have shares that differ by at most the factor {self.ratio:g}, above "
                f"floor={self.floor:g}, but they go from {shares.min():.3g} to {shares.max():.3g}; pass a "
                "larger ratio or a smaller floor."
            )
        return shares.clamp(min=least)

    @property
    def transform(self) -> Transform:
        return Simplex(self.low, self.high, self.ratio, self.floor)


@dataclass(frozen=True)
class PerExample(Float):
    """One value per training example, of which a batch has few; `midflight.ExampleWeights` makes it."""

    is_per_example: ClassVar[bool] = True


def _is_real(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _require_bounds(low: float, high: float, log: bool) -> None:
    if not low < high:
        raise SpaceError(f"low < high must hold, but low={low} and high={high}.")
    if log and low <= 0:
        raise SpaceError(f"low > 0 must hold for log=True, but low={low}; pass log=False or a positive low.")


def _as_shape(shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, list | tuple) else (shape,)
    if not isinstance(shape, list | tuple) or any(type(n) is not int or n < 1 for n in sizes):
        raise SpaceError(
            f"shape must be a tuple of whole numbers of at least 1, such as (3,), but got {shape!r}."
        )
    return sizes


@dataclass(frozen=True)
class Int:
    """A whole number between `low` and `high`, both included, for `midflight.search` only.

    Args:
        low: smallest value.
        high: largest value; low < high.
        log: search on a logarithmic scale; needs low > 0.
        when: it is part of a configuration only where other hyperparameters have these values; see `When`.

    Raises:
        SpaceError: one of the conditions above does not hold.
    """

    low: int
    high: int
    log: bool = False
    when: When | None = field(default=None, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            if isinstance(bound, bool) or not isinstance(bound, numbers.Integral):
                raise SpaceError(f"{name} must be a whole number, but got {bound!r}; use Float for others.")
            object.__setattr__(self, name, int(bound))
        _require_bounds(self.low, self.high, self.log)


@dataclass(frozen=True)
class Categorical:
    """A choice among values without an order, for `midflight.search` only.

    Args:
        choices: strings, numbers, booleans or None, all different.
        when: it is part of a configuration only where other hyperparameters have these values; see `When`.

    Raises:
        SpaceError: there is no choice, two are equal, or one is of another type.
    """

    choices: Sequence[Choice]
    when: When | None = field(default=None, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        ordered = hasattr(self.choices, "__getitem__") and not isinstance(self.choices, str | Mapping)
        if not ordered or not len(self.choices):
            raise SpaceError(f"choices must be a list of at least one value, but got {self.choices!r}.")
        plain = [c.item() if isinstance(c, np.generic) else c for c in self.choices]
        object.__setattr__(self, "choices", tuple(plain))
        for n, choice in enumerate(self.choices):
            if not isinstance(choice, str | int | float | bool | None):
                raise SpaceError(
                    f"a choice must be a string, a number, a boolean or None, but got {choice!r}; "
                    "name it and look it up in your own code."
                )
            if choice in self.choices[:n]:
                raise SpaceError(f"choices must differ, but {choice!r} came twice (1 equals 1.0 and True).")
