"""Maps from unit coordinates to values: value = transform(raw), from raw in [0, 1] onto [low, high].

A step of a given length is the same fraction of every range. So one step size suits all hyperparameters.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Transform(ABC):
    """A differentiable, increasing map from [0, 1] onto [low, high]."""

    low: float
    high: float

    @abstractmethod
    def value(self, raw: Tensor) -> Tensor:
        """Return the value that the model sees at the unit coordinate `raw`, of any shape."""

    @abstractmethod
    def raw(self, value: Tensor) -> Tensor:
        """Return the unit coordinate of a value; the inverse of the method `value`."""


class Linear(Transform):
    """value = low + (high - low) raw."""

    def value(self, raw: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * raw

    def raw(self, value: Tensor) -> Tensor:
        return (value - self.low) / (self.high - self.low)


class Log(Transform):
    """value = low (high / low)^raw."""

    def value(self, raw: Tensor) -> Tensor:
        return self.low * (math.log(self.high / self.low) * raw).exp()

    def raw(self, value: Tensor) -> Tensor:
        return (value / self.low).log() / math.log(self.high / self.low)


class Logit(Transform):
    """logit(value) = logit(low) + (logit(high) - logit(low)) raw; for rates close to 0 or 1."""

    def value(self, raw: Tensor) -> Tensor:
        low, high = _logit(self.low), _logit(self.high)
        return (low + (high - low) * raw).sigmoid()

    def raw(self, value: Tensor) -> Tensor:
        low, high = _logit(self.low), _logit(self.high)
        return (value.logit() - low) / (high - low)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
