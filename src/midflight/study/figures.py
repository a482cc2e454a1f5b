"""Draw the figures of the paper from stored rows.

Each network has a row of panels, each estimator a column. A panel without data says so. Equal rows give
equal files, whatever the date, machine or user settings.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from midflight._reporting.figures import INK, MUTED, RULE, WORSE, note, style
from midflight.study.spec import DEFAULT, Arm, Spec
from midflight.study.store import Row
from midflight.study.summary import (
    PAPER_OVERHEAD_PERCENT,
    TEST_IMAGES,
    Network,
    Spread,
    Start,
    Tuning,
    epoch_seconds,
    error_of,
    estimators,
    main_estimator,
    measure,
    noise_path,
    on_diagonal,
    overhead_percent,
    reference,
    sampling_error,
    starts,
    timed,
)

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
MIN_POINTS, MAX_POINTS = 60, 250  # points drawn per trajectory
MANY = 30  # above this number, trajectories are drawn as thin lines
WIDE_RANGE = 3.0  # above this ratio of maximum and minimum, an error axis is logarithmic


def all_figures(spec: Spec, rows: list[Row]) -> dict[str, Figure]:
    """Return the figures of the report by name; fig5 needs `paper` and another estimator."""
    draw: dict[str, Callable[[Spec, list[Row]], Figure]] = {
        "fig1": trajectories,
        "fig2": before_and_after,
        "fig3": end_and_rerun,
        "fig4": time_per_epoch,
    }
    if "paper" in spec.estimator and reference(spec) != "paper":
        draw["fig5"] = eq6
    return {name: function(spec, rows) for name, function in draw.items()}


def trajectories(spec: Spec, rows: list[Row]) -> Figure:
    """Fig. 1: paths of (log10 L2, noise) over the validation error of fixed runs."""
    with style():
        figure, panels = _grid(spec, "Where tuning moves the hyperparameters")
        l2, noise = spec.intervals()
        for network, tuning, axis in _each(spec, rows, panels):
            _landscape(spec, rows, network.network, axis)
            tuned = [s.tuned for s in starts(rows, network.network, tuning.estimator) if s.tuned]
            _paths(axis, tuned, _colour(tuning.estimator))
            axis.set(xlim=l2, ylim=noise, xlabel="log₁₀ L2", ylabel="standard deviation of the input noise")
            at_zero = f"{tuning.noise_at_low_end} of {len(tuned)} near {noise[0]:g}"
            end = tuning.noise_end
            finding = f"median end noise {end.median:.2f}; {at_zero}" if end else ""
            _title(spec, axis, network, tuning.estimator, finding)
            if not tuned:
                note(axis, f"No tuned arm of {tuning.estimator} is stored yet.")
        _legend_of_points(figure)
        return figure


def _paths(axis: Axes, tuned: list[Row], colour: str) -> None:
    """Draw each run from its start (hollow) to its end (filled)."""
    few = len(tuned) <= MANY
    width = 1.3 if few else 0.6
    for row in tuned:
        path = np.array([row.result.start, *[point[1:] for point in row.result.trajectory]])
        x, y = _subsampled(path, len(tuned)).T
        if few:
            axis.plot(x, y, color="white", lw=width + 1.4, alpha=0.7, zorder=3)
        axis.plot(x, y, color=colour, lw=width, alpha=0.75, zorder=4)
    first = np.array([row.result.start for row in tuned])
    last = np.array([row.result.end for row in tuned])
    _points(axis, first, "white", ms=5, mec=colour, mew=1.2, zorder=5)
    _points(axis, last, colour, zorder=6)


def before_and_after(spec: Spec, rows: list[Row]) -> Figure:
    """Fig. 2: test error of each start with fixed and with tuned hyperparameters."""

    def panel(axis: Axes, found: list[Start], tuning: Tuning) -> str:
        pairs = _errors(found, "initial")
        worse = pairs[:, 1] > pairs[:, 0]
        low, high = axis.get_xlim()
        axis.fill_between([low, high], [low, high], high, color=WORSE, alpha=0.07, lw=0, zorder=0)
        axis.plot([low, high], [low, high], color=MUTED, lw=1, zorder=1)
        axis.text(0.03, 0.97, "tuning made it worse", transform=axis.transAxes, va="top", color=WORSE)
        axis.text(0.97, 0.03, "tuning made it better", transform=axis.transAxes, ha="right", color=MUTED)
        _points(axis, pairs[~worse], _colour(tuning.estimator))
        _points(axis, pairs[worse], WORSE, "X", ms=8.5)
        equal = tuning.pairs - tuning.better - tuning.worse
        rest = f", {equal} equal" if equal else ""
        return f"{tuning.better} of {tuning.pairs} better, {tuning.worse} worse{rest}"

    labels = ("test error, fixed at the start (%)", "test error, tuned (%)")
    return _scatter(spec, rows, "Test error before and after tuning", "initial", labels, panel)


def end_and_rerun(spec: Spec, rows: list[Row]) -> Figure:
    """Fig. 3: test error at the end of tuning and of a re-run fixed at the tuned values."""
    images = TEST_IMAGES[spec.dataset]

    def panel(axis: Axes, found: list[Start], tuning: Tuning) -> str:
        pairs = _errors(found, "rerun")
        on = np.array([on_diagonal(a / 100, b / 100, images) for a, b in pairs], dtype=bool)
        low, high = axis.get_xlim()
        x = np.linspace(low, high, 200)
        band = np.array([100 * sampling_error(p, p, images) for p in np.clip(x / 100, 0, 1)])
        axis.fill_between(x, x - band, x + band, color=RULE, alpha=0.6, lw=0, zorder=0)
        axis.plot([low, high], [low, high], color=MUTED, lw=1, zorder=1)
        axis.text(0.03, 0.97, "re-run is better", transform=axis.transAxes, va="top", color=MUTED)
        axis.text(0.97, 0.03, "end of tuning is better", transform=axis.transAxes, ha="right", color=MUTED)
        colour = _colour(tuning.estimator)
        _points(axis, pairs[on], colour)
        _points(axis, pairs[~on], "white", mec=colour, mew=1.3)
        share = "" if tuning.on_diagonal_percent is None else f" ({tuning.on_diagonal_percent:.0f} %)"
        return f"{tuning.on_diagonal} of {tuning.reruns} on the diagonal{share}"

    labels = ("test error, re-run at the tuned values (%)", "test error, end of tuning (%)")
    return _scatter(spec, rows, "End of tuning and re-run", "rerun", labels, panel)


def time_per_epoch(spec: Spec, rows: list[Row]) -> Figure:
    """Fig. 4: seconds per epoch without and with tuning, and the difference, start by start."""
    with style():
        networks, names = measure(spec, rows).networks, estimators(spec)
        size = (2 * PANEL + 1.2, 3.3 * len(networks) + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        _suptitle(spec, figure, "Time per epoch")
        panels = figure.subplots(len(networks), 2, squeeze=False, width_ratios=[1, 1.25])
        for network, (seconds, overhead) in zip(networks, panels, strict=True):
            by_name = {e: starts(timed(spec, rows), network.network, e) for e in names}
            _seconds(seconds, by_name)
            medians = {t.estimator: t.overhead_percent for t in network.tunings}
            _overheads(overhead, by_name, medians, main_estimator(spec))
            if len(networks) > 1:
                seconds.set_title(f"{network.network}\n{seconds.get_title(loc='left')}", loc="left")
        return figure


def eq6(spec: Spec, rows: list[Row]) -> Figure:
    """Fig. 5: `paper` (Eq. 6 as printed) and the reference estimator, from the same starts."""
    with style():
        names = (reference(spec), "paper")
        networks = measure(spec, rows).networks
        figure = Figure(
            figsize=(3 * NARROW_PANEL, (NARROW_PANEL + 0.5) * len(networks) + 0.5), layout="constrained"
        )
        _suptitle(spec, figure, f"Eq. 6 as printed (paper) and {names[0]}, from the same starts")
        panels = figure.subplots(len(networks), 3, squeeze=False)
        for network, (scatter, *noise) in zip(networks, panels, strict=True):
            ours, theirs = (starts(rows, network.network, e) for e in names)
            _side_by_side(scatter, network, ours, theirs, names)
            tunings = {t.estimator: t for t in network.tunings}
            for axis, name, found in zip(noise, names, (ours, theirs), strict=True):
                _noise_over_steps(spec, axis, [s.tuned for s in found if s.tuned], tunings[name])
            if len(networks) > 1:
                scatter.set_title(f"{network.network}\n{scatter.get_title(loc='left')}", loc="left")
        return figure


def by(estimator: str) -> str:
    """Return the words that follow "tuned" or "tuning"."""
    return "with midflight’s defaults" if estimator == DEFAULT else f"by {estimator}"  # noqa: RUF001


def _grid(spec: Spec, title: str) -> tuple[Figure, Any]:
    rows, columns = len(dict.fromkeys(spec.networks)), len(estimators(spec))
    panel = PANEL if columns <= 2 else NARROW_PANEL  # the page shrinks wide figures together with their text
    size = (max(panel * columns + 0.9, 6.2), (panel + 0.25) * rows + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    _suptitle(spec, figure, title)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _suptitle(spec: Spec, figure: Figure, title: str) -> None:
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.12, h_pad=0.1)  # type: ignore[call-arg]
    between = " · " if figure.get_figwidth() > 2 * PANEL else "\n"
    figure.suptitle(
        f"{title}{between}{DATASET_NAMES[spec.dataset]}, {spec.train:,} training images", x=0.01, ha="left"
    )


def _each(spec: Spec, rows: list[Row], panels: Any) -> list[tuple[Network, Tuning, Axes]]:
    return [
        (network, tuning, axis)
        for network, line in zip(measure(spec, rows).networks, panels, strict=True)
        for tuning, axis in zip(network.tunings, line, strict=True)
    ]


def _title(spec: Spec, axis: Axes, network: Network, estimator: str, finding: str) -> None:
    where = f"{estimator}, {network.network}" if len(spec.networks) > 1 else estimator
    axis.set_title(f"{where}\n{finding}" if finding else where, color=_colour(estimator))


def _colour(estimator: str) -> str:
    return COLOURS.get(estimator, OTHER_COLOUR)


def _points(axis: Axes, points: Values, colour: str, mark: str = "o", **options: Any) -> None:
    if len(points):  # an empty unclipped line would extend the layout to the corner of the figure
        style: dict[str, Any] = {
            "ms": 6.5,
            "mfc": colour,
            "mec": "white",
            "mew": 0.8,
            "zorder": 4,
            "clip_on": False,
        }
        axis.plot(*points.T, mark, **(style | options))


def _subsampled(path: Values, paths: int) -> Values:
    """Return evenly spaced points of one of `paths` paths in a panel; keep its ends."""
    most = min(max(PANEL_POINTS // max(paths, 1), MIN_POINTS), MAX_POINTS)
    return path if len(path) <= most else path[np.linspace(0, len(path) - 1, most).round().astype(int)]


def _landscape(spec: Spec, rows: list[Row], network: str, axis: Axes) -> None:
    """Draw the validation error of the grid: contours of a complete grid, points of a partial one."""
    by_arm = {row.arm: 100 * row.result.valid_error for row in rows}
    arms = [Arm(network, "landscape", "", i) for i in range(spec.landscape**2)]
    points = np.array([[*spec.grid_point(a.index), by_arm[a]] for a in arms if a in by_arm])
    if not len(points):
        _landscape_note(axis, "no run stored yet" if arms else "not run (--landscape)")
        return
    low, high = float(points[:, 2].min()), float(points[:, 2].max())
    log = low > 0 and high > WIDE_RANGE * low
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    norm: Normalize = LogNorm(low, high) if log else Normalize(low, high)
    drawn: Any
    if len(points) == len(arms) and spec.landscape >= 2:
        n = spec.landscape
        x, y, z = points[:n, 0], points[::n, 1], points[:, 2].reshape(n, n)
        levels = np.geomspace(low, high, 15) if log else np.linspace(low, high, 15)
        levels[[0, -1]] = low * (1 - 1e-9) if low > 0 else low - 1e-9, high * (1 + 1e-9)
        drawn = axis.contourf(x, y, z, levels=levels, norm=norm, cmap=ERROR_MAP, zorder=0)
    else:
        drawn = axis.scatter(
            points[:, 0], points[:, 1], c=points[:, 2], s=160, marker="s", norm=norm, cmap=ERROR_MAP
        )
        drawn.set(zorder=0, edgecolors="none", clip_on=False)
        _landscape_note(axis, f"{len(points)} of {len(arms)} runs so far")
    _colour_bar(axis, drawn, low, high, log)


def _landscape_note(axis: Axes, words: str) -> None:
    axis.text(
        0.02, 0.98, f"landscape: {words}", transform=axis.transAxes, va="top", color=MUTED, fontsize=8,
        bbox={"facecolor": "white", "linewidth": 0, "alpha": 0.85, "pad": 1}, zorder=10,
    )  # fmt: skip


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
    ticks = _log_ticks(low, high) if log else MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    bar.set_ticks([t for t in ticks if low <= t <= high])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _log_ticks(low: float, high: float) -> list[float]:
    steps = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 3, 5)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [float(s) * 10.0**d for d in decades for s in steps]


def _legend_of_points(figure: Figure) -> None:
    axis = figure.axes[0]
    first = axis.plot([], [], "o", ms=5, mfc="white", mec=INK, mew=1.2, label="start")
    last = axis.plot([], [], "o", ms=6.5, mfc=INK, mec="white", label="end of tuning")
    figure.legend(
        handles=[*first, *last], loc="outside lower left", ncols=2, frameon=False, handletextpad=0.2
    )


def _errors(found: list[Start], before: str) -> Values:
    """Return (test error of the fixed arm, of the tuned arm) in percent, shape (n, 2)."""
    both = ((error_of(getattr(s, before)), error_of(s.tuned)) for s in found)
    return np.array([(100 * a, 100 * b) for a, b in both if a is not None and b is not None]).reshape(-1, 2)


def _scatter(
    spec: Spec,
    rows: list[Row],
    title: str,
    before: str,
    labels: tuple[str, str],
    panel: Callable[[Axes, list[Start], Tuning], str],
) -> Figure:
    """Draw a square panel per network and estimator; panels of a network share their limits."""
    with style():
        figure, panels = _grid(spec, title)
        each = _each(spec, rows, panels)
        found = {(n.network, t.estimator): starts(rows, n.network, t.estimator) for n, t, _ in each}
        for network, tuning, axis in each:
            of_network = [_errors(s, before) for (n, _), s in found.items() if n == network.network]
            _square(axis, np.concatenate(of_network))
            axis.set(xlabel=labels[0], ylabel=labels[1])
            here = found[network.network, tuning.estimator]
            drawn = len(_errors(here, before)) > 0
            _title(spec, axis, network, tuning.estimator, panel(axis, here, tuning) if drawn else "")
            if not drawn:
                arms = {"initial": "an initial and a tuned arm", "rerun": "a tuned and a re-run arm"}[before]
                note(axis, f"No start has {arms}\nof {tuning.estimator} stored yet.")
        return figure


def _square(axis: Axes, values: Values) -> None:
    """Set equal limits around the values (percent), on logarithmic axes if the range is wide."""
    if not values.size:
        axis.set(xticks=[], yticks=[])
        return
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > WIDE_RANGE * low:
        axis.set(xscale="log", yscale="log")
        low, high = low * (low / high) ** 0.13, high * (high / low) ** 0.13
        for a in (axis.xaxis, axis.yaxis):
            a.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)))
            a.set_minor_formatter(NullFormatter())
            a.set_minor_locator(NullLocator())
    else:
        pad = 0.13 * (high - low) or 0.5
        low, high = low - pad, high + pad
        for a in (axis.xaxis, axis.yaxis):
            a.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    for a in (axis.xaxis, axis.yaxis):
        a.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set(xlim=(low, high), ylim=(low, high))


def _seconds(axis: Axes, by_name: dict[str, list[Start]]) -> None:
    """Draw seconds per epoch: initial runs in the first column, then one column per estimator."""
    columns = ["plain", *by_name]
    lists = [[epoch_seconds(s.initial) for s in next(iter(by_name.values()))]]
    lists += [[epoch_seconds(s.tuned) for s in found] for found in by_name.values()]
    values = np.array(lists, dtype=float).reshape(len(columns), -1)
    axis.set_title("Seconds of training per epoch")
    axis.set_xlim(-0.4, len(columns) - 0.1)
    axis.set_xticks(range(len(columns)), columns, color=INK)
    axis.tick_params(axis="x", length=0)
    if not np.isfinite(values).any():
        axis.set_yticks([])
        note(axis, "No timed arm is stored yet.")
        return
    for column, (name, seconds) in enumerate(zip(columns, values, strict=True)):
        colour = MUTED if column == 0 else _colour(name)
        seconds = seconds[np.isfinite(seconds)]
        axis.plot(np.full(len(seconds), column), seconds, "o", ms=5, mfc=colour, mec="none", alpha=0.35)
        if len(seconds):
            median = float(np.median(seconds))
            axis.plot([column - 0.16, column + 0.16], [median] * 2, color=colour, lw=1.5)
            axis.annotate(
                f"{median:.3g} s", (column + 0.2, median), va="center", color=colour, fontweight="bold"
            )
    axis.set_ylim(0, 1.15 * float(np.nanmax(values)) or 1)
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _overheads(
    axis: Axes, by_name: dict[str, list[Start]], medians: dict[str, Spread | None], first: str
) -> None:
    """Draw the time that tuning adds to an epoch, one line per estimator, beside the paper's number."""
    found = {n: [o for s in f if (o := overhead_percent(s)) is not None] for n, f in by_name.items()}
    of_first = medians[first]
    finding = f"Tuning {by(first)} adds {of_first.median:+.1f} %" if of_first else "What tuning adds"
    axis.set_title(finding)
    axis.axvline(0, color=RULE, lw=1, zorder=0)
    axis.axvline(PAPER_OVERHEAD_PERCENT, color=INK, lw=1, ls=(0, (4, 3)), zorder=0)
    axis.annotate(
        f"the paper says\n{PAPER_OVERHEAD_PERCENT:+.2f} %",
        (PAPER_OVERHEAD_PERCENT, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -2),
        textcoords="offset points",
        va="top",
        fontsize=9,
    )
    for y, (name, values) in enumerate(found.items()):
        colour, median = _colour(name), medians[name]
        if median is None:
            axis.text(1, y, "no start has both arms timed yet", va="center", color=MUTED, fontsize=9)
            continue
        axis.plot(values, y + 0.3 * _jitter(len(values)), "o", ms=5, mfc=colour, mec="none", alpha=0.4)
        axis.plot([median.quartile_low, median.quartile_high], [y, y], color=colour, lw=2.5)
        axis.plot([median.median], [y], "D", ms=8, mfc=colour, mec="white", mew=1)
        axis.annotate(
            f"{median.median:+.1f} %",
            (median.median, y - 0.2),
            ha="center",
            va="bottom",
            color=colour,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
    _overhead_scale(axis, list(found), [v for values in found.values() for v in values])


def _overhead_scale(axis: Axes, names: list[str], values: list[float]) -> None:
    axis.set_ylim(len(names) - 0.4, -1.0)
    axis.set_yticks(range(len(names)), names, color=INK)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g} %" if v else "0"))
    axis.set_xlabel("added to the time of an epoch")
    low, high = min([0.0, *values]), max([1.6 * PAPER_OVERHEAD_PERCENT, *values])
    axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))


def _jitter(n: int) -> Values:
    """Return n evenly spread offsets in [-0.5, 0.5), so that equal points do not overlap."""
    golden = (np.sqrt(5) - 1) / 2
    return np.asarray((np.arange(1, n + 1) * golden) % 1 - 0.5)


def _side_by_side(
    axis: Axes, network: Network, ours: list[Start], theirs: list[Start], names: tuple[str, str]
) -> None:
    both = [(error_of(b.tuned), error_of(a.tuned)) for a, b in zip(ours, theirs, strict=True)]
    pairs = np.array([(100 * b, 100 * a) for b, a in both if a is not None and b is not None]).reshape(-1, 2)
    _square(axis, pairs)
    axis.set(xlabel="test error tuned by paper (%)", ylabel=f"test error tuned by {names[0]} (%)")
    comparison = next((c for c in network.comparisons if (c.estimator, c.other) == (names[0], "paper")), None)
    if comparison is None or not len(pairs):
        axis.set_title("Test error at the end")
        note(axis, f"No start has tuned arms of both\n{names[0]} and paper stored yet.")
        return
    axis.set_title(
        f"Test error at the end\n{names[0]} is lower in {comparison.lower} of {comparison.pairs} starts"
    )
    ends = axis.get_xlim()
    axis.plot(ends, ends, color=MUTED, lw=1, zorder=1)
    for below, text, at, ha, va in (
        (True, f"{names[0]} is better", (0.97, 0.03), "right", "bottom"),
        (False, "paper is better", (0.03, 0.97), "left", "top"),
    ):
        colour = _colour(names[0] if below else "paper")
        chosen = pairs[:, 1] < pairs[:, 0] if below else pairs[:, 1] > pairs[:, 0]
        _points(axis, pairs[chosen], colour)
        axis.text(*at, text, transform=axis.transAxes, ha=ha, va=va, color=colour)
    _points(axis, pairs[pairs[:, 0] == pairs[:, 1]], MUTED)


def _noise_over_steps(spec: Spec, axis: Axes, tuned: list[Row], tuning: Tuning) -> None:
    colour = _colour(tuning.estimator)
    end = tuning.noise_end
    finding = f"\nthe middle half ends in {end.quartile_low:.2f} to {end.quartile_high:.2f}" if end else ""
    axis.set_title(f"Noise while tuning by {tuning.estimator}{finding}", color=colour)
    axis.set(xlabel="training step", ylabel="input noise", xlim=(0, spec.steps()), ylim=spec.intervals()[1])
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    if not tuned:
        note(axis, f"No tuned arm of {tuning.estimator} is stored yet.")
        return
    paths = [_subsampled(np.array(noise_path(row)), len(tuned)) for row in tuned]
    for path in paths:
        axis.plot(*path.T, color=colour, lw=1.1, alpha=0.45, clip_on=False)
        axis.plot(*path[-1], "o", ms=4.5, mfc=colour, mec="white", mew=0.6, clip_on=False, zorder=5)
    if len({path.shape for path in paths}) == 1:
        x, y = np.median(np.array(paths), axis=0).T
        axis.plot(x, y, color=INK, lw=2.2, zorder=6)
        axis.annotate(
            f"median {y[-1]:.2f}",
            (x[-1], y[-1]),
            xytext=(-6, 7),
            textcoords="offset points",
            ha="right",
            fontweight="bold",
            zorder=7,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.5},
        )
