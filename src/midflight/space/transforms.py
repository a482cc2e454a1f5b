"""Maps from unit coordinates to values: value = transform(raw), from raw in [0, 1] onto [low, high].

A step moves a value by a fraction of its range, so one step size suits all hyperparameters. In a range wider
than usual, `stride` shortens the step to the same fraction of a usual range.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transform(ABC):
    """A differentiable, increasing map from [0, 1] onto [low, high]."""

    USUAL: ClassVar[float]
    """The width of a usual range, in units of the scale."""

    low: float
    high: float

    @property
    @abstractmethod
    def width(self) -> float:
        """The width of this range, in units of the scale."""

    def stride(self, raw: Tensor, usual: float | None = None) -> float | Tensor:
        """Return min(1, usual width / width of this range), a number or shaped like raw.

        Args:
            raw: the unit coordinate now.
            usual: another width in place of USUAL.
        """
        return min(1.0, (usual or self.USUAL) / self.width)

    @abstractmethod
    def value(self, raw: Tensor) -> Tensor:
        """Return the value that the model sees at the unit coordinate `raw`, of any shape."""

    @abstractmethod
    def raw(self, value: Tensor) -> Tensor:
        """Return the unit coordinate of a value; the inverse of the method `value`."""


@dataclass(frozen=True)
class Linear(Transform):
    """value = low + (high - low) raw.

    A linear scale has no unit of its own. So the width of a usual range is TIMES_INIT times the initial
    value. If that is 0 or unknown, it is 45, as for angles in degrees, or 45 * 45 / width for a wider range:
    the wider a range is, the less it says about the scale. If GROWTH times the value now is more, that
    counts.
    """

    USUAL, TIMES_INIT, GROWTH = 45.0, 20.0, 6.0
    LEAST_STRIDE = 1e-5
    """Shorter steps would be lost in the rounding of float32."""

    init: float = field(default=0.0, compare=False)
    """The size of the initial value."""

    @property
    def width(self) -> float:
        return self.high - self.low

    def stride(self, raw: Tensor, usual: float | None = None) -> float | Tensor:
        least = usual or self.TIMES_INIT * self.init or self.USUAL * min(1.0, self.USUAL / self.width)
        if least >= self.width:
            return 1.0
        width = (self.GROWTH * self.value(raw).abs()).clamp(min=least)
        return (width / self.width).clamp(self.LEAST_STRIDE, 1)

    def value(self, raw: Tensor) -> Tensor:
        return self.low + self.width * raw

    def raw(self, value: Tensor) -> Tensor:
        return (value - self.low) / self.width


class Log(Transform):
    """value = low (high / low)^raw. A usual range spans 6.5 powers of 10."""

    USUAL = 6.5 * math.log(10)

    @property
    def width(self) -> float:
        return math.log(self.high / self.low)

    def value(self, raw: Tensor) -> Tensor:
        return self.low * (self.width * raw).exp()

    def raw(self, value: Tensor) -> Tensor:
        return (value / self.low).log() / self.width


class Logit(Transform):
    """logit(value) = logit(low) + (logit(high) - logit(low)) raw; for rates close to 0 or 1.

    A usual range is 6 wide, as from 0.05 to 0.95.
    """

    USUAL = 6.0

    @property
    def width(self) -> float:
        return _logit(self.high) - _logit(self.low)

    def value(self, raw: Tensor) -> Tensor:
        return (_logit(self.low) + self.width * raw).sigmoid()

    def raw(self, value: Tensor) -> Tensor:
        return (value.logit() - _logit(self.low)) / self.width


@dataclass(frozen=True)
class Simplex(Transform):
    """value = floor / k + (1 - floor) softmax(log(ratio) raw), over the last dimension, of length k.

    The values are positive and sum to 1. Unlike other scales, each depends on all coordinates: only their
    differences count. No two shares of the softmax differ by more than the factor `ratio`.
    """

    USUAL = math.inf

    ratio: float = 1000.0
    floor: float = 0.0

    @property
    def width(self) -> float:
        return math.log(self.ratio)

    def value(self, raw: Tensor) -> Tensor:
        share: Tensor = (self.width * raw).softmax(-1)
        return self.floor / raw.shape[-1] + (1 - self.floor) * share

    def raw(self, value: Tensor) -> Tensor:
        share = (value - self.floor / value.shape[-1]) / (1 - self.floor)
        logs = share.clamp(min=torch.finfo(share.dtype).tiny).log()
        middle = (logs.amax(-1, keepdim=True) + logs.amin(-1, keepdim=True)) / 2
        return 0.5 + (logs - middle) / self.width

    def by_share(self, raw: Tensor, slope: Tensor) -> Tensor:
        """Return the derivative by each share minus its mean over the shares, from the one by `raw`.

        dC/draw_i = log(ratio) (1 - floor) s_i (dC/dw_i - sum_j s_j dC/dw_j),   s = softmax(log(ratio) raw)
        """
        return slope / (self.width * (1 - self.floor) * (self.width * raw).softmax(-1))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
