"""Compare hypergradients with central differences, for a user's step and for our own tables."""

from midflight.gradcheck.cases import KINDS, OPTIMIZERS, Batch, Case, Kind, make_case, why_skipped
from midflight.gradcheck.check import CheckReport, check
from midflight.gradcheck.oracles import central_difference, compare, loss_after

__all__ = [
    "KINDS",
    "OPTIMIZERS",
    "Batch",
    "Case",
    "CheckReport",
    "Kind",
    "central_difference",
    "check",
    "compare",
    "loss_after",
    "make_case",
    "why_skipped",
]
