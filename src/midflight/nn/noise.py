"""Gaussian noise whose magnitude is a hyperparameter.

    additive:        x + std N(0, 1)              on inputs or hidden activations
    multiplicative:  x (1 + std N(0, 1))          Gaussian dropout (Srivastava et al. 2014, sec. 10)

Both are reparametrised: the derivative with respect to std is the one at the noise that was drawn,
an unbiased estimate of the derivative of the expected loss.
"""

import torch
from torch import Tensor, nn

from midflight.nn.magnitude import Magnitude, default_floor, describe, drawn


class _Noise(nn.Module):
    """A noise of magnitude std, drawn anew at every training pass."""

    def __init__(self, std: Magnitude, floor: float | None = None) -> None:
        super().__init__()
        self.std = std
        self.floor = default_floor(std) if floor is None else floor

    def noise(self, x: Tensor) -> Tensor:
        """std N(0, 1), shaped like x."""
        return (drawn(self.std, self.floor, x) * torch.randn_like(x)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"std: {describe(self.std)}, floor={self.floor:g}"


class GaussianNoise(_Noise):
    """x + std N(0, 1) while training, x in eval mode.

    The derivative with respect to std at std = 0 has mean zero by symmetry: noise and its mirror
    image do the same. So the noise is never drawn below `floor`, where the derivative still tells
    something, while std itself may reach 0.

    Args:
        std: a hyperparameter of a `Space`, of shape () or one that broadcasts against x (one magnitude
            per feature, channel or unit); a function that reads some; or a fixed number. In the
            units of x; default range 0 to 0.8, for inputs of unit scale.
        floor: smallest magnitude drawn; 5 % of the range if std is tuned down to 0, else 0.

    Shape:
        any floating-point tensor; the output has the same shape and dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x + self.noise(x) if self.training else x


class MultiplicativeNoise(_Noise):
    """x (1 + std N(0, 1)) while training, x in eval mode (Srivastava et al. 2014, sec. 10).

    Dropout with rate p has a mask of the same mean and variance at std = sqrt(p / (1 - p)), but this
    one is smooth in its magnitude. Symmetric at std = 0 as `GaussianNoise` is, hence the floor.

    Args:
        std: as for `GaussianNoise`, but relative to x; default range 0 to 1, where 1 corresponds
            to dropping half.
        floor: smallest magnitude drawn; 5 % of the range if std is tuned down to 0, else 0.

    Shape:
        any floating-point tensor; the output has the same shape and dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.noise(x)) if self.training else x
