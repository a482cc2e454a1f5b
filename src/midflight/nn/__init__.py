"""Layers that read a hyperparameter."""

from midflight.nn.noise import GaussianNoise

__all__ = ["GaussianNoise"]
