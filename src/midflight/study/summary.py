"""Compute the numbers of a study from its stored rows.

The terminal table, `--json`, the figures and the report all read these numbers. Errors are in percent of
the images, differences in percentage points. The initial, tuned and re-run arms of a start share initial
weights and data order, so arms are compared start by start. A number that needs missing rows is None.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isfinite, sqrt
from typing import TypeAlias

import numpy as np

from midflight.study.spec import DEFAULT, Arm, Kind, Spec
from midflight.study.store import Row

TEST_IMAGES = {"mnist": 10_000, "fashion_mnist": 10_000, "digits": 360}

POOR = 1.25  # an error above POOR x the lowest of all fixed runs is poor; our threshold
# share of the noise interval that counts as 0: 0.04 in the paper's, invisible in its Fig. 1
NEAR_LOW_END = 0.05

ArmKind: TypeAlias = tuple[Kind, str]
"""(kind, estimator) of an arm"""
INITIAL: ArmKind = ("initial", "")


@dataclass(frozen=True)
class Paper:
    """State what the paper reports."""

    tuned_test_error_percent: float = 3.0  # "about"
    rescued_percent_of_starts: float = 20.0
    on_diagonal_percent: float = 58.0  # Fig. 3
    overhead_percent: float = 12.22
    noise_at_low_end_percent: float = 100.0  # Fig. 1
    good_starts_below_test_error_percent: float = 2.0  # Fig. 2: starts with a lower test error than this ...
    good_starts_end_at_test_error_percent: tuple[float, float] = (2.5, 4.0)  # ... end in this interval


PAPER = Paper()


@dataclass(frozen=True)
class Spread:
    """Describe some values; quartiles are interpolated linearly."""

    count: int
    median: float
    quartile_low: float
    quartile_high: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Best:
    """Describe the run with the lowest validation error, which a user would keep.

    Ties go to the lower validation loss. The test error is only reported.
    """

    index: int
    valid_error_percent: float
    test_error_percent: float | None
    log10_l2: float
    noise: float


@dataclass(frozen=True)
class ArmSummary:
    """Describe all runs of one kind of arm and one network.

    Attributes:
        test_error_percent: final test errors; None for the landscape.
        valid_error_percent: final validation errors.
        epoch_seconds: mean seconds per epoch of each run.
        best: the run chosen by validation error.
    """

    kind: Kind
    estimator: str
    done: int
    planned: int
    test_error_percent: Spread | None
    valid_error_percent: Spread | None
    epoch_seconds: Spread | None
    best: Best | None


@dataclass(frozen=True)
class Tuning:
    """Compare the arms of one estimator on one network, start by start.

    Attributes:
        pairs: starts with a finished initial and tuned arm; most counts below are among these.
        worse, better: starts with a higher or a lower test error after tuning.
        worse_beyond_sampling_error, better_beyond_sampling_error: by more than one `sampling_error`.
        poor_starts: starts with an initial test error above `Network.poor_above_test_error_percent`.
        rescued: poor starts with a tuned test error at or below that threshold.
        good_starts: starts with an initial test error under 2 %, as in the paper's remark on its Fig. 2.
        reruns: starts with a finished tuned and re-run arm.
        tuned_minus_rerun_points: paired difference of test errors; negative: end of tuning is better.
        on_diagonal: reruns with |tuned - re-run| at most one `sampling_error`.
        overhead_percent: mean epoch time of tuned over that of initial, minus 1, per start.
        noise_end, log10_l2_end: final values of the tuned arms.
        noise_at_low_end: tuned arms with a final noise in the lowest 5 % of its interval.
        noise_steps_down_percent: share of noise changes that lower it, over all tuned arms.
    """

    estimator: str
    pairs: int
    initial_test_error_percent: Spread | None
    tuned_test_error_percent: Spread | None
    tuned_minus_initial_points: Spread | None
    worse: int
    worse_beyond_sampling_error: int
    better: int
    better_beyond_sampling_error: int
    poor_starts: int
    rescued: int
    rescued_percent_of_starts: float | None
    rescued_percent_of_poor_starts: float | None
    good_starts: int
    good_starts_tuned_test_error_percent: Spread | None
    reruns: int
    tuned_minus_rerun_points: Spread | None
    on_diagonal: int
    on_diagonal_percent: float | None
    overhead_percent: Spread | None
    noise_end: Spread | None
    log10_l2_end: Spread | None
    noise_at_low_end: int
    noise_at_low_end_percent: float | None
    noise_steps_down_percent: float | None


@dataclass(frozen=True)
class Comparison:
    """Compare the final test errors of two estimators from the same starts.

    Attributes:
        pairs: starts that both have finished.
        difference_points: paired difference, `estimator` minus `other`.
        lower, higher: starts in which `estimator` has the lower or the higher test error.
    """

    estimator: str
    other: str
    pairs: int
    difference_points: Spread | None
    lower: int
    higher: int


@dataclass(frozen=True)
class Network:
    """Describe one network of the study.

    Attributes:
        lowest_fixed_test_error_percent: lowest test error of all initial and re-run arms.
        poor_above_test_error_percent: 1.25 times that; a start above it is poor.
        arms: initial, then tuned per estimator, re-run per estimator, landscape if any.
        tunings: one per estimator.
        comparisons: `main_estimator` with each other one, and `reference` with `paper`.
    """

    network: str
    lowest_fixed_test_error_percent: float | None
    poor_above_test_error_percent: float | None
    arms: list[ArmSummary]
    tunings: list[Tuning]
    comparisons: list[Comparison]


@dataclass(frozen=True)
class Summary:
    """Hold all numbers of a study; `asdict` makes it JSON."""

    arms_done: int
    arms_planned: int
    complete: bool
    test_images: int
    paper: Paper
    networks: list[Network]


class Finished:
    """Look up the finished arms that a spec declares.

    On a GPU, the seconds of the first epoch are dropped, because torch compiles in it.
    """

    def __init__(self, spec: Spec, rows: Iterable[Row]) -> None:
        declared, first = set(spec.arms()), 0 if spec.device == "cpu" else 1
        self.rows = {
            row.arm: replace(row, epoch_seconds=row.epoch_seconds[first:])
            for row in rows
            if row.arm in declared
        }

    def of_kind(self, network: str, kind: ArmKind) -> list[Row]:
        """Return the arms of a network and kind in the order of their index."""
        found = [row for arm, row in self.rows.items() if arm == Arm(network, *kind, arm.index)]
        return sorted(found, key=lambda row: row.arm.index)

    def paired(self, network: str, first: ArmKind, second: ArmKind) -> list[tuple[Row, Row]]:
        """Return both arms of each start that has finished both."""
        both = ((a, self.rows.get(Arm(network, *second, a.arm.index))) for a in self.of_kind(network, first))
        return [(a, b) for a, b in both if b is not None]

    def errors(self, network: str, first: ArmKind, second: ArmKind) -> list[tuple[float, float]]:
        """Return the test errors of both arms of each start, as shares in [0, 1]."""
        pairs = self.paired(network, first, second)
        errors = ((a.result.test_error, b.result.test_error) for a, b in pairs)
        return [(a, b) for a, b in errors if a is not None and b is not None]


def summarise(spec: Spec, rows: Iterable[Row]) -> Summary:
    """Compute every number of a study."""
    planned, finished = len(set(spec.arms())), Finished(spec, rows)
    return Summary(
        arms_done=len(finished.rows),
        arms_planned=planned,
        complete=len(finished.rows) == planned,
        test_images=TEST_IMAGES[spec.dataset],
        paper=PAPER,
        networks=[_network(spec, finished, network) for network in dict.fromkeys(spec.networks)],
    )


def estimators(spec: Spec) -> list[str]:
    """Return the estimators of a study without duplicates."""
    return list(dict.fromkeys(spec.estimator))


def main_estimator(spec: Spec) -> str:
    """Return the estimator of the headline: midflight's default if it was run, else the first."""
    return DEFAULT if DEFAULT in spec.estimator else spec.estimator[0]


def reference(spec: Spec) -> str:
    """Return the estimator that `paper` is compared with: the first other one."""
    return next((e for e in spec.estimator if e != "paper"), spec.estimator[0])


def sampling_error(a: float, b: float, images: int) -> float:
    """Return the standard error of a test error, sqrt(p (1 - p) / images) at p = (a + b) / 2; a share."""
    p = (a + b) / 2
    return sqrt(p * (1 - p) / images)


def on_diagonal(a: float, b: float, images: int) -> bool:
    """Return whether two test errors differ by at most one `sampling_error`."""
    return abs(a - b) <= sampling_error(a, b, images)


def epoch_seconds(rows: Iterable[Row]) -> list[float]:
    """Return the seconds per epoch of each timed run; the mean, because tuning costs differ by epoch."""
    return [float(np.mean(row.epoch_seconds)) for row in rows if row.epoch_seconds]


def overheads_percent(pairs: Iterable[tuple[Row, Row]]) -> list[float]:
    """Return the time that tuning adds to an epoch, of each timed pair (initial, tuned)."""
    seconds = [epoch_seconds(pair) for pair in pairs]
    return [100 * (s[1] / s[0] - 1) for s in seconds if len(s) == 2 and s[0] > 0]


def noise_path(row: Row) -> list[tuple[float, float]]:
    """Return (training step, noise) at the start and after each hyperparameter step."""
    return [(0.0, row.result.start[1]), *((step, noise) for step, _, noise in row.result.trajectory)]


def _spread(values: Iterable[float]) -> Spread | None:
    """Describe the finite values; None if there are none."""
    finite = [v for v in values if isfinite(v)]
    if not finite:
        return None
    low, median, high = (float(q) for q in np.percentile(finite, (25, 50, 75)))
    return Spread(len(finite), median, low, high, float(min(finite)), float(max(finite)))


def _network(spec: Spec, finished: Finished, network: str) -> Network:
    tuned: list[ArmKind] = [("tuned", e) for e in estimators(spec)]
    rerun: list[ArmKind] = [("rerun", e) for e in estimators(spec)]
    planned = dict.fromkeys([INITIAL, *tuned, *rerun], spec.starts)
    fixed = [
        row.result.test_error
        for kind in (INITIAL, *rerun)
        for row in finished.of_kind(network, kind)
        if row.result.test_error is not None
    ]
    poor = POOR * min(fixed) if fixed else inf
    landscape: ArmKind = ("landscape", "")
    if spec.landscape:
        planned[landscape] = spec.landscape**2
    main, first = main_estimator(spec), reference(spec)
    compared = [(main, other) for other in estimators(spec) if other != main]
    if "paper" in spec.estimator and first not in ("paper", main):
        compared.append((first, "paper"))
    return Network(
        network=network,
        lowest_fixed_test_error_percent=100 * min(fixed) if fixed else None,
        poor_above_test_error_percent=100 * poor if fixed else None,
        arms=[_arm(finished.of_kind(network, kind), kind, n) for kind, n in planned.items()],
        tunings=[_tuning(spec, finished, network, e, poor) for e in estimators(spec)],
        comparisons=[_comparison(finished, network, *pair) for pair in compared],
    )


def _arm(rows: list[Row], kind: ArmKind, planned: int) -> ArmSummary:
    return ArmSummary(
        *kind,
        done=len(rows),
        planned=planned,
        test_error_percent=_spread(100 * e for row in rows if (e := row.result.test_error) is not None),
        valid_error_percent=_spread(100 * row.result.valid_error for row in rows),
        epoch_seconds=_spread(epoch_seconds(rows)),
        best=_best(rows),
    )


def _best(rows: list[Row]) -> Best | None:
    def order(row: Row) -> tuple[float, float, int]:
        loss = row.result.valid_loss
        return row.result.valid_error, loss if isfinite(loss) else inf, row.arm.index

    finite = [row for row in rows if all(map(isfinite, (row.result.valid_error, *row.result.end)))]
    if not finite:
        return None
    row = min(finite, key=order)
    error = row.result.test_error
    return Best(
        index=row.arm.index,
        valid_error_percent=100 * row.result.valid_error,
        test_error_percent=None if error is None else 100 * error,
        log10_l2=row.result.end[0],
        noise=row.result.end[1],
    )


def _tuning(  # one table, so one long function
    spec: Spec, finished: Finished, network: str, estimator: str, poor: float
) -> Tuning:
    images = TEST_IMAGES[spec.dataset]
    tuned: ArmKind = ("tuned", estimator)
    pairs = finished.errors(network, INITIAL, tuned)
    beyond = [(a, b) for a, b in pairs if not on_diagonal(a, b, images)]
    reruns = finished.errors(network, ("rerun", estimator), tuned)
    diagonal = sum(on_diagonal(a, b, images) for a, b in reruns)
    from_poor = [after for before, after in pairs if before > poor]
    rescued = sum(after <= poor for after in from_poor)
    good = PAPER.good_starts_below_test_error_percent
    from_good = [after for before, after in pairs if 100 * before < good]
    tuned_rows = finished.of_kind(network, tuned)
    low, high = spec.intervals()[1]
    at_low = sum(row.result.end[1] <= low + NEAR_LOW_END * (high - low) for row in tuned_rows)
    down = [move < 0 for row in tuned_rows for move in _noise_moves(row)]
    return Tuning(
        estimator=estimator,
        pairs=len(pairs),
        initial_test_error_percent=_spread(100 * before for before, _ in pairs),
        tuned_test_error_percent=_spread(100 * after for _, after in pairs),
        tuned_minus_initial_points=_spread(100 * (after - before) for before, after in pairs),
        worse=sum(after > before for before, after in pairs),
        worse_beyond_sampling_error=sum(after > before for before, after in beyond),
        better=sum(after < before for before, after in pairs),
        better_beyond_sampling_error=sum(after < before for before, after in beyond),
        poor_starts=len(from_poor),
        rescued=rescued,
        rescued_percent_of_starts=_percent(rescued, len(pairs)),
        rescued_percent_of_poor_starts=_percent(rescued, len(from_poor)),
        good_starts=len(from_good),
        good_starts_tuned_test_error_percent=_spread(100 * after for after in from_good),
        reruns=len(reruns),
        tuned_minus_rerun_points=_spread(100 * (end - rerun) for rerun, end in reruns),
        on_diagonal=diagonal,
        on_diagonal_percent=_percent(diagonal, len(reruns)),
        overhead_percent=_spread(overheads_percent(finished.paired(network, INITIAL, tuned))),
        noise_end=_spread(row.result.end[1] for row in tuned_rows),
        log10_l2_end=_spread(row.result.end[0] for row in tuned_rows),
        noise_at_low_end=at_low,
        noise_at_low_end_percent=_percent(at_low, len(tuned_rows)),
        noise_steps_down_percent=_percent(sum(down), len(down)),
    )


def _comparison(finished: Finished, network: str, estimator: str, other: str) -> Comparison:
    pairs = finished.errors(network, ("tuned", estimator), ("tuned", other))
    return Comparison(
        estimator=estimator,
        other=other,
        pairs=len(pairs),
        difference_points=_spread(100 * (a - b) for a, b in pairs),
        lower=sum(a < b for a, b in pairs),
        higher=sum(a > b for a, b in pairs),
    )


def _noise_moves(row: Row) -> list[float]:
    moves = (after - before for (_, before), (_, after) in pairwise(noise_path(row)))
    return [move for move in moves if move != 0 and isfinite(move)]


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
