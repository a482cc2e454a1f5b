"""Make the table of `midflight check`: each estimator against central differences, in float64."""

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from midflight._tensors import Tensors
from midflight.errors import MidflightError, UnknownName
from midflight.gradcheck.cases import KINDS, OPTIMIZERS, Case, make_case, why_skipped
from midflight.gradcheck.oracles import Comparison, central_difference, compare
from midflight.hypergrad import CLAIMS, ESTIMATORS, hypergradient
from midflight.updates import rule_for

SEEDS = 10
PAPER_RULES = ("SGD", "SGD momentum", "Adam", "AdamW")
PAPER_KINDS = ("weight_decay", "noise")
PAPER_ESTIMATORS = ("one_step", "one_step_cheap", "t1t2", "paper")


@dataclass(frozen=True)
class Check(Comparison):
    """One line of the table: an estimator against the truth over some training states.

    Attributes:
        rule: name of the optimiser.
        hyperparameter: name of the hyperparameter.
        estimator: name of the estimator.
        steps: optimiser steps before the validation loss, as many as the estimator covers.
        tolerance: relative error that the estimator claims; None if it makes no claim.
        passed: whether the relative error is within the tolerance; None if it makes no claim.
    """

    rule: str
    hyperparameter: str
    estimator: str
    steps: int
    tolerance: float | None
    passed: bool | None


@dataclass(frozen=True)
class Skipped:
    """A combination that has no line in the table, and the reason."""

    rule: str
    hyperparameter: str
    estimator: str
    reason: str


def run_checks(
    everything: bool = False,
    workers: int = 1,
    *,
    optimizers: Sequence[str] | None = None,
    estimators: Sequence[str] | None = None,
) -> Iterator[Check | Skipped]:
    """Yield the conformance table: what the paper's study needs, or every estimator on every row.

    Args:
        everything: include every update rule, kind of hyperparameter and estimator.
        workers: number of processes; each uses one thread, because the networks of the table are small.
        optimizers: names from `OPTIMIZERS`, in place of those of the table.
        estimators: names from `ESTIMATORS`, likewise.

    Raises:
        UnknownName: there is no such optimiser or estimator.
    """
    for what, names, known in (("optimiser", optimizers, OPTIMIZERS), ("estimator", estimators, ESTIMATORS)):
        for name in names or ():
            if name not in known:
                raise UnknownName(what, name, known)
    rules = optimizers or (OPTIMIZERS if everything else PAPER_RULES)
    kinds: Iterable[str] = KINDS if everything else PAPER_KINDS
    estimators = tuple(estimators or (ESTIMATORS if everything else PAPER_ESTIMATORS))
    places = [(rule, kind, estimators) for rule in rules for kind in kinds]
    if workers == 1:
        for place in places:
            yield from _row(place)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for row in pool.map(_row, places, chunksize=4):
            yield from row


def as_dicts(checks: Iterable[Check | Skipped]) -> list[dict[str, Any]]:
    """Return the lines of the table for JSON and for the report."""
    return [asdict(c) | {"exact": c.tolerance is not None} for c in checks if isinstance(c, Check)]


def _row(place: tuple[str, str, tuple[str, ...]]) -> list[Check | Skipped]:
    rule, kind, estimators = place
    reason = why_skipped(rule, kind)
    if reason is not None:
        return [Skipped(rule, kind, "all estimators", reason)]
    return list(_estimates(rule, kind, estimators))


def _estimates(rule: str, kind: str, estimators: Iterable[str]) -> Iterator[Check | Skipped]:
    # the error of an inexact estimator needs many states; one state shows whether an estimator is exact
    seeds = SEEDS if rule in PAPER_RULES and kind in PAPER_KINDS else 1
    cases = [make_case(rule, kind, seed) for seed in range(seeds)]
    truths: dict[int, list[Tensors]] = {}
    for estimator in estimators:
        claim = CLAIMS.get(estimator)
        steps = claim.steps if claim else 1
        if steps not in truths:
            truths[steps] = [
                central_difference(c.problem, c.params, c.hparams, c.state, steps) for c in cases
            ]
        if estimator == "paper" and kind not in PAPER_KINDS:
            yield Skipped(rule, kind, estimator, "The paper has equations for L2 and input noise only.")
            continue
        try:
            estimates = [_estimate(c, estimator, seed) for seed, c in enumerate(cases)]
        except MidflightError as error:
            yield Skipped(rule, kind, estimator, str(error))
            continue
        found = compare(estimates, truths[steps])
        yield Check(
            rule=rule,
            hyperparameter=_label(rule, kind),
            estimator=estimator,
            steps=steps,
            **asdict(found),
            tolerance=claim.tolerance if claim else None,
            passed=found.relative_error <= claim.tolerance if claim else None,
        )


def _estimate(case: Case, estimator: str, seed: int) -> Tensors:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return hypergradient(case.problem, case.params, case.hparams, case.state, estimator)


def _label(optimizer: str, kind: str) -> str:
    if kind != "weight_decay":
        return kind
    optim = OPTIMIZERS[optimizer]([torch.zeros(1, 1)])
    decoupled = optim.param_groups[0].get("decoupled_weight_decay", rule_for(optim).decoupled)
    return "weight decay, decoupled" if decoupled else "weight decay, coupled"
