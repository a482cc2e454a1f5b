r"""Apply dropout with exact Bernoulli masks, and differentiate with respect to its rate.

    mask = kept / (1 - p),   kept ~ Bernoulli(1 - p)
    d mask / d p := (mask - 1) / (2 p (1 - p))

A mask has no derivative, but the expected loss has. For one unit, with s = 1 / (1 - p), it is

    d/dp E f(mask) = f(0) - f(s) + s f'(s)

The trapezoid rule replaces f(s) - f(0) by s (f'(0) + f'(s)) / 2. This gives E[f'(mask) d mask/dp] with the
derivative defined above. It is the derivative of the mask through its standard deviation sqrt(p / (1 - p)),
at a fixed standardised draw. It is also the second-order rule of Liu et al. 2023 ("Bridging discrete and
backpropagation", ReinMax) for a Bernoulli variable of this scale.
"""

import torch
from torch import Tensor, nn

from midflight.nn.magnitude import Magnitude, constant, default_floor, describe, drawn
from midflight.space import Hyperparameter


class Dropout(nn.Module):
    """A dropout layer whose rate is a hyperparameter.

    The forward pass and the attributes `p` and `inplace` are those of `torch.nn.Dropout`. In training mode,
    each entry is 0 with probability `rate`, else scaled by 1 / (1 - rate). The derivative with respect to
    `rate` estimates that of the expected loss over the masks. It is unbiased if the loss is quadratic in each
    mask entry. Otherwise its bias is the error of the trapezoid rule:

        rate                             0.1    0.5    0.8
        weights of the initial scale     6 %   10 %   42 %
        weights three times as large    23 %   24 %   19 %

    The table shows the bias of <w, gradient> over all masks of 8 tanh units, a median of 16 networks
    (benchmarks/dropout_gradient.py). 6 of the 96 signs were wrong. The concrete relaxation (Gal et al. 2017,
    Eq. 5) at temperature 0.1 had no wrong sign and a bias of 6 to 12 %, up to 8 of it from sampling. But its
    standard deviation was 2.6 to 3 times as large, and its forward pass is not dropout.

    Args:
        rate: a hyperparameter of a `Space` with high < 1, a function that reads hyperparameters, or a number.
            Shape () or one that broadcasts against x. Default range 0.01 to 0.8 on a logit scale.
        floor: smallest rate of the masks. Default: 5 % of the range if it begins at 0, else 0. At rate 0
            nothing is dropped, so the derivative would be unknown.

    Shape:
        any floating-point tensor; the output has the same shape and dtype.

    Raises:
        ValueError: 0 <= rate < 1 does not hold.
    """

    inplace = False
    """The default of `torch.nn.Dropout`."""

    def __init__(self, rate: Magnitude, floor: float | None = None) -> None:
        super().__init__()
        bounds: tuple[float, ...] = ()  # those of a function are unknown
        if isinstance(rate, Hyperparameter):
            bounds = (rate.spec.low, rate.spec.high)
        elif not callable(rate):
            bounds = (float(rate),)
        for p in bounds:
            if not 0 <= p < 1:
                raise ValueError(f"0 <= rate < 1 must hold, but it may become {p:g}.")
        self.rate = rate
        self.floor = default_floor(rate) if floor is None else floor

    @property
    def p(self) -> float:
        """The current rate as a number without gradient; needs a rate of shape ()."""
        return float(self.rate() if callable(self.rate) else self.rate)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        rate = drawn(self.rate, self.floor, x)
        at = self._drawn_at(rate)
        mask = (torch.rand_like(x, dtype=rate.dtype) >= at) / (1 - at)
        # a fixed rate of 0 makes this 0 / tiny; a tuned rate is never so low
        slope = (mask - 1) / (2 * at * (1 - at)).clamp(min=torch.finfo(at.dtype).tiny)
        return x * (mask + (rate - at) * slope).to(x.dtype)

    def _drawn_at(self, rate: Tensor) -> Tensor:
        """Return the rate at which masks are drawn, as a constant."""
        return constant(self.rate, rate.detach())

    def extra_repr(self) -> str:
        return f"rate: {describe(self.rate)}, floor={self.floor:g}"
