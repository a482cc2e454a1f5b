"""Change images at random, with hyperparameters as magnitudes.

    amount = magnitude u,   u uniform in [-1, 1], drawn for each image and each change

With fixed random numbers u, the amount is a differentiable function of the magnitude. kornia
(`pip install midflight[augment]`) applies rotation, scale, shear and translation as one affine map.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from midflight.errors import MissingExtra
from midflight.nn.magnitude import Magnitude, default_floor, describe, drawn

GEOMETRY = ("rotation", "translation", "scale", "shear")


class Augment(nn.Module):
    """A layer that changes images at random in training mode, and returns them unchanged in eval mode.

    Each argument is the largest amount: a hyperparameter of shape (), a function that reads hyperparameters,
    or a number. 0 disables the change. At magnitude 0 the derivative has mean zero by symmetry, as for
    `GaussianNoise`. So a magnitude whose range begins at 0 is never drawn below 5 % of this range.

    Args:
        rotation: degrees about the centre; default range 0 to 45.
        translation: fraction of the width and of the height; default range 0 to 0.3.
        scale: logarithm of the factor, which lies between e^-scale and e^scale; default range 0 to 0.5.
        shear: degrees along the width; default range 0 to 30.
        brightness: added to every pixel; default range 0 to 0.5, for pixels between 0 and 1.
        contrast: logarithm of the factor on the distance from the image's mean; default range 0 to 1.
        noise: standard deviation of Gaussian noise, one draw per pixel; default range 0 to 0.5.
        interpolation: "bicubic" is smooth in the magnitudes. "bilinear" blurs in proportion to the shift.
            Tuning may then keep a magnitude below one pixel at 0.
        padding: values outside an image: "zeros", "border" or "reflection".

    Shape:
        (N, C, H, W), floating point; the output has the same shape and dtype. Pixels are not clipped: images
        may be standardised, and a clipped pixel would have derivative zero.

    Raises:
        MissingExtra: a geometric magnitude is given and kornia is not installed.

    If weights act *before* the augmentation, the hypergradient needs the second derivative of the
    interpolation. torch 2.13 has it. Older versions raise "derivative for aten::grid_sampler_2d_backward is
    not implemented".
    """

    def __init__(
        self,
        *,
        rotation: Magnitude = 0.0,
        translation: Magnitude = 0.0,
        scale: Magnitude = 0.0,
        shear: Magnitude = 0.0,
        brightness: Magnitude = 0.0,
        contrast: Magnitude = 0.0,
        noise: Magnitude = 0.0,
        interpolation: str = "bicubic",
        padding: str = "zeros",
    ) -> None:
        super().__init__()
        given: dict[str, Magnitude] = {
            "rotation": rotation,
            "translation": translation,
            "scale": scale,
            "shear": shear,
            "brightness": brightness,
            "contrast": contrast,
            "noise": noise,
        }
        self.magnitudes = {
            name: m for name, m in given.items() if not (isinstance(m, int | float) and m == 0)
        }
        self.interpolation = interpolation
        self.padding = padding
        self._kornia: Any = _kornia() if any(name in self.magnitudes for name in GEOMETRY) else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self._kornia is not None:
            x = self._warp(x)
        if "contrast" in self.magnitudes:
            mean = x.mean((1, 2, 3), keepdim=True)
            x = mean + self._amount("contrast", x).exp() * (x - mean)
        if "brightness" in self.magnitudes:
            x = x + self._amount("brightness", x)
        if "noise" in self.magnitudes:
            x = x + self._level("noise", x) * torch.randn_like(x)
        return x

    def _warp(self, x: Tensor) -> Tensor:
        n, (height, width) = len(x), x.shape[-2:]
        zero = x.new_zeros(n)
        amounts = {
            name: self._amount(name, x).reshape(n) if name in self.magnitudes else zero
            for name in ("rotation", "scale", "shear")
        }
        size = x.new_tensor([width, height])
        shift = zero.new_zeros(n, 2)
        if "translation" in self.magnitudes:
            shift = self._level("translation", x) * size * _uniform(n, 2, like=x)
        matrix = self._kornia.get_affine_matrix2d(
            translations=shift,
            center=((size - 1) / 2).expand(n, 2),
            scale=amounts["scale"].exp()[:, None].expand(n, 2),
            angle=amounts["rotation"],
            sx=amounts["shear"].deg2rad(),
            sy=zero,
        )
        warped: Tensor = self._kornia.warp_affine(
            x, matrix[:, :2], (height, width), mode=self.interpolation, padding_mode=self.padding
        )
        return warped

    def _amount(self, name: str, x: Tensor) -> Tensor:
        """Draw magnitude u, one per image, shape (N, 1, 1, 1)."""
        return self._level(name, x) * _uniform(len(x), 1, 1, 1, like=x)

    def _level(self, name: str, x: Tensor) -> Tensor:
        magnitude = self.magnitudes[name]
        return drawn(magnitude, default_floor(magnitude), x).to(x.dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {describe(magnitude)}" for name, magnitude in self.magnitudes.items())


def _uniform(*shape: int, like: Tensor) -> Tensor:
    """Draw uniformly from [-1, 1]."""
    return 2 * torch.rand(*shape, dtype=like.dtype, device=like.device) - 1


def _kornia() -> Any:
    try:
        return import_module("kornia.geometry.transform")
    except ImportError as error:
        raise MissingExtra(
            f"rotation, translation, scale and shear need kornia, but importing it failed ({error}); "
            "pip install midflight[augment]."
        ) from error
