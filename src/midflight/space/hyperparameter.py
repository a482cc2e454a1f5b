"""Represent one hyperparameter by a leaf tensor in unit coordinates and the value that the model sees.

It is neither a Parameter nor a buffer of the model. So `SGD(model.parameters())` does not train it, and
`model.to()` does not replace it. `raw.grad` holds its hypergradient, so any torch optimiser can move it.
"""

import math
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from midflight.errors import SpaceError
from midflight.space.specs import Float, Value


def _operator(apply: Callable[[Any, Any], Any], swapped: bool = False) -> Callable[[Any, Any], Tensor]:
    """Return a tensor operator whose left operand is the hyperparameter, or the right one if swapped."""

    def operator(self: "Hyperparameter", other: Any) -> Tensor:
        result: Tensor = apply(other, self.value) if swapped else apply(self.value, other)
        return result

    return operator


class Hyperparameter:
    """One entry of a `Space`: use it like a tensor in models and losses, like a number in loggers.

    numpy, `float` and format strings get the current value without its gradient.

    Attributes:
        raw: unit coordinates in [0, 1], a leaf tensor of the shape of the `Float`; the tuner moves it.
        value: what the model sees, `transform.value(raw)`; differentiable with respect to `raw`.
    """

    __array_priority__ = 1000
    """Make numpy's operators defer to the operators below, which keep the gradient."""

    def __init__(self, name: str, spec: Float, dtype: torch.dtype) -> None:
        self.name = name
        self.spec = spec
        self.transform = spec.transform
        low, high = self.transform.value(torch.tensor([0.0, 1.0], dtype=dtype)).tolist()
        if not (math.isfinite(high) and low < high):
            raise SpaceError(
                f"the range of {name} must fit into {dtype}, but [{spec.low:g}, {spec.high:g}] becomes "
                f"[{low:g}, {high:g}]; choose another range or dtype=torch.float64."
            )
        self.raw = torch.full(spec.shape, 0.5, dtype=dtype)
        self._seen: Tensor | None = None
        self._given: tuple[Tensor, Tensor] | None = None
        if spec.init is not None:
            self.set(spec.init)

    def named(self, name: str, dtype: torch.dtype) -> "Hyperparameter":
        """Take a name and a type, as an entry of a `Space`; return self."""
        self.name, self.raw = name, self.raw.detach().to(dtype)
        return self

    def parts(self) -> dict[str, float]:
        """Return what a logger shows, name -> number: the value, or its mean if it has a shape."""
        return {self.name: float(self.value.detach().mean())}

    @property
    def value(self) -> Tensor:
        return self.transform.value(self.raw) if self._seen is None else self._seen

    def set(self, value: Value) -> None:
        """Set the value; raise `SpaceError` outside [low, high] or for another shape."""
        given = self.spec.check(value)
        with torch.no_grad():
            self.raw.copy_(self.transform.raw(given).clamp(0, 1))
        self._given = self.raw.detach().clone(), given

    def tolist(self) -> Any:
        """Return the current value as a number or nested lists.

        Until the value moves, this is the number that was set, to the last digit.
        """
        if self._seen is None and self._given is not None:
            raw, given = self._given
            if raw.dtype == self.raw.dtype and torch.equal(raw, self.raw.detach().to(raw.device)):
                return given.tolist()
        return self.value.detach().tolist()

    def __float__(self) -> float:
        return float(torch.tensor(self.tolist(), dtype=torch.float64))

    def __int__(self) -> int:
        return int(float(self))

    def item(self) -> float:
        """Return the current value of a hyperparameter of shape () as a number, as `Tensor.item` does."""
        return float(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(self.tolist(), dtype=dtype)

    def __format__(self, spec: str) -> str:
        return format(self.tolist(), spec) if spec else repr(self)

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

    __add__, __radd__ = _operator(operator.add), _operator(operator.add, swapped=True)
    __sub__, __rsub__ = _operator(operator.sub), _operator(operator.sub, swapped=True)
    __mul__, __rmul__ = _operator(operator.mul), _operator(operator.mul, swapped=True)
    __truediv__, __rtruediv__ = _operator(operator.truediv), _operator(operator.truediv, swapped=True)
    __pow__, __rpow__ = _operator(operator.pow), _operator(operator.pow, swapped=True)
    __lt__ = _operator(operator.lt)
    __le__ = _operator(operator.le)
    __gt__ = _operator(operator.gt)
    __ge__ = _operator(operator.ge)

    def __neg__(self) -> Tensor:
        return self.value.neg()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return func(*_values_of(args), **{k: _value_of(v) for k, v in (kwargs or {}).items()})
        except TypeError as error:
            if "not Tensor" not in str(error):
                raise
            name = getattr(func, "__name__", str(func))
            raise TypeError(
                f"{name} of torch needs a plain number where it was given a hyperparameter, and a number has "
                f"no gradient; use {_INSTEAD.get(name, 'mf.nn, or write it with operations on tensors')}."
            ) from error


numbers.Number.register(Hyperparameter)  # TensorBoard calls np.isscalar, which asks for a numbers.Number


_INSTEAD = {
    "dropout": 'mf.nn.Dropout(space["x"])',
    "cross_entropy_loss": 'mf.nn.losses.cross_entropy(logits, targets, label_smoothing=space["x"])',
}
"""Function of torch that takes numbers only -> what takes a hyperparameter."""


def _value_of(x: Any) -> Any:
    if isinstance(x, Hyperparameter):
        return x.value
    return _values_of(x) if type(x) in (list, tuple) else x


def _values_of(xs: Any) -> Any:
    return type(xs)(_value_of(x) for x in xs)
