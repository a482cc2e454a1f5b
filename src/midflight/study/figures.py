"""Draw the figures of the paper from stored rows.

Each network has a row of panels, each estimator a column. A panel without data says so. Equal rows give
equal files, whatever the date, machine or user settings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullLocator

from midflight._reporting.figures import BOX, INK, MUTED, RULE, WORSE, note, panels, style
from midflight.datasets import DATASETS
from midflight.study import summary as numbers
from midflight.study.spec import DEFAULT, Kind, Spec
from midflight.study.store import Row
from midflight.study.summary import INITIAL, PAPER, ArmKind, Numbers

Values: TypeAlias = npt.NDArray[np.float64]

COLOURS = {  # after Okabe and Ito's palette, safe for colour-blind readers
    DEFAULT: "#00795a",
    "one_step": "#0072b2",
    "paper": "#a5427f",
    "t1t2": "#8a6d00",
    "one_step_cheap": "#3f8fc4",
}
OTHER_COLOUR = "#5b5f97"
ERROR_MAP = LinearSegmentedColormap.from_list(
    "error", ["#fffaf0", "#e8e4da", "#bfc4c9", "#8d97a5", "#667080"]
)

DATASET_NAMES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "digits": "digits"}

PANEL, NARROW_PANEL = 4.1, 3.4  # side of a panel in inches, with two or three panels in a row
PANEL_POINTS = 6_000  # points drawn per panel of trajectories; the paper's hundred starts have 275,000
MIN_POINTS, MAX_POINTS = 30, 250  # points drawn per trajectory
MANY = 30  # above this number, trajectories are drawn as thin lines
WIDE_RANGE = 3.0  # above this ratio of maximum and minimum, an error axis is logarithmic


class Study(NamedTuple):
    """Hold what the figures draw."""

    spec: Spec
    finished: numbers.Finished
    networks: list[Numbers]


def all_figures(spec: Spec, rows: list[Row]) -> dict[str, Figure]:
    """Return the figures of the report by name; fig5 needs `paper` and another estimator."""
    draw: dict[str, Callable[[Study], Figure]] = {
        "fig1": trajectories,
        "fig2": before_and_after,
        "fig3": end_and_rerun,
        "fig4": time_per_epoch,
    }
    if "paper" in spec.estimator and numbers.reference(spec) != "paper":
        draw["fig5"] = eq6
    study = Study(spec, numbers.Finished(spec, rows), numbers.summarise(spec, rows).networks)
    with style():
        return {name: function(study) for name, function in draw.items()}


def trajectories(study: Study) -> Figure:
    """Draw Fig. 1: paths of (log10 L2, noise) over the validation error of fixed runs."""
    l2, noise = study.spec.intervals()

    def draw(axis: Axes, network: Numbers, tuning: Numbers) -> str:
        _landscape(study, network, axis)
        tuned = study.finished.of_kind(network.network, ("tuned", tuning.estimator))
        axis.set(xlim=l2, ylim=noise, xlabel="log₁₀ L2", ylabel="standard deviation of the input noise")
        if tuning.noise_end is None:
            note(axis, f"No tuned arm of {tuning.estimator} is stored yet.")
            return ""
        _paths(axis, tuned, _colour(tuning.estimator))
        at_zero = f"{tuning.noise_at_low_end} of {len(tuned)} near {noise[0]:g}"
        return f"median end noise {tuning.noise_end.median:.2f}; {at_zero}"

    figure = _per_estimator(study, "Where tuning moves the hyperparameters", draw)
    axis = figure.axes[0]
    first = axis.plot([], [], "o", ms=5, mfc="white", mec=INK, mew=1.2, label="start")
    last = axis.plot([], [], "o", ms=6.5, mfc=INK, mec="white", label="end of tuning")
    figure.legend(
        handles=[*first, *last], loc="outside lower left", ncols=2, frameon=False, handletextpad=0.2
    )
    return figure


def before_and_after(study: Study) -> Figure:
    """Draw Fig. 2: test error of each start with fixed and with tuned hyperparameters."""

    def draw(axis: Axes, network: Numbers, tuning: Numbers) -> str:
        pairs = _scatter_axes(study, axis, network, tuning, "initial")
        axis.set(xlabel="test error, fixed at the start (%)", ylabel="test error, tuned (%)")
        if not len(pairs):
            note(axis, f"No start has an initial and a tuned arm\nof {tuning.estimator} stored yet.")
            return ""
        worse = pairs[:, 1] > pairs[:, 0]
        low, high = axis.get_xlim()
        axis.fill_between([low, high], [low, high], high, color=WORSE, alpha=0.07, lw=0, zorder=0)
        _diagonal(axis, ("tuning made it worse", WORSE), ("tuning made it better", MUTED))
        _points(axis, pairs[~worse], _colour(tuning.estimator))
        _points(axis, pairs[worse], WORSE, "X", ms=8.5)
        equal = tuning.pairs - tuning.better - tuning.worse
        rest = f", {equal} equal" if equal else ""
        return f"{tuning.better} of {tuning.pairs} better, {tuning.worse} worse{rest}"

    return _per_estimator(study, "Test error before and after tuning", draw)


def end_and_rerun(study: Study) -> Figure:
    """Draw Fig. 3: test error at the end of tuning and of a re-run fixed at the tuned values."""
    images = DATASETS[study.spec.dataset][1]

    def draw(axis: Axes, network: Numbers, tuning: Numbers) -> str:
        pairs = _scatter_axes(study, axis, network, tuning, "rerun")
        axis.set(xlabel="test error, re-run at the tuned values (%)", ylabel="test error, end of tuning (%)")
        if not len(pairs):
            note(axis, f"No start has a tuned and a re-run arm\nof {tuning.estimator} stored yet.")
            return ""
        on = np.array([numbers.on_diagonal(a / 100, b / 100, images) for a, b in pairs], dtype=bool)
        x = np.linspace(*axis.get_xlim(), 200)
        band = np.array([100 * numbers.sampling_error(p, p, images) for p in np.clip(x / 100, 0, 1)])
        axis.fill_between(x, x - band, x + band, color=RULE, alpha=0.6, lw=0, zorder=0)
        _diagonal(axis, ("re-run is better", MUTED), ("end of tuning is better", MUTED))
        colour = _colour(tuning.estimator)
        _points(axis, pairs[on], colour)
        _points(axis, pairs[~on], "white", mec=colour, mew=1.3)
        return f"{tuning.on_diagonal} of {tuning.reruns} on the diagonal ({tuning.on_diagonal_percent:.0f} %)"

    return _per_estimator(study, "End of tuning and re-run", draw)


def time_per_epoch(study: Study) -> Figure:
    """Draw Fig. 4: seconds per epoch without and with tuning, and the difference, start by start."""
    size = (2 * PANEL + 1.2, 3.3 * len(study.networks) + 0.7)
    figure, axes = _panels(study, "Time per epoch", size, 2, width_ratios=[1, 1.25])
    for network, (seconds, overhead) in zip(study.networks, axes, strict=True):
        _seconds(study, network, seconds)
        _overheads(study, network, overhead)
        _name_network(study, network, seconds)
    return figure


def eq6(study: Study) -> Figure:
    """Draw Fig. 5: `paper` (Eq. 6 as printed) and the reference estimator, from the same starts."""
    ours = numbers.reference(study.spec)
    size = (3 * NARROW_PANEL, (NARROW_PANEL + 0.5) * len(study.networks) + 0.5)
    figure, axes = _panels(study, f"Eq. 6 as printed (paper) and {ours}, from the same starts", size, 3)
    for network, (errors, *noise) in zip(study.networks, axes, strict=True):
        _side_by_side(study, network, errors)
        tunings = {tuning.estimator: tuning for tuning in network.tunings}
        for axis, estimator in zip(noise, (ours, "paper"), strict=True):
            _noise_over_steps(study, network, tunings[estimator], axis)
        _name_network(study, network, errors)
    return figure


def by(estimator: str) -> str:
    """Return the words that follow "tuned" or "tuning"."""
    return "with midflight’s defaults" if estimator == DEFAULT else f"by {estimator}"  # noqa: RUF001


def _panels(
    study: Study, title: str, size: tuple[float, float], columns: int, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure with a row of panels per network."""
    between = " · " if size[0] > 2 * PANEL else "\n"
    data = f"{DATASET_NAMES[study.spec.dataset]}, {study.spec.train:,} training images"
    return panels(f"{title}{between}{data}", size, len(study.networks), columns, **options)


def _per_estimator(study: Study, title: str, draw: Callable[[Axes, Numbers, Numbers], str]) -> Figure:
    """Draw a panel per network and estimator; `draw` returns the finding for its title."""
    rows, columns = len(study.networks), len(study.spec.estimator)
    panel = PANEL if columns <= 2 else NARROW_PANEL  # the page shrinks wide figures together with their text
    size = (max(panel * columns + 0.9, 6.2), (panel + 0.25) * rows + 0.8)
    figure, axes = _panels(study, title, size, columns)
    for network, line in zip(study.networks, axes, strict=True):
        for tuning, axis in zip(network.tunings, line, strict=True):
            of_network = f", {network.network}" if rows > 1 else ""
            finding = f"\n{draw(axis, network, tuning)}".rstrip()
            axis.set_title(f"{tuning.estimator}{of_network}{finding}", color=_colour(tuning.estimator))
    return figure


def _name_network(study: Study, network: Numbers, axis: Axes) -> None:
    if len(study.networks) > 1:
        axis.set_title(f"{network.network}\n{axis.get_title(loc='left')}", loc="left")


def _colour(estimator: str) -> str:
    return COLOURS.get(estimator, OTHER_COLOUR)


def _points(axis: Axes, points: Values, colour: str, mark: str = "o", **options: Any) -> None:
    if len(points):  # an empty unclipped line would extend the layout to the corner of the figure
        style: Any = {"ms": 6.5, "mfc": colour, "mec": "white", "mew": 0.8, "zorder": 4, "clip_on": False}
        axis.plot(*points.T, mark, **(style | options))


def _ticks(low: float, high: float, log: bool = False, n: int = 6) -> Locator:
    """Return about n round ticks."""
    if not log:
        return MaxNLocator(n, steps=[1, 2, 5, 10])
    return LogLocator(subs=(1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7))


def _is_wide(low: float, high: float) -> bool:
    return low > 0 and high > WIDE_RANGE * low


def _paths(axis: Axes, tuned: list[Row], colour: str) -> None:
    """Draw each run from its start (hollow) to its end (filled)."""
    whole = ([row.result.start, *(point[1:] for point in row.result.trajectory)] for row in tuned)
    paths = [_subsampled(np.array(path), len(tuned)) for path in whole]
    if len(paths) <= MANY:
        _lines(axis, paths, color="white", lw=2.7, alpha=0.7, zorder=3)
    _lines(axis, paths, color=colour, lw=1.3 if len(paths) <= MANY else 0.6, alpha=0.75, zorder=4)
    _points(axis, np.array([row.result.start for row in tuned]), "white", ms=5, mec=colour, mew=1.2, zorder=5)
    _points(axis, np.array([row.result.end for row in tuned]), colour, zorder=6)


def _lines(axis: Axes, paths: list[Values], **style: Any) -> None:
    """Draw lines; many of them as pixels, because an SVG of a thousand paths takes seconds and megabytes."""
    many = len(paths) > MANY
    lines = LineCollection(paths, capstyle="round", rasterized=many, **style)
    lines.set_in_layout(False)  # they lie inside the panel; measuring them takes as long as drawing
    axis.add_collection(lines, autolim=False)


def _subsampled(path: Values, paths: int) -> Values:
    """Return evenly spaced points of one of `paths` paths in a panel; keep its ends."""
    most = min(max(PANEL_POINTS // max(paths, 1), MIN_POINTS), MAX_POINTS)
    return path if len(path) <= most else path[np.linspace(0, len(path) - 1, most).round().astype(int)]


def _landscape(study: Study, network: Numbers, axis: Axes) -> None:
    """Draw the validation error of the grid: contours of a complete grid, points of a partial one."""
    n, found = study.spec.landscape, study.finished.of_kind(network.network, ("landscape", ""))
    missing = "" if len(found) == n**2 else f"{len(found)} of {n**2} runs so far"
    if not found:
        missing = "no run stored yet" if n else "not run (--landscape)"
    if missing:
        axis.text(
            0.02, 0.98, f"landscape: {missing}", transform=axis.transAxes, va="top", color=MUTED, fontsize=8,
            bbox=BOX, zorder=10,
        )  # fmt: skip
    if not found:
        return
    x, y = np.array([study.spec.grid_point(row.arm.index) for row in found]).T
    z = np.array([100 * row.result.valid_error for row in found])
    low, high = float(z.min()), float(z.max())
    log = _is_wide(low, high)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    colours: Any = {
        "norm": LogNorm(low, high) if log else Normalize(low, high),
        "cmap": ERROR_MAP,
        "zorder": 0,
    }
    drawn: Any
    if missing or n < 2:
        drawn = axis.scatter(x, y, c=z, s=160, marker="s", edgecolors="none", clip_on=False, **colours)
    else:
        levels = np.geomspace(low, high, 15) if log else np.linspace(low, high, 15)
        levels[[0, -1]] = low * (1 - 1e-9) if low > 0 else low - 1e-9, high * (1 + 1e-9)
        drawn = axis.contourf(x[:n], y[::n], z.reshape(n, n), levels=levels, **colours)
    _colour_bar(axis, drawn, low, high, log)


def _colour_bar(axis: Axes, drawn: Any, low: float, high: float, log: bool) -> None:
    """Draw the scale of a row of panels, beside its last panel."""
    place: Any = axis.get_subplotspec()
    if not place.is_last_col():
        return
    figure = axis.get_figure()
    assert figure is not None
    row, columns = place.rowspan.start, place.get_gridspec().ncols
    bar = figure.colorbar(drawn, ax=figure.axes[row * columns : (row + 1) * columns], pad=0.02, aspect=30)
    bar.set_label("validation error of fixed runs (%)")
    bar.outline.set_visible(False)
    bar.set_ticks([t for t in _ticks(low, high, log).tick_values(low, high) if low <= t <= high])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter("{x:g}")


def _errors(study: Study, network: Numbers, first: ArmKind, second: ArmKind) -> Values:
    """Return the test errors of two arms of the same start in percent, shape (starts, 2)."""
    return 100 * np.array(study.finished.errors(network.network, first, second), dtype=float).reshape(-1, 2)


def _scatter_axes(study: Study, axis: Axes, network: Numbers, tuning: Numbers, fixed: Kind) -> Values:
    """Return (test error of the fixed arm, of the tuned arm); the panels of a network share their limits."""

    def errors(estimator: str) -> Values:
        first = INITIAL if fixed == "initial" else (fixed, estimator)
        return _errors(study, network, first, ("tuned", estimator))

    _square(axis, np.concatenate([errors(t.estimator) for t in network.tunings]))
    return errors(tuning.estimator)


def _square(axis: Axes, values: Values) -> None:
    """Set equal limits around the values (percent), on logarithmic axes if the range is wide."""
    if not values.size:
        axis.set(xticks=[], yticks=[])
        return
    low, high = float(values.min()), float(values.max())
    log = _is_wide(low, high)
    if log:
        axis.set(xscale="log", yscale="log")
        low, high = low * (low / high) ** 0.13, high * (high / low) ** 0.13
    else:
        pad = 0.13 * (high - low) or 0.5
        low, high = low - pad, high + pad
    axis.set(xlim=(low, high), ylim=(low, high))
    for a in (axis.xaxis, axis.yaxis):
        a.set_major_locator(_ticks(low, high, log))
        a.set_major_formatter("{x:g}")
        a.set_minor_locator(NullLocator())


def _diagonal(axis: Axes, above: tuple[str, str], below: tuple[str, str]) -> None:
    """Draw the diagonal; write (words, colour) above and below it."""
    axis.plot(axis.get_xlim(), axis.get_xlim(), color=MUTED, lw=1, zorder=1)
    axis.text(0.03, 0.97, above[0], transform=axis.transAxes, va="top", color=above[1])
    axis.text(0.97, 0.03, below[0], transform=axis.transAxes, ha="right", va="bottom", color=below[1])


def _seconds(study: Study, network: Numbers, axis: Axes) -> None:
    """Draw seconds per epoch: initial runs in the first column, then one column per estimator."""
    columns = {"plain": (MUTED, numbers.epoch_seconds(study.finished.of_kind(network.network, INITIAL)))}
    for t in network.tunings:
        seconds = numbers.epoch_seconds(study.finished.of_kind(network.network, ("tuned", t.estimator)))
        columns[t.estimator] = _colour(t.estimator), seconds
    axis.set_title("Seconds of training per epoch")
    axis.set_xlim(-0.4, len(columns) - 0.1)
    axis.set_xticks(range(len(columns)), list(columns), color=INK)
    axis.tick_params(axis="x", length=0)
    longest = max((s for _, seconds in columns.values() for s in seconds), default=None)
    if longest is None:
        axis.set_yticks([])
        note(axis, "No timed arm is stored yet.")
        return
    for x, (colour, seconds) in enumerate(columns.values()):
        axis.plot([x] * len(seconds), seconds, "o", ms=5, mfc=colour, mec="none", alpha=0.35)
        if seconds:
            median = float(np.median(seconds))
            axis.plot([x - 0.16, x + 0.16], [median] * 2, color=colour, lw=1.5)
            axis.annotate(f"{median:.3g} s", (x + 0.2, median), va="center", color=colour, fontweight="bold")
    axis.set_ylim(0, 1.15 * longest or 1)
    axis.yaxis.set_major_locator(_ticks(0, longest, n=5))


def _overheads(study: Study, network: Numbers, axis: Axes) -> None:
    """Draw the time that tuning adds to an epoch, one line per estimator, beside the paper's number."""
    main = numbers.main_estimator(study.spec)
    medians = {t.estimator: t.overhead_percent for t in network.tunings}
    of_main = medians[main]
    axis.set_title(f"Tuning {by(main)} adds {of_main.median:+.1f} %" if of_main else "What tuning adds")
    axis.axvline(0, color=RULE, lw=1, zorder=0)
    axis.axvline(PAPER.overhead_percent, color=INK, lw=1, ls=(0, (4, 3)), zorder=0)
    axis.annotate(
        f"the paper says\n{PAPER.overhead_percent:+.2f} %", (PAPER.overhead_percent, 1), va="top", fontsize=9,
        xycoords=("data", "axes fraction"), xytext=(5, -2), textcoords="offset points",
    )  # fmt: skip
    drawn = [0.0, 1.6 * PAPER.overhead_percent]
    for y, (estimator, spread) in enumerate(medians.items()):
        if spread is None:
            axis.text(1, y, "no start has both arms timed yet", va="center", color=MUTED, fontsize=9)
            continue
        colour = _colour(estimator)
        added = numbers.overheads_percent(
            study.finished.paired(network.network, INITIAL, ("tuned", estimator))
        )
        drawn += added
        axis.plot(added, y + 0.3 * _jitter(len(added)), "o", ms=5, mfc=colour, mec="none", alpha=0.4)
        axis.plot([spread.quartile_low, spread.quartile_high], [y, y], color=colour, lw=2.5)
        axis.plot([spread.median], [y], "D", ms=8, mfc=colour, mec="white", mew=1)
        axis.annotate(
            f"{spread.median:+.1f} %", (spread.median, y - 0.2), ha="center", va="bottom", color=colour,
            fontweight="bold", bbox=BOX,
        )  # fmt: skip
    axis.set_ylim(len(medians) - 0.4, -1.0)
    axis.set_yticks(range(len(medians)), list(medians), color=INK)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    low, high = min(drawn), max(drawn)
    axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    axis.xaxis.set_major_locator(_ticks(low, high))
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:+g} %" if v else "0")
    axis.set_xlabel("added to the time of an epoch")


def _jitter(n: int) -> Values:
    """Return n evenly spread offsets in [-0.5, 0.5), so that equal points do not overlap."""
    golden = (np.sqrt(5) - 1) / 2
    return np.asarray((np.arange(1, n + 1) * golden) % 1 - 0.5)


def _side_by_side(study: Study, network: Numbers, axis: Axes) -> None:
    """Draw the test errors at the end of tuning by `paper` and by the reference estimator."""
    ours = numbers.reference(study.spec)
    pairs = _errors(study, network, ("tuned", "paper"), ("tuned", ours))
    _square(axis, pairs)
    axis.set(xlabel="test error tuned by paper (%)", ylabel=f"test error tuned by {ours} (%)")
    axis.set_title("Test error at the end")
    if not len(pairs):
        note(axis, f"No start has tuned arms of both\n{ours} and paper stored yet.")
        return
    x, y = pairs.T
    lower = next(c.lower for c in network.comparisons if (c.estimator, c.other) == (ours, "paper"))
    axis.set_title(f"Test error at the end\n{ours} is lower in {lower} of {len(pairs)} starts")
    _diagonal(axis, ("paper is better", _colour("paper")), (f"{ours} is better", _colour(ours)))
    _points(axis, pairs[y < x], _colour(ours))
    _points(axis, pairs[y > x], _colour("paper"))
    _points(axis, pairs[y == x], MUTED)


def _noise_over_steps(study: Study, network: Numbers, tuning: Numbers, axis: Axes) -> None:
    """Draw the noise of each start during tuning, and their median."""
    colour, end, spec = _colour(tuning.estimator), tuning.noise_end, study.spec
    finding = f"\nthe middle half ends in {end.quartile_low:.2f} to {end.quartile_high:.2f}" if end else ""
    axis.set_title(f"Noise while tuning by {tuning.estimator}{finding}", color=colour)
    axis.set(xlabel="training step", ylabel="input noise", xlim=(0, spec.steps()), ylim=spec.intervals()[1])
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    tuned = study.finished.of_kind(network.network, ("tuned", tuning.estimator))
    if not tuned:
        note(axis, f"No tuned arm of {tuning.estimator} is stored yet.")
        return
    paths = [_subsampled(np.array(numbers.noise_path(row)), len(tuned)) for row in tuned]
    _lines(axis, paths, color=colour, lw=1.1, alpha=0.45, zorder=4, clip_on=False)
    _points(axis, np.array([path[-1] for path in paths]), colour, ms=4.5, mew=0.6, zorder=5)
    if len({path.shape for path in paths}) == 1:
        x, y = np.median(np.array(paths), axis=0).T
        axis.plot(x, y, color=INK, lw=2.2, zorder=6)
        axis.annotate(
            f"median {y[-1]:.2f}", (x[-1], y[-1]), xytext=(-6, 7), textcoords="offset points", ha="right",
            fontweight="bold", zorder=7, bbox=BOX,
        )  # fmt: skip
