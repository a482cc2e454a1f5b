"""`midflight check`: each estimator against the central difference of the one-step map, in float64."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from midflight.hypergrad import ESTIMATORS, EXACT, hypergradient
from midflight.testing import KINDS, OPTIMIZERS, Case, central_difference, compare, make_case
from midflight.trees import Tensors

TOLERANCE = 1e-6  # the central difference itself is good to about 1e-7 where the derivative is smallest
SEEDS = 10


@dataclass(frozen=True)
class Check:
    """One line of the table: an estimator beside the truth, over `SEEDS` states of training.

    Attributes:
        rule: the optimiser.
        hyperparameter: what is differentiated with respect to.
        estimator: by name.
        relative_error: |estimate - truth| / |truth| over all states.
        cosine: of the angle between the two over all states.
        scale: |estimate| / |truth|.
        exact: whether the estimator claims to be exact.
        passed: that it is within `TOLERANCE`; None if it makes no claim.
    """

    rule: str
    hyperparameter: str
    estimator: str
    relative_error: float
    cosine: float
    scale: float
    exact: bool
    passed: bool | None


def run_checks() -> Iterator[Check]:
    """Every estimator on every row of the conformance table."""
    for rule in OPTIMIZERS:
        for kind in KINDS:
            cases = [make_case(rule, kind, seed) for seed in range(SEEDS)]
            truths = [central_difference(c.problem, c.params, c.hparams, c.state) for c in cases]
            for estimator in ESTIMATORS:
                found = compare([_estimate(c, estimator, seed) for seed, c in enumerate(cases)], truths)
                exact = estimator in EXACT
                yield Check(
                    rule=rule,
                    hyperparameter=_label(rule, kind),
                    estimator=estimator,
                    **asdict(found),
                    exact=exact,
                    passed=found.relative_error <= TOLERANCE if exact else None,
                )


def as_dicts(checks: list[Check]) -> list[dict[str, Any]]:
    """The table for JSON and for the report."""
    return [asdict(check) for check in checks]


def _estimate(case: Case, estimator: str, seed: int) -> Tensors:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return hypergradient(case.problem, case.params, case.hparams, case.state, estimator)


def _label(rule: str, kind: str) -> str:
    if kind != "weight_decay":
        return kind
    return "weight decay, decoupled" if rule == "AdamW" else "weight decay, coupled"
