"""Add Gaussian noise whose magnitude is a hyperparameter.

    additive:        x + std N(0, 1)              on inputs or hidden activations
    multiplicative:  x (1 + std N(0, 1))          Gaussian dropout (Srivastava et al. 2014, sec. 10)

The derivative with respect to std is taken at the drawn N(0, 1) (reparametrisation). It is an unbiased
estimate of the derivative of the expected loss.
"""

import torch
from torch import Tensor, nn

from midflight.nn.magnitude import Magnitude, default_floor, describe, drawn


class _Noise(nn.Module):
    """Base class of noise with magnitude std, drawn anew in each training pass."""

    def __init__(self, std: Magnitude, floor: float | None = None) -> None:
        super().__init__()
        self.std = std
        self.floor = default_floor(std) if floor is None else floor

    def noise(self, x: Tensor) -> Tensor:
        """Draw std N(0, 1), shaped like x."""
        return (drawn(self.std, self.floor, x) * torch.randn_like(x)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"std: {describe(self.std)}, floor={self.floor:g}"


class GaussianNoise(_Noise):
    """A layer that returns x + std N(0, 1) in training mode, and x in eval mode.

    At std = 0 the derivative with respect to std has mean zero by symmetry. So the noise is never drawn below
    `floor`. std itself may reach 0.

    Args:
        std: a hyperparameter of a `Space`, a function that reads hyperparameters, or a number, in units of x.
            Shape () or one that broadcasts against x (one magnitude per feature, channel or unit). Default
            range 0 to 0.8, for inputs of unit scale.
        floor: smallest magnitude drawn. Default: 5 % of the range of std if it begins at 0, else 0.

    Shape:
        any floating-point tensor; the output has the same shape and dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x + self.noise(x) if self.training else x


class MultiplicativeNoise(_Noise):
    """A layer that returns x (1 + std N(0, 1)) in training mode, and x in eval mode.

    At std = sqrt(p / (1 - p)) it has the mean and variance of dropout at rate p (Srivastava et al. 2014,
    sec. 10), but it is smooth in std. It needs a floor for the same reason as `GaussianNoise`.

    Args:
        std: as for `GaussianNoise`, but relative to x. Default range 0 to 1; 1 corresponds to dropout at 1/2.
        floor: smallest magnitude drawn. Default: 5 % of the range of std if it begins at 0, else 0.

    Shape:
        any floating-point tensor; the output has the same shape and dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.noise(x)) if self.training else x
