"""Provide layers, losses and penalties that read hyperparameters."""

from midflight.nn import losses, penalties
from midflight.nn.augment import Augment
from midflight.nn.dropout import Dropout
from midflight.nn.noise import GaussianNoise, MultiplicativeNoise

__all__ = ["Augment", "Dropout", "GaussianNoise", "MultiplicativeNoise", "losses", "penalties"]
