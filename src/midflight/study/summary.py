"""Compute the numbers of a study from its stored rows.

The terminal table, `--json`, the figures and the report all read these numbers. Errors are in percent of
the images, differences in percentage points. The initial, tuned and re-run arms of a start share initial
weights and data order, so arms are compared start by start. A number that needs missing rows is None.
Each number is defined once, where it is computed.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from math import inf, isfinite, sqrt
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from midflight.datasets import DATASETS
from midflight.study.spec import DEFAULT, Arm, Kind, Spec
from midflight.study.store import Row

POOR = 1.25  # an error above POOR x the lowest of all fixed runs is poor; our threshold
# share of the noise interval that counts as 0: 0.04 in the paper's, invisible in its Fig. 1
NEAR_LOW_END = 0.05

ArmKind: TypeAlias = tuple[Kind, str]
"""(kind, estimator) of an arm"""
INITIAL: ArmKind = ("initial", "")


class Numbers(SimpleNamespace):
    """Hold named numbers, and lists and groups of such."""


PAPER = Numbers(  # what the paper reports
    tuned_test_error_percent=3.0,  # "about"
    rescued_percent_of_starts=20.0,
    on_diagonal_percent=58.0,  # Fig. 3
    overhead_percent=12.22,
    noise_at_low_end_percent=100.0,  # Fig. 1
    good_starts_below_test_error_percent=2.0,  # Fig. 2: starts with a lower test error than this ...
    good_starts_end_at_test_error_percent=(2.5, 4.0),  # ... end in this interval
)


def as_dict(value: Any) -> Any:
    """Return `Numbers` as nested dicts, ready for JSON."""
    if isinstance(value, Numbers):
        return {name: as_dict(number) for name, number in vars(value).items()}
    return [as_dict(item) for item in value] if isinstance(value, list) else value


class Finished:
    """Look up the finished arms that a spec declares.

    On a GPU, the seconds of the first epoch are dropped, because torch compiles in it.
    """

    def __init__(self, spec: Spec, rows: Iterable[Row]) -> None:
        first = 0 if spec.device == "cpu" else 1
        of_arm = {row.arm: row for row in rows}
        self.rows = {
            arm: replace(of_arm[arm], epoch_seconds=of_arm[arm].epoch_seconds[first:])
            for arm in spec.arms()
            if arm in of_arm
        }
        self._of_kind: dict[tuple[str, str, str], list[Row]] = {}
        for arm, row in self.rows.items():  # in the order of their index
            self._of_kind.setdefault((arm.network, arm.kind, arm.estimator), []).append(row)

    def of_kind(self, network: str, kind: ArmKind) -> list[Row]:
        """Return the arms of a network and kind in the order of their index."""
        return self._of_kind.get((network, *kind), [])

    def paired(self, network: str, first: ArmKind, second: ArmKind) -> list[tuple[Row, Row]]:
        """Return both arms of each start that has finished both."""
        both = ((a, self.rows.get(Arm(network, *second, a.arm.index))) for a in self.of_kind(network, first))
        return [(a, b) for a, b in both if b is not None]

    def errors(self, network: str, first: ArmKind, second: ArmKind) -> list[tuple[float, float]]:
        """Return the test errors of both arms of each start, as shares in [0, 1]."""
        pairs = self.paired(network, first, second)
        errors = ((a.result.test_error, b.result.test_error) for a, b in pairs)
        return [(a, b) for a, b in errors if a is not None and b is not None]


def summarise(spec: Spec, rows: Iterable[Row]) -> Numbers:
    """Compute every number of a study."""
    planned, finished = len(list(spec.arms())), Finished(spec, rows)
    return Numbers(
        arms_done=len(finished.rows),
        arms_planned=planned,
        complete=len(finished.rows) == planned,
        test_images=DATASETS[spec.dataset][1],
        paper=PAPER,
        networks=[_network(spec, finished, network) for network in spec.networks],
    )


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


def _spread(values: Iterable[float]) -> Numbers | None:
    """Describe the finite values, with quartiles interpolated linearly; None if there are none."""
    finite = [v for v in values if isfinite(v)]
    if not finite:
        return None
    low, low_quartile, median, high_quartile, high = map(float, np.percentile(finite, (0, 25, 50, 75, 100)))
    return Numbers(
        count=len(finite), median=median, quartile_low=low_quartile, quartile_high=high_quartile, minimum=low,
        maximum=high,
    )  # fmt: skip


def _network(spec: Spec, finished: Finished, network: str) -> Numbers:
    tuned: list[ArmKind] = [("tuned", e) for e in spec.estimator]
    rerun: list[ArmKind] = [("rerun", e) for e in spec.estimator]
    planned = dict.fromkeys([INITIAL, *tuned, *rerun], spec.starts)
    if spec.landscape:
        planned["landscape", ""] = spec.landscape**2
    fixed = [row.result.test_error for kind in (INITIAL, *rerun) for row in finished.of_kind(network, kind)]
    lowest = min((error for error in fixed if error is not None), default=inf)
    main, first = main_estimator(spec), reference(spec)
    compared = [(main, other) for other in spec.estimator if other != main]
    if "paper" in spec.estimator and first not in ("paper", main):
        compared.append((first, "paper"))
    return Numbers(
        network=network,
        lowest_fixed_test_error_percent=_finite(100 * lowest),  # of all initial and re-run arms
        poor_above_test_error_percent=_finite(100 * POOR * lowest),  # a start above it is poor
        arms=[_arm(finished.of_kind(network, kind), kind, n) for kind, n in planned.items()],
        tunings=[_tuning(spec, finished, network, e, POOR * lowest) for e in spec.estimator],
        comparisons=[_comparison(finished, network, *pair) for pair in compared],
    )


def _arm(rows: list[Row], kind: ArmKind, planned: int) -> Numbers:
    """Describe all runs of one kind of arm and one network."""
    return Numbers(
        kind=kind[0],
        estimator=kind[1],
        done=len(rows),
        planned=planned,
        test_error_percent=_spread(100 * e for row in rows if (e := row.result.test_error) is not None),
        valid_error_percent=_spread(100 * row.result.valid_error for row in rows),
        epoch_seconds=_spread(epoch_seconds(rows)),  # the mean of each run
        best=_best(rows),
    )


def _best(rows: list[Row]) -> Numbers | None:
    """Describe the run with the lowest validation error, then loss, which a user would keep."""

    def order(row: Row) -> tuple[float, float, int]:
        loss = row.result.valid_loss
        return row.result.valid_error, loss if isfinite(loss) else inf, row.arm.index

    finite = [row for row in rows if all(map(isfinite, (row.result.valid_error, *row.result.end)))]
    if not finite:
        return None
    row = min(finite, key=order)
    error = row.result.test_error
    return Numbers(
        index=row.arm.index,
        valid_error_percent=100 * row.result.valid_error,
        test_error_percent=None if error is None else 100 * error,  # only reported, not chosen by
        log10_l2=row.result.end[0],
        noise=row.result.end[1],
    )


def _tuning(  # one table, so one long function
    spec: Spec, finished: Finished, network: str, estimator: str, poor: float
) -> Numbers:
    """Compare the arms of one estimator on one network, start by start."""
    images = DATASETS[spec.dataset][1]
    tuned: ArmKind = ("tuned", estimator)
    pairs = finished.errors(network, INITIAL, tuned)
    beyond = [(a, b) for a, b in pairs if not on_diagonal(a, b, images)]
    reruns = finished.errors(network, ("rerun", estimator), tuned)
    diagonal = sum(on_diagonal(a, b, images) for a, b in reruns)
    from_poor = [after for before, after in pairs if before > poor]
    rescued = sum(after <= poor for after in from_poor)
    from_good = [b for a, b in pairs if 100 * a < PAPER.good_starts_below_test_error_percent]
    ends = [row.result.end for row in finished.of_kind(network, tuned)]
    low, high = spec.intervals()[1]
    at_low = sum(noise <= low + NEAR_LOW_END * (high - low) for _, noise in ends)
    down = [move < 0 for row in finished.of_kind(network, tuned) for move in _noise_moves(row)]
    return Numbers(
        estimator=estimator,
        pairs=len(pairs),  # starts with a finished initial and tuned arm
        initial_test_error_percent=_spread(100 * before for before, _ in pairs),
        tuned_test_error_percent=_spread(100 * after for _, after in pairs),
        tuned_minus_initial_points=_spread(100 * (after - before) for before, after in pairs),
        worse=sum(after > before for before, after in pairs),
        worse_beyond_sampling_error=sum(after > before for before, after in beyond),  # by more than one
        better=sum(after < before for before, after in pairs),
        better_beyond_sampling_error=sum(after < before for before, after in beyond),
        poor_starts=len(from_poor),
        rescued=rescued,  # poor starts whose tuned test error is not poor
        rescued_percent_of_starts=_percent(rescued, len(pairs)),
        rescued_percent_of_poor_starts=_percent(rescued, len(from_poor)),
        good_starts=len(from_good),
        good_starts_tuned_test_error_percent=_spread(100 * after for after in from_good),
        reruns=len(reruns),  # starts with a finished tuned and re-run arm
        tuned_minus_rerun_points=_spread(100 * (end - rerun) for rerun, end in reruns),
        on_diagonal=diagonal,
        on_diagonal_percent=_percent(diagonal, len(reruns)),
        overhead_percent=_spread(overheads_percent(finished.paired(network, INITIAL, tuned))),
        noise_end=_spread(noise for _, noise in ends),
        log10_l2_end=_spread(l2 for l2, _ in ends),
        noise_at_low_end=at_low,  # in the lowest NEAR_LOW_END of its interval
        noise_at_low_end_percent=_percent(at_low, len(ends)),
        noise_steps_down_percent=_percent(sum(down), len(down)),  # of all changes of the noise
    )


def _comparison(finished: Finished, network: str, estimator: str, other: str) -> Numbers:
    """Compare the final test errors of two estimators over the starts that both have finished."""
    pairs = finished.errors(network, ("tuned", estimator), ("tuned", other))
    return Numbers(
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


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
