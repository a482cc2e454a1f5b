"""The figures of a search, each a function of its stored trials."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from midflight._reporting.figures import INK, MUTED, RULE, WORSE, style
from midflight.search.ledger import Record, best
from midflight.search.space import Config, Space, Spec, unit
from midflight.space import Categorical, Float

ACCENT = "#0072b2"
COLOURS = {"complete": ACCENT, "pruned": "#8d97a5", "unfinished": "#c9ced6", "failed": WORSE}
ABSENT = -0.12  # where a hyperparameter that is not active stands on its axis
ENOUGH = 12  # finished trials below which a forest says nothing about importance
TREES, REPEATS = 200, 10


def all_figures(space: Space, records: list[Record]) -> dict[str, Figure]:
    """Every figure of the report by name."""
    with style():
        return {
            "history": history(records),
            "importance": importance(space, records),
            "configurations": configurations(space, records),
            "online": online(space, records),
        }


def history(records: list[Record]) -> Figure:
    """Validation loss of each trial, and the best so far, over the epochs trained until then."""
    figure, (axis,) = _figure(1, "Best validation loss so far", (8.2, 4.2))
    spent, least = 0, math.inf
    steps: list[tuple[int, float]] = []
    for r in records:
        spent += r.epoch - r.from_epoch
        if not math.isfinite(r.loss):
            continue
        axis.plot(spent, r.loss, "o", ms=5, mfc=COLOURS[r.state], mec="white", mew=0.6, zorder=3)
        if r.state == "complete" and r.loss < least:
            least = r.loss
            steps.append((spent, least))
    if steps:
        x, y = zip(*steps, (spent, least), strict=True)
        axis.step(x, y, where="post", color=INK, lw=1.6, zorder=4)
    axis.set(xlabel="epochs trained in all trials together", ylabel="validation loss")
    if steps or any(math.isfinite(r.loss) for r in records):
        axis.set_yscale("log")
    else:
        _note(axis, "No trial has reported a loss yet.")
    for state in [s for s in COLOURS if any(r.state == s for r in records)]:
        axis.plot([], [], "o", ms=5, mfc=COLOURS[state], mec="white", label=state)
    axis.plot([], [], color=INK, lw=1.6, label="best that was trained to the end")
    axis.legend(frameon=False, fontsize=9)
    return figure


def importance(space: Space, records: list[Record]) -> Figure:
    """How much a forest that predicts a trial's rank loses when one hyperparameter is shuffled."""
    names = list(space.searched)
    figure, (axis,) = _figure(1, "What mattered", (7.2, 1.6 + 0.36 * len(names)))
    found = importances(space, records)
    if found is None:
        _note(axis, f"Needs {ENOUGH} finished trials of different loss.")
        axis.set(xticks=[], yticks=[])
        return figure
    means, spreads, score = found
    order = np.argsort(means)
    axis.barh(
        [names[i] for i in order], np.maximum(means[order], 0), xerr=spreads[order], color=ACCENT, height=0.6,
        error_kw={"ecolor": MUTED, "lw": 1},
    )  # fmt: skip
    axis.set(xlabel="drop of the explained variance of ranks when shuffled")
    axis.set_title(f"the forest explains {100 * score:.0f} % of the variance out of bag", color=MUTED)
    axis.tick_params(axis="y", labelcolor=INK)
    return figure


def importances(
    space: Space, records: list[Record]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float] | None:
    """(mean drop, its standard deviation, R^2 out of bag) by searched hyperparameter; None if too few trials.

    A forest (Breiman 2001) predicts the rank of a trial's loss from its configuration and its epochs, so that
    trials that were stopped early count; ranks, because a diverged loss would drown all others.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    done = [r for r in records if r.losses and r.state in ("complete", "pruned")]
    if len(done) < ENOUGH or len({r.loss for r in done}) < 2:
        return None
    x = np.array([[*_coordinates(space, r.config), r.epoch] for r in done])
    y = np.argsort(np.argsort([r.loss for r in done])) / (len(done) - 1)
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=0).fit(x, y)
    found = permutation_importance(forest, x, y, n_repeats=REPEATS, random_state=0)
    return found.importances_mean[:-1], found.importances_std[:-1], float(forest.oob_score_)


def configurations(space: Space, records: list[Record]) -> Figure:
    """Every trial as a line through its searched hyperparameters, the better the darker."""
    names = list(space.searched)
    figure, (axis,) = _figure(1, "Configurations", (max(7.0, 1.35 * (len(names) + 1)), 4.6))
    shown = sorted((r for r in records if math.isfinite(r.loss)), key=lambda r: -r.loss)
    chosen = best(records)
    ranks = np.linspace(0, 1, max(2, len(shown)))
    for rank, r in zip(ranks, shown, strict=False):
        y = [*_coordinates(space, r.config), 1 - rank]
        mine = chosen is not None and r.number == chosen.number
        colour = ACCENT if mine else colormaps["Greys"](0.15 + 0.6 * rank)
        axis.plot(range(len(y)), y, color=colour, lw=2.6 if mine else 0.8, zorder=9 if mine else 2 + rank)
    for n, name in enumerate(names):
        axis.axvline(n, color=RULE, lw=1, zorder=1)
        for at, label in _marks(space[name]):
            axis.text(n + 0.04, at, label, fontsize=8, color=MUTED, va="center", zorder=10,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.6})  # fmt: skip
    axis.axvline(len(names), color=RULE, lw=1, zorder=1)
    axis.set_xticks(range(len(names) + 1), [*names, "rank of\nthe loss"], color=INK)
    axis.set(ylim=(ABSENT - 0.08, 1.06), yticks=[], xlim=(-0.1, len(names) + 0.5))
    axis.text(-0.08, ABSENT, "not\nactive", fontsize=7.5, color=MUTED, va="center", ha="right")
    axis.spines[["left", "bottom"]].set_visible(False)
    if not shown:
        _note(axis, "No trial has reported a loss yet.")
    return figure


def online(space: Space, records: list[Record]) -> Figure:
    """What was tuned inside the best trial, epoch by epoch; the other trials behind it."""
    chosen = best(records)
    names = list({**chosen.starts, **chosen.online}) if chosen else []
    size = (max(6.4, 3.3 * len(names)), 3.5)
    figure, axes = _figure(max(1, len(names)), "Tuned inside the best trial", size)
    if chosen is None or not names:
        _note(axes[0], "Nothing was tuned inside the trials.")
        axes[0].set(xticks=[], yticks=[])
        return figure
    for axis, name in zip(axes, names, strict=True):
        spec = space[name]
        assert isinstance(spec, Float)
        for r in records:
            if r.trajectory and name in r.online and r.number != chosen.number:
                axis.plot(*_path(r, name), color=RULE, lw=0.8, zorder=1)
        x, y = _path(chosen, name)
        axis.plot(x, y, color=ACCENT, lw=2, zorder=3)
        axis.plot(x[0], y[0], "o", mfc="white", mec=ACCENT, zorder=4, clip_on=False)
        axis.plot(x[-1], y[-1], "o", color=ACCENT, zorder=4, clip_on=False)
        axis.set(title=f"{name}: {y[0]:.3g} to {y[-1]:.3g}", xlabel="epoch", ylim=(spec.low, spec.high))
        axis.set_yscale("log" if spec.log else "logit" if spec.logit else "linear")
        if spec.logit:
            axis.minorticks_off()
    return figure


def _path(record: Record, name: str) -> tuple[list[int], list[float]]:
    """Epochs and values; of a hyperparameter with several entries, their mean."""
    points = [(e, values[name]) for e, values in [(0, record.starts), *record.trajectory] if name in values]
    return [epoch for epoch, _ in points], [float(np.mean(value)) for _, value in points]


def _coordinates(space: Space, config: Config) -> list[float]:
    return [
        _coordinate(spec, config[name]) if name in config else ABSENT for name, spec in space.searched.items()
    ]


def _coordinate(spec: Spec, value: Any) -> float:
    if isinstance(spec, Categorical):
        return spec.choices.index(value) / max(1, len(spec.choices) - 1)
    return unit(spec, value)


def _marks(spec: Spec) -> list[tuple[float, str]]:
    if isinstance(spec, Categorical):
        return [(_coordinate(spec, choice), str(choice)) for choice in spec.choices]
    return [(0.0, f"{spec.low:g}"), (1.0, f"{spec.high:g}")]


def _figure(columns: int, title: str, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _note(axis: Axes, words: str) -> None:
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", color=MUTED)
