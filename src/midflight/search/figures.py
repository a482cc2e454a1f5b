"""Draw the figures of a search from its stored trials."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure

from midflight._reporting.figures import BOX, INK, MUTED, RULE, WORSE, note, panels, style
from midflight.search.ledger import Record, best
from midflight.search.space import Config, Space, Spec, unit
from midflight.space import Categorical, Float

ACCENT = "#0072b2"
COLOURS = {"complete": ACCENT, "pruned": "#8d97a5", "unfinished": "#c9ced6", "failed": WORSE}
INACTIVE = -0.12  # height of an inactive hyperparameter on its axis
MIN_TRIALS = 12  # finished trials that the importance needs
TREES, REPEATS = 200, 10  # trees of the forest, shuffles per hyperparameter


def all_figures(space: Space, records: list[Record]) -> dict[str, Figure]:
    """Return the figures of the report by name."""
    with style():
        return {
            "history": history(records),
            "importance": importance(space, records),
            "configurations": configurations(space, records),
            "online": online(space, records),
        }


def history(records: list[Record]) -> Figure:
    """Draw the loss of each trial and the best loss so far against the epochs trained so far."""
    figure, [[axis]] = panels("Best validation loss so far", (8.2, 4.2))
    epochs, lowest = 0, math.inf
    steps: list[tuple[int, float]] = []
    for r in records:
        epochs += r.epoch - r.from_epoch
        if not math.isfinite(r.loss):
            continue
        axis.plot(epochs, r.loss, "o", ms=5, mfc=COLOURS[r.state], mec="white", mew=0.6, zorder=3)
        if r.state == "complete" and r.loss < lowest:
            lowest = r.loss
            steps.append((epochs, lowest))
    if steps:
        x, y = zip(*steps, (epochs, lowest), strict=True)
        axis.step(x, y, where="post", color=INK, lw=1.6, zorder=4)
    axis.set(xlabel="epochs trained in all trials", ylabel="validation loss")
    if steps or any(math.isfinite(r.loss) for r in records):
        axis.set_yscale("log")
    else:
        note(axis, "No trial has reported a loss yet.")
    for state in [s for s in COLOURS if any(r.state == s for r in records)]:
        axis.plot([], [], "o", ms=5, mfc=COLOURS[state], mec="white", label=state)
    axis.plot([], [], color=INK, lw=1.6, label="best complete trial so far")
    axis.legend(frameon=False, fontsize=9)
    return figure


def importance(space: Space, records: list[Record]) -> Figure:
    """Draw the permutation importance of each searched hyperparameter, see `importances`."""
    names = list(space.searched)
    figure, [[axis]] = panels("Importance of the searched hyperparameters", (7.2, 1.6 + 0.36 * len(names)))
    found = importances(space, records)
    if found is None:
        note(axis, f"Needs {MIN_TRIALS} finished trials with different losses.")
        axis.set(xticks=[], yticks=[])
        return figure
    means, spreads, score = found
    order = np.argsort(means)
    axis.barh(
        [names[i] for i in order], np.maximum(means[order], 0), xerr=spreads[order], color=ACCENT, height=0.6,
        error_kw={"ecolor": MUTED, "lw": 1},
    )  # fmt: skip
    axis.set(xlabel="drop of R² when the hyperparameter is shuffled")
    axis.set_title(f"out-of-bag R² of the forest: {score:.2f}", color=MUTED)
    axis.tick_params(axis="y", labelcolor=INK)
    return figure


def importances(
    space: Space, records: list[Record]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float] | None:
    """Return the permutation importance (Breiman 2001) of the searched hyperparameters.

    A random forest predicts the rank of a trial's loss from its configuration and its epochs. Epochs are an
    input so that pruned trials count. Ranks are predicted, because one diverged loss would dominate the rest.

    Returns:
        Mean drop of R^2 when a hyperparameter is shuffled, shape (searched,); its standard deviation over
        shuffles, shape (searched,); the out-of-bag R^2. None if there are too few trials.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    done = [r for r in records if r.losses and r.state in ("complete", "pruned")]
    if len(done) < MIN_TRIALS or len({r.loss for r in done}) < 2:
        return None
    x = np.array([[*_coordinates(space, r.config), r.epoch] for r in done])
    y = np.argsort(np.argsort([r.loss for r in done])) / (len(done) - 1)
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=0).fit(x, y)
    found = permutation_importance(forest, x, y, n_repeats=REPEATS, random_state=0)
    return found.importances_mean[:-1], found.importances_std[:-1], float(forest.oob_score_)


def configurations(space: Space, records: list[Record]) -> Figure:
    """Draw each trial as a line through its searched hyperparameters; darker is better."""
    names = list(space.searched)
    figure, [[axis]] = panels("Configurations", (max(7.0, 1.35 * (len(names) + 1)), 4.6))
    shown = sorted((r for r in records if math.isfinite(r.loss)), key=lambda r: -r.loss)
    chosen = best(records)
    ranks = np.linspace(0, 1, max(2, len(shown)))
    for rank, r in zip(ranks, shown, strict=False):
        y = [*_coordinates(space, r.config), 1 - rank]
        is_best = chosen is not None and r.number == chosen.number
        colour = ACCENT if is_best else colormaps["Greys"](0.15 + 0.6 * rank)
        width, level = (2.6, 9.0) if is_best else (0.8, 2 + rank)
        axis.plot(range(len(y)), y, color=colour, lw=width, zorder=level)
    for n, name in enumerate(names):
        axis.axvline(n, color=RULE, lw=1, zorder=1)
        for at, label in _marks(space[name]):
            axis.text(n + 0.04, at, label, fontsize=8, color=MUTED, va="center", zorder=10, bbox=BOX)
    axis.axvline(len(names), color=RULE, lw=1, zorder=1)
    axis.set_xticks(range(len(names) + 1), [*names, "rank of\nthe loss"], color=INK)
    axis.set(ylim=(INACTIVE - 0.08, 1.06), yticks=[], xlim=(-0.1, len(names) + 0.5))
    axis.text(-0.08, INACTIVE, "inactive", fontsize=7.5, color=MUTED, va="center", ha="right")
    axis.spines[["left", "bottom"]].set_visible(False)
    if not shown:
        note(axis, "No trial has reported a loss yet.")
    return figure


def online(space: Space, records: list[Record]) -> Figure:
    """Draw the tuned hyperparameters of the best trial over its epochs, in front of the other trials."""
    chosen = best(records)
    names = list({**chosen.starts, **chosen.online}) if chosen else []
    size = (max(6.4, 3.3 * len(names)), 3.5)
    figure, [axes] = panels("Tuned during the best trial", size, columns=max(1, len(names)))
    if chosen is None or not names:
        note(axes[0], "No hyperparameter was tuned during the trials.")
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
    """Return epochs and values; a hyperparameter with several entries gives their mean."""
    points = [(e, values[name]) for e, values in [(0, record.starts), *record.trajectory] if name in values]
    return [epoch for epoch, _ in points], [float(np.mean(value)) for _, value in points]


def _coordinates(space: Space, config: Config) -> list[float]:
    return [
        _coordinate(spec, config[name]) if name in config else INACTIVE
        for name, spec in space.searched.items()
    ]


def _coordinate(spec: Spec, value: Any) -> float:
    if isinstance(spec, Categorical):
        return spec.choices.index(value) / max(1, len(spec.choices) - 1)
    return unit(spec, value)


def _marks(spec: Spec) -> list[tuple[float, str]]:
    if isinstance(spec, Categorical):
        return [(_coordinate(spec, choice), str(choice)) for choice in spec.choices]
    return [(0.0, f"{spec.low:g}"), (1.0, f"{spec.high:g}")]
