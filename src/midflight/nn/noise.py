"""Additive Gaussian noise whose level is a hyperparameter."""

import torch
from torch import Tensor, nn

from midflight.space import Hyperparameter


class GaussianNoise(nn.Module):
    """x + std N(0, 1) while training, x in eval mode.

    The derivative with respect to std at std = 0 has mean zero by symmetry: noise and its mirror
    image do the same. So the noise is never drawn below `floor`, where the derivative still tells
    something, while std itself may reach 0.

    Args:
        std: a hyperparameter of a `Space`, or a fixed number.
        floor: smallest level drawn; 1 % of the range if std is tuned down to 0, else 0.

    Shape:
        any floating-point tensor; the output has the same shape and dtype.
    """

    def __init__(self, std: Hyperparameter | float, floor: float | None = None) -> None:
        super().__init__()
        self.std = std
        if floor is None:
            tuned_to_zero = isinstance(std, Hyperparameter) and std.spec.low == 0
            floor = 0.01 * std.spec.high if tuned_to_zero else 0.0  # type: ignore[union-attr]
        self.floor = floor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        std = self.std.value if isinstance(self.std, Hyperparameter) else torch.tensor(self.std)
        lifted = std + (self.floor - std).clamp(min=0).detach()
        return x + (lifted * torch.randn_like(x)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"std={float(self.std):.4g}, floor={self.floor:g}"
