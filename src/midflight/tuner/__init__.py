"""Tune hyperparameters in the user's training loop; a file per policy."""

from midflight.tuner.horizon import Averaged, NextStep
from midflight.tuner.hyper_optimizer import SignSteps
from midflight.tuner.live_line import LiveLine
from midflight.tuner.optimizers import param_groups
from midflight.tuner.population import Population, stacked
from midflight.tuner.schedule import Every, FrontLoaded, TimeBudget
from midflight.tuner.trajectory import Replay, Trajectory
from midflight.tuner.tuner import Tuner

__all__ = [
    "Averaged",
    "Every",
    "FrontLoaded",
    "LiveLine",
    "NextStep",
    "Population",
    "Replay",
    "SignSteps",
    "TimeBudget",
    "Trajectory",
    "Tuner",
    "param_groups",
    "stacked",
]
