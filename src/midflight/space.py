"""The hyperparameters: what may vary, between which bounds, and where each stands now.

A hyperparameter is a plain object around a leaf tensor, neither a Parameter nor a buffer of the
model: `SGD(model.parameters())` must not train it on the training loss, and `model.to()` must not
replace it. Its hypergradient lands in `raw.grad`, so any torch optimiser can move it.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from midflight.errors import SpaceError, UnknownName
from midflight.transforms import Linear, Log, Logit, Transform
from midflight.trees import Tensors

Value = float | Sequence[float] | Tensor
Choice: TypeAlias = str | int | float | bool | None
When: TypeAlias = Mapping[str, Choice | tuple[Choice, ...]]
"""Name of an `Int` or `Categorical` -> the value, or a tuple of values, that it must have; all must hold."""
ROUNDING = 1e-6  # a few float32 roundings


@dataclass(frozen=True)
class Float:
    """A continuous hyperparameter between `low` and `high`, both included.

    Args:
        low: smallest value, finite.
        high: largest value, finite; low < high.
        log: move on a logarithmic scale; needs low > 0.
        logit: move on a logit scale, for rates that crowd at 0 or 1; needs 0 < low and high < 1.
        init: where it starts, one number for all entries or one each; the middle of the
            (log, logit) range if not given.
        shape: of the value; () for one number, (n,) for one per parameter group, layer, class or
            training example.
        online: in `midflight.search`: tuned inside each trial instead of searched.
        when: in `midflight.search`: part of a configuration only where other hyperparameters have
            these values; see `When`.

    Raises:
        SpaceError: one of the conditions above does not hold.
    """

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
            real = isinstance(bound, numbers.Real) and not isinstance(bound, bool)
            if not real or not math.isfinite(bound):
                raise SpaceError(f"{name} must be a finite number, but {name}={bound!r}.")
        if not self.low < self.high:
            raise SpaceError(f"low < high must hold, but low={self.low} and high={self.high}.")
        object.__setattr__(self, "shape", _as_shape(self.shape))
        if self.log and self.low <= 0:
            raise SpaceError(
                f"low > 0 must hold for log=True, but low={self.low}; pass log=False or a positive low."
            )
        if self.logit and not 0 < self.low < self.high < 1:
            raise SpaceError(
                f"0 < low and high < 1 must hold for logit=True, but low={self.low} and high={self.high}."
            )
        if self.log and self.logit:
            raise SpaceError("log and logit exclude each other; pass one of them.")
        if self.init is not None:
            self.check(self.init)

    def check(self, value: Value) -> Tensor:
        """`value` in this shape, float64; raises `SpaceError` unless low <= value <= high.

        What float32 rounded just over a bound is brought back to it.
        """
        try:
            tensor = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            tensor = None
        if tensor is None or isinstance(value, bool):
            raise SpaceError(f"a value must be a number or a list of numbers, but got {value!r}.")
        if tensor.shape not in ((), self.shape):
            raise SpaceError(f"a value of shape {self.shape} is needed, but got {tuple(tensor.shape)}.")
        low, high = self.low - ROUNDING * abs(self.low), self.high + ROUNDING * abs(self.high)
        wrong = tensor[~((tensor >= low) & (tensor <= high))]
        if len(wrong):
            raise SpaceError(
                f"a value in [{self.low:g}, {self.high:g}] is needed, but got {float(wrong[0]):g}."
            )
        return tensor.clamp(self.low, self.high).expand(self.shape)

    @property
    def transform(self) -> Transform:
        """The map from the unit interval onto [low, high]."""
        return (Log if self.log else Logit if self.logit else Linear)(self.low, self.high)


def _as_shape(shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, list | tuple) else (shape,)
    if not isinstance(shape, list | tuple) or any(type(n) is not int or n < 1 for n in sizes):
        raise SpaceError(
            f"shape must be a tuple of whole numbers of at least 1, such as (3,), but got {shape!r}."
        )
    return sizes


@dataclass(frozen=True)
class Int:
    """A whole number between `low` and `high`, both included; searched by an engine of `midflight.search`.

    Args:
        low: smallest value.
        high: largest value; low < high.
        log: search on a logarithmic scale; needs low > 0.
        when: part of a configuration only where other hyperparameters have these values; see `When`.

    Raises:
        SpaceError: one of the conditions above does not hold.
    """

    low: int
    high: int
    log: bool = False
    when: When | None = field(default=None, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            if isinstance(bound, bool) or not isinstance(bound, int):
                raise SpaceError(f"{name} must be a whole number, but got {bound!r}; use Float for others.")
        if not self.low < self.high:
            raise SpaceError(f"low < high must hold, but low={self.low} and high={self.high}.")
        if self.log and self.low <= 0:
            raise SpaceError(
                f"low > 0 must hold for log=True, but low={self.low}; pass log=False or a positive low."
            )


@dataclass(frozen=True)
class Categorical:
    """One of a few values without an order; searched by an engine of `midflight.search`.

    Args:
        choices: strings, numbers, booleans or None, no two equal.
        when: part of a configuration only where other hyperparameters have these values; see `When`.

    Raises:
        SpaceError: there is no choice, two are equal, or one is of another type.
    """

    choices: Sequence[Choice]
    when: When | None = field(default=None, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.choices, str) or not len(self.choices):
            raise SpaceError(f"choices must be a list of at least one value, but got {self.choices!r}.")
        object.__setattr__(self, "choices", tuple(self.choices))
        for n, choice in enumerate(self.choices):
            if not isinstance(choice, str | int | float | bool | None):
                raise SpaceError(
                    f"a choice must be a string, a number, a boolean or None, but got {choice!r}; "
                    "name it and look it up in your own code."
                )
            if choice in self.choices[:n]:
                raise SpaceError(f"choices must differ, but {choice!r} came twice (1 equals 1.0 and True).")


class Hyperparameter:
    """One entry of a `Space`: use it like a tensor wherever a tensor can stand, and like a number in loggers.

    numpy, `float` and format strings see the value as it is now, without its gradient.

    Attributes:
        raw: unit coordinates in [0, 1], a leaf tensor of the shape of the `Float`; moved by the tuner.
        value: what the model sees, `transform(raw)`, differentiable with respect to `raw`.
    """

    __array_priority__ = 1000
    """Makes numpy's operators leave the operation to those below, which keep the gradient."""

    def __init__(self, name: str, spec: Float, dtype: torch.dtype) -> None:
        self.name = name
        self.spec = spec
        self.transform = spec.transform
        low, high = self.transform.value(torch.tensor([0.0, 1.0], dtype=dtype)).tolist()
        if not (math.isfinite(high) and low < high):
            raise SpaceError(
                f"the range of {name} must fit into {dtype}, but [{spec.low:g}, {spec.high:g}] becomes "
                f"[{low:g}, {high:g}]; take another range or dtype=torch.float64."
            )
        self.raw = torch.full(spec.shape, 0.5, dtype=dtype)
        self._seen: Tensor | None = None
        if spec.init is not None:
            self.set(spec.init)

    @property
    def value(self) -> Tensor:
        return self.transform.value(self.raw) if self._seen is None else self._seen

    def set(self, value: Value) -> None:
        """Move to `value`; raises `SpaceError` outside [low, high] or for another shape."""
        with torch.no_grad():
            self.raw.copy_(self.transform.raw(self.spec.check(value)).clamp(0, 1))

    def __float__(self) -> float:
        return float(self.value.detach())

    def __int__(self) -> int:
        return int(float(self))

    def item(self) -> float:
        """The value now, of a hyperparameter that is one number; as of a tensor."""
        return float(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(self.value.detach().tolist(), dtype=dtype)

    def __format__(self, spec: str) -> str:
        return format(self.value.detach().tolist(), spec) if spec else repr(self)

    def __round__(self, digits: int | None = None) -> float:
        return round(float(self), digits)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: Any) -> Tensor:
        return self.value[index]

    def __repr__(self) -> str:
        scale = "log" if self.spec.log else "logit" if self.spec.logit else "linear"
        x, raw = self.value.detach(), self.raw.detach()
        now = f"{float(x):.4g}" if x.ndim == 0 else f"{tuple(x.shape)}, mean {float(x.mean()):.4g}"
        sides = {"lower": int((raw <= 0).sum()), "upper": int((raw >= 1).sum())}
        of = "" if x.ndim == 0 else f"{{}} of {x.numel()} "
        bounds = "".join(f", {of.format(n)}at the {side} bound" for side, n in sides.items() if n)
        return f"{self.name} = {now}  ({scale} in [{self.spec.low:.4g}, {self.spec.high:.4g}]{bounds})"

    def __add__(self, other: Any) -> Tensor:
        result: Tensor = self.value + other
        return result

    def __radd__(self, other: Any) -> Tensor:
        result: Tensor = other + self.value
        return result

    def __sub__(self, other: Any) -> Tensor:
        result: Tensor = self.value - other
        return result

    def __rsub__(self, other: Any) -> Tensor:
        result: Tensor = other - self.value
        return result

    def __mul__(self, other: Any) -> Tensor:
        result: Tensor = self.value * other
        return result

    def __rmul__(self, other: Any) -> Tensor:
        result: Tensor = other * self.value
        return result

    def __truediv__(self, other: Any) -> Tensor:
        result: Tensor = self.value / other
        return result

    def __rtruediv__(self, other: Any) -> Tensor:
        result: Tensor = other / self.value
        return result

    def __pow__(self, other: Any) -> Tensor:
        result: Tensor = self.value**other
        return result

    def __rpow__(self, other: Any) -> Tensor:
        result: Tensor = other**self.value
        return result

    def __neg__(self) -> Tensor:
        return self.value.neg()

    def __lt__(self, other: Any) -> Tensor:
        result: Tensor = self.value < other
        return result

    def __le__(self, other: Any) -> Tensor:
        result: Tensor = self.value <= other
        return result

    def __gt__(self, other: Any) -> Tensor:
        result: Tensor = self.value > other
        return result

    def __ge__(self, other: Any) -> Tensor:
        result: Tensor = self.value >= other
        return result

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*_values_of(args), **{k: _value_of(v) for k, v in (kwargs or {}).items()})


numbers.Number.register(Hyperparameter)  # TensorBoard asks numpy whether it is a scalar


def _value_of(x: Any) -> Any:
    if isinstance(x, Hyperparameter):
        return x.value
    return _values_of(x) if type(x) in (list, tuple) else x


def _values_of(xs: Any) -> Any:
    return type(xs)(_value_of(x) for x in xs)


class Space:
    """Named hyperparameters.

    Args:
        specs: name -> `Float`, for names that are no Python identifiers.
        dtype: of the raw coordinates; torch's default dtype if not given.
        named: the same as keywords: `Space(noise=Float(0, 0.8))`.

    Raises:
        SpaceError: it is empty; a name is no text; an entry is not a `Float`, or its range does not fit
            `dtype`.
    """

    def __init__(
        self, specs: Mapping[str, Float] | None = None, /, *, dtype: torch.dtype | None = None, **named: Float
    ) -> None:
        specs = {**(specs or {}), **named}
        if not specs:
            raise SpaceError("a Space needs at least one hyperparameter, such as noise=Float(0, 0.8).")
        for name, spec in specs.items():
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise SpaceError(
                    f"a hyperparameter's name must be a printable text that is not empty, but got {name!r}."
                )
            if isinstance(spec, Int | Categorical):
                raise SpaceError(
                    f"{name} must be a Float to be tuned while the model trains, but is {spec!r}, which has "
                    "no gradient; declare it in a midflight.search.Space and an engine searches it."
                )
            if not isinstance(spec, Float):
                raise SpaceError(f"{name} must be a Float, but got {spec!r}.")
        dtype = dtype or torch.get_default_dtype()
        self._entries = {name: Hyperparameter(name, spec, dtype) for name, spec in specs.items()}

    def __getitem__(self, name: str) -> Hyperparameter:
        if name not in self._entries:
            raise UnknownName("a hyperparameter of this space", name, self._entries)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._entries.values()))

    @property
    def raws(self) -> Tensors:
        """Unit coordinates, name -> leaf tensor in [0, 1]; what a hyper-optimiser moves."""
        return {name: entry.raw for name, entry in self._entries.items()}

    def as_dict(self) -> dict[str, Any]:
        """The current values as plain numbers, nested lists of them for a shape."""
        return {name: entry.value.detach().tolist() for name, entry in self._entries.items()}

    def set(self, **values: Value) -> None:
        """Move the named hyperparameters to these values; raises `SpaceError` outside their bounds."""
        for name, value in values.items():
            self[name].set(value)

    def requires_grad_(self, flag: bool = True) -> None:
        """Whether forward passes from now on are recorded with respect to the hyperparameters."""
        for entry in self._entries.values():
            entry.raw.requires_grad_(flag)

    @contextmanager
    def using(self, raws: Tensors) -> Iterator[None]:
        """Let those who read this space find other raw tensors for a while."""
        before = self.raws
        try:
            for name, raw in raws.items():
                self[name].raw = raw
            yield
        finally:
            for name, raw in before.items():
                self[name].raw = raw

    @contextmanager
    def seeing(self, values: Tensors) -> Iterator[None]:
        """Let those who read this space see these values for a while, whatever the raw tensors say."""
        try:
            for name, value in values.items():
                self[name]._seen = value
            yield
        finally:
            for name in values:
                self[name]._seen = None

    def state_dict(self) -> dict[str, Any]:
        """The raw coordinates and their ranges, to be saved with the model's state."""
        return {
            "raw": {name: entry.raw.detach().clone() for name, entry in self._entries.items()},
            "range": {name: _range(entry.spec) for name, entry in self._entries.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; what was saved in another range keeps its value.

        Raises:
            SpaceError: names or shapes differ, or a value lies outside this range; nothing is changed then.
        """
        if set(state["raw"]) != set(self._entries):
            raise SpaceError(
                f"the saved space has {sorted(state['raw'])}, this one {sorted(self._entries)}; "
                "build the same space before loading."
            )
        raws = {
            name: _moved(entry, state["raw"][name], state.get("range", {}).get(name))
            for name, entry in self._entries.items()
        }
        with torch.no_grad():
            for name, raw in raws.items():
                self[name].raw.copy_(raw)


def _range(spec: Float) -> tuple[float, float, str]:
    return float(spec.low), float(spec.high), "log" if spec.log else "logit" if spec.logit else "linear"


def _moved(entry: Hyperparameter, raw: Tensor, saved: Sequence[Any] | None) -> Tensor:
    """The coordinate here of what stood at `raw` in the range `saved`; None is this range."""
    spec = entry.spec
    if raw.shape != spec.shape:
        raise SpaceError(f"{entry.name} must have shape {spec.shape}, but was saved with {tuple(raw.shape)}.")
    if saved is None or tuple(saved) == _range(spec):
        return raw
    low, high, scale = saved
    value = Float(low, high, log=scale == "log", logit=scale == "logit").transform.value(raw.double())
    try:
        return spec.transform.raw(spec.check(value)).clamp(0, 1)
    except SpaceError as error:
        raise SpaceError(f"the saved {entry.name} does not fit: {error}") from None
