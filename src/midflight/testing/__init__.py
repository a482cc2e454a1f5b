"""Oracles and conformance tables: what a new estimator, update rule or layer is held against."""

from midflight.testing.cases import KINDS, OPTIMIZERS, Batch, Case, Kind, make_case, why_skipped
from midflight.testing.oracles import central_difference, compare, loss_after

__all__ = [
    "KINDS",
    "OPTIMIZERS",
    "Batch",
    "Case",
    "Kind",
    "central_difference",
    "compare",
    "loss_after",
    "make_case",
    "why_skipped",
]
