"""Declare hyperparameters, with their bounds and current values."""

from midflight.space.default_ranges import RANGES, default_range
from midflight.space.hyperparameter import Hyperparameter
from midflight.space.space import Space
from midflight.space.specs import Categorical, Choice, Float, Int, Value, When

__all__ = [
    "RANGES",
    "Categorical",
    "Choice",
    "Float",
    "Hyperparameter",
    "Int",
    "Space",
    "Value",
    "When",
    "default_range",
]
