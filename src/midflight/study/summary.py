"""Compute the numbers of a study from its stored rows.

The terminal table, `--json`, the figures and the report all read these numbers. Errors are in percent of
the images, differences in percentage points. The initial, tuned and re-run arms of a start share initial
weights and data order, so arms are compared start by start. A number that needs missing rows is None.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import inf, isfinite, sqrt
from typing import Any

import numpy as np

from midflight.study.spec import DEFAULT, Arm, Kind, Spec
from midflight.study.store import Row

TEST_IMAGES = {"mnist": 10_000, "fashion_mnist": 10_000, "digits": 360}

POOR = 1.25  # an error above POOR x the lowest of all fixed runs is poor; our threshold
# share of the noise interval that counts as 0: 0.04 in the paper's, invisible in its Fig. 1
NEAR_LOW_END = 0.05

PAPER_TUNED_TEST_ERROR_PERCENT = 3.0  # "about"
PAPER_RESCUED_PERCENT = 20.0
PAPER_ON_DIAGONAL_PERCENT = 58.0  # Fig. 3
PAPER_OVERHEAD_PERCENT = 12.22
PAPER_NOISE_AT_ZERO_PERCENT = 100.0  # Fig. 1
PAPER_GOOD_START_PERCENT = 2.0  # Fig. 2: starts with a lower test error than this ...
PAPER_GOOD_START_ENDS_PERCENT = (2.5, 4.0)  # ... end in this interval


@dataclass(frozen=True)
class Spread:
    """Count, median, quartiles (linear interpolation) and extremes of some values."""

    count: int
    median: float
    quartile_low: float
    quartile_high: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Best:
    """The run with the lowest validation error, which a user would keep.

    Ties go to the lower validation loss. The test error is only reported.
    """

    index: int
    valid_error_percent: float
    test_error_percent: float | None
    log10_l2: float
    noise: float


@dataclass(frozen=True)
class ArmSummary:
    """All runs of one kind of arm and one network.

    Attributes:
        test_error_percent: final test error of each run; None for the landscape.
        valid_error_percent: final validation error of each run.
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
    """One estimator on one network, compared start by start.

    Attributes:
        pairs: number of starts with a finished initial and tuned arm; the counts below are among these.
        initial_test_error_percent: of the initial arms of `pairs`.
        tuned_test_error_percent: of the tuned arms of `pairs`.
        tuned_minus_initial_points: paired difference of test errors; negative: tuning is better.
        worse: starts with a higher test error after tuning.
        worse_beyond_sampling_error: starts worse by more than one `sampling_error`.
        better: starts with a lower test error after tuning.
        better_beyond_sampling_error: starts better by more than one `sampling_error`.
        poor_starts: starts with an initial test error above `Network.poor_above_test_error_percent`.
        rescued: poor starts with a tuned test error at or below that threshold.
        rescued_percent_of_starts: `rescued` in percent of `pairs`.
        rescued_percent_of_poor_starts: `rescued` in percent of `poor_starts`.
        good_starts: starts with an initial test error under 2 %, as in the paper's remark on its Fig. 2.
        good_starts_tuned_test_error_percent: tuned test errors of the good starts.
        reruns: number of starts with a finished tuned and re-run arm.
        tuned_minus_rerun_points: paired difference of test errors; negative: end of tuning is better.
        on_diagonal: reruns with |tuned - re-run| at most one `sampling_error`.
        on_diagonal_percent: `on_diagonal` in percent of `reruns`.
        overhead_percent: mean epoch time of tuned over that of initial, minus 1, per start.
        noise_end: final noise of the tuned arms.
        log10_l2_end: final log10 L2 of the tuned arms.
        noise_at_low_end: tuned arms with a final noise in the lowest 5 % of its interval.
        noise_at_low_end_percent: `noise_at_low_end` in percent of the tuned arms.
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
    """Final test errors of two estimators from the same starts.

    Attributes:
        pairs: starts that both have finished.
        difference_points: paired difference, `estimator` minus `other`.
        lower: starts in which `estimator` has the lower test error.
        higher: starts in which `estimator` has the higher test error.
    """

    estimator: str
    other: str
    pairs: int
    difference_points: Spread | None
    lower: int
    higher: int


@dataclass(frozen=True)
class Network:
    """One network of the study.

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
    """All numbers of a study; `asdict` makes it JSON."""

    arms_done: int
    arms_planned: int
    complete: bool
    test_images: int
    paper: dict[str, float | list[float]]
    networks: list[Network]


@dataclass(frozen=True)
class Start:
    """The arms of one start and one estimator; None: not done yet."""

    index: int
    initial: Row | None
    tuned: Row | None
    rerun: Row | None


def summarise(spec: Spec, rows: list[Row]) -> dict[str, Any]:
    """Return `measure` as dicts and lists, ready for JSON."""
    return asdict(measure(spec, rows))


def measure(spec: Spec, rows: list[Row]) -> Summary:
    """Compute every number of a study; ignore rows of arms that `spec` does not declare."""
    planned = set(spec.arms())
    rows = timed(spec, [row for row in rows if row.arm in planned])
    images = TEST_IMAGES[spec.dataset]
    return Summary(
        arms_done=len(rows),
        arms_planned=len(planned),
        complete=len(rows) == len(planned),
        test_images=images,
        paper={
            "tuned_test_error_percent": PAPER_TUNED_TEST_ERROR_PERCENT,
            "rescued_percent_of_starts": PAPER_RESCUED_PERCENT,
            "on_diagonal_percent": PAPER_ON_DIAGONAL_PERCENT,
            "overhead_percent": PAPER_OVERHEAD_PERCENT,
            "noise_at_low_end_percent": PAPER_NOISE_AT_ZERO_PERCENT,
            "good_starts_below_test_error_percent": PAPER_GOOD_START_PERCENT,
            "good_starts_end_at_test_error_percent": list(PAPER_GOOD_START_ENDS_PERCENT),
        },
        networks=[_network(spec, rows, network, images) for network in dict.fromkeys(spec.networks)],
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


def spread(values: Iterable[float]) -> Spread | None:
    """Summarise the finite values; None if there are none."""
    finite = [v for v in values if isfinite(v)]
    if not finite:
        return None
    low, median, high = (float(q) for q in np.percentile(finite, (25, 50, 75)))
    return Spread(len(finite), median, low, high, float(min(finite)), float(max(finite)))


def starts(rows: Sequence[Row], network: str, estimator: str) -> list[Start]:
    """Return the starts with at least one finished arm, in order."""
    by_arm = {row.arm: row for row in rows}
    indices = sorted({a.index for a in by_arm if a.network == network and a.kind != "landscape"})
    return [
        Start(
            i,
            by_arm.get(Arm(network, "initial", "", i)),
            by_arm.get(Arm(network, "tuned", estimator, i)),
            by_arm.get(Arm(network, "rerun", estimator, i)),
        )
        for i in indices
    ]


def error_of(row: Row | None) -> float | None:
    """Return the share of the test set misclassified, in [0, 1]; None for a missing row."""
    return None if row is None else row.result.test_error


def sampling_error(a: float, b: float, images: int) -> float:
    """Return the standard error of a test error, sqrt(p (1 - p) / images) at p = (a + b) / 2; a share."""
    p = (a + b) / 2
    return sqrt(p * (1 - p) / images)


def on_diagonal(a: float, b: float, images: int) -> bool:
    """Whether two test errors differ by at most one `sampling_error`."""
    return abs(a - b) <= sampling_error(a, b, images)


def timed(spec: Spec, rows: list[Row]) -> list[Row]:
    """Return the rows; on a GPU, drop the seconds of the first epoch, in which torch compiles."""
    if spec.device == "cpu":
        return rows
    return [replace(row, epoch_seconds=row.epoch_seconds[1:]) for row in rows]


def epoch_seconds(row: Row | None) -> float | None:
    """Return the mean seconds per epoch; the mean, because the cost of tuning differs between epochs."""
    return float(np.mean(row.epoch_seconds)) if row is not None and row.epoch_seconds else None


def overhead_percent(start: Start) -> float | None:
    """Return the time that tuning adds to an epoch of this start, in percent."""
    plain, tuned = epoch_seconds(start.initial), epoch_seconds(start.tuned)
    return None if plain is None or tuned is None or plain <= 0 else 100 * (tuned / plain - 1)


def noise_path(row: Row) -> list[tuple[float, float]]:
    """Return (training step, noise) at the start and after each hyperparameter step."""
    return [(0.0, row.result.start[1]), *((step, noise) for step, _, noise in row.result.trajectory)]


def _network(spec: Spec, rows: list[Row], network: str, images: int) -> Network:
    rows = [row for row in rows if row.arm.network == network]
    fixed = [
        row.result.test_error
        for row in rows
        if row.arm.kind in ("initial", "rerun") and row.result.test_error is not None
    ]
    poor = POOR * min(fixed) if fixed else inf
    names = estimators(spec)
    compared = [(main_estimator(spec), other) for other in names if other != main_estimator(spec)]
    if "paper" in names and reference(spec) not in ("paper", main_estimator(spec)):
        compared.append((reference(spec), "paper"))
    kinds: list[tuple[Kind, str, int]] = [("initial", "", spec.starts)]
    kinds += [("tuned", e, spec.starts) for e in names]
    kinds += [("rerun", e, spec.starts) for e in names]
    kinds += [("landscape", "", spec.landscape**2)] if spec.landscape else []
    return Network(
        network=network,
        lowest_fixed_test_error_percent=100 * min(fixed) if fixed else None,
        poor_above_test_error_percent=100 * poor if fixed else None,
        arms=[
            _arm([r for r in rows if (r.arm.kind, r.arm.estimator) == (kind, e)], kind, e, planned)
            for kind, e, planned in kinds
        ],
        tunings=[_tuning(spec, starts(rows, network, e), e, poor, images) for e in names],
        comparisons=[_comparison(rows, network, *pair) for pair in compared],
    )


def _arm(rows: list[Row], kind: Kind, estimator: str, planned: int) -> ArmSummary:
    return ArmSummary(
        kind=kind,
        estimator=estimator,
        done=len(rows),
        planned=planned,
        test_error_percent=spread(100 * e for row in rows if (e := row.result.test_error) is not None),
        valid_error_percent=spread(100 * row.result.valid_error for row in rows),
        epoch_seconds=spread(s for row in rows if (s := epoch_seconds(row)) is not None),
        best=_best(rows),
    )


def _best(rows: list[Row]) -> Best | None:
    rows = [row for row in rows if all(map(isfinite, (row.result.valid_error, *row.result.end)))]
    if not rows:
        return None
    row = min(rows, key=lambda row: (row.result.valid_error, _or_inf(row.result.valid_loss), row.arm.index))
    error = row.result.test_error
    return Best(
        index=row.arm.index,
        valid_error_percent=100 * row.result.valid_error,
        test_error_percent=None if error is None else 100 * error,
        log10_l2=row.result.end[0],
        noise=row.result.end[1],
    )


def _tuning(spec: Spec, found: list[Start], estimator: str, poor: float, images: int) -> Tuning:
    pairs = list(_pairs((s.initial, s.tuned) for s in found))
    reruns = list(_pairs((s.rerun, s.tuned) for s in found))
    tuned = [s.tuned for s in found if s.tuned is not None]
    poor_pairs = [(before, after) for before, after in pairs if before > poor]
    rescued = sum(after <= poor for _, after in poor_pairs)
    good_ends = [after for before, after in pairs if 100 * before < PAPER_GOOD_START_PERCENT]
    diagonal = sum(on_diagonal(a, b, images) for a, b in reruns)
    beyond = [(a, b) for a, b in pairs if not on_diagonal(a, b, images)]
    low, high = spec.intervals()[1]
    at_low = sum(row.result.end[1] <= low + NEAR_LOW_END * (high - low) for row in tuned)
    down = [move < 0 for row in tuned for move in _noise_moves(row)]
    return Tuning(
        estimator=estimator,
        pairs=len(pairs),
        initial_test_error_percent=spread(100 * before for before, _ in pairs),
        tuned_test_error_percent=spread(100 * after for _, after in pairs),
        tuned_minus_initial_points=spread(100 * (after - before) for before, after in pairs),
        worse=sum(after > before for before, after in pairs),
        worse_beyond_sampling_error=sum(after > before for before, after in beyond),
        better=sum(after < before for before, after in pairs),
        better_beyond_sampling_error=sum(after < before for before, after in beyond),
        poor_starts=len(poor_pairs),
        rescued=rescued,
        rescued_percent_of_starts=_percent(rescued, len(pairs)),
        rescued_percent_of_poor_starts=_percent(rescued, len(poor_pairs)),
        good_starts=len(good_ends),
        good_starts_tuned_test_error_percent=spread(100 * e for e in good_ends),
        reruns=len(reruns),
        tuned_minus_rerun_points=spread(100 * (end - rerun) for rerun, end in reruns),
        on_diagonal=diagonal,
        on_diagonal_percent=_percent(diagonal, len(reruns)),
        overhead_percent=spread(o for s in found if (o := overhead_percent(s)) is not None),
        noise_end=spread(row.result.end[1] for row in tuned),
        log10_l2_end=spread(row.result.end[0] for row in tuned),
        noise_at_low_end=at_low,
        noise_at_low_end_percent=_percent(at_low, len(tuned)),
        noise_steps_down_percent=_percent(sum(down), len(down)),
    )


def _comparison(rows: list[Row], network: str, estimator: str, other: str) -> Comparison:
    ours, theirs = starts(rows, network, estimator), starts(rows, network, other)
    pairs = list(_pairs((a.tuned, b.tuned) for a, b in zip(ours, theirs, strict=True)))
    return Comparison(
        estimator=estimator,
        other=other,
        pairs=len(pairs),
        difference_points=spread(100 * (a - b) for a, b in pairs),
        lower=sum(a < b for a, b in pairs),
        higher=sum(a > b for a, b in pairs),
    )


def _pairs(rows: Iterable[tuple[Row | None, Row | None]]) -> Iterator[tuple[float, float]]:
    for a, b in rows:
        first, second = error_of(a), error_of(b)
        if first is not None and second is not None:
            yield first, second


def _noise_moves(row: Row) -> list[float]:
    moves = (after - before for (_, before), (_, after) in pairwise(noise_path(row)))
    return [move for move in moves if move != 0 and isfinite(move)]


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _or_inf(value: float) -> float:
    return value if isfinite(value) else inf
