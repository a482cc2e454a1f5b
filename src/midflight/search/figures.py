"""Draw the figures of a search from its stored trials.

Optuna's own figures leave out trials that ended early and set a style for the whole process, so they do not
replace these; its importances do.
"""

import math
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from midflight._reporting.figures import INK, MUTED, RULE, WORSE, note, panels, style
from midflight.search.jobs import distribution
from midflight.search.ledger import Record, best
from midflight.search.space import Space
from midflight.space import Categorical, Float

ACCENT = "#0072b2"
COLOURS = {"complete": ACCENT, "pruned": "#8d97a5", "unfinished": "#c9ced6", "failed": WORSE}
MIN_TRIALS = 12  # finished trials that the importance needs
COLUMNS, LABEL = 4, 24  # panels in a row; longest text of a tick
MOST_LINES = 200  # trials behind the best one


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
    epochs = np.cumsum([r.epoch - r.from_epoch for r in records])
    complete = [r.loss if r.state == "complete" else math.nan for r in records]
    _marks(axis, records, [float(x) for x in epochs])
    lowest = np.fmin.accumulate(np.array(complete))  # passes over NaN
    known = np.isfinite(lowest)
    axis.step(
        epochs[known], lowest[known], where="post", color=INK, lw=1.6, label="best complete trial so far"
    )
    axis.set(xlabel="epochs trained in all trials", ylabel="validation loss")
    axis.legend(frameon=False, fontsize=9)
    return figure


def importance(space: Space, records: list[Record]) -> Figure:
    """Draw the importance of each searched hyperparameter by Optuna's PED-ANOVA (Watanabe et al. 2023)."""
    figure, [[axis]] = panels("Importance of the searched hyperparameters", (7.2, 1.6 + 0.36 * len(space)))
    done = [r for r in records if math.isfinite(r.loss) and r.state in ("complete", "pruned")]
    if len(done) < MIN_TRIALS or len({r.loss for r in done}) < 2:
        note(axis, f"Needs {MIN_TRIALS} finished trials with different losses.")
        axis.set(xticks=[], yticks=[])
        return figure
    kinds = {name: distribution(spec) for name, spec in space.searched.items()}
    study = optuna.create_study()
    study.add_trials(
        optuna.create_trial(
            value=r.loss, params=r.config, distributions={name: kinds[name] for name in r.config}
        )
        for r in done
    )
    found = optuna.importance.get_param_importances(study)
    names = sorted(found, key=lambda name: found[name])
    axis.barh([_label(name) for name in names], [found[n] for n in names], color=ACCENT, height=0.6)
    axis.set(xlabel="share of the importance")
    axis.tick_params(axis="y", labelcolor=INK)
    return figure


def configurations(space: Space, records: list[Record]) -> Figure:
    """Draw the loss of each trial against each searched hyperparameter that is active in it."""
    names = list(space.searched)
    columns, rows = min(COLUMNS, len(names)), math.ceil(len(names) / COLUMNS)
    size = (3.3 * columns, 0.6 + 2.6 * rows)
    figure, axes = panels("Configurations", size, rows, columns, sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        spec = space[name]
        active = [r for r in records if name in r.config]
        if isinstance(spec, Categorical):
            x = [float(spec.choices.index(r.config[name])) for r in active]
            axis.set_xticks(range(len(spec.choices)), [_label(choice) for choice in spec.choices])
            axis.set_xlim(-0.5, len(spec.choices) - 0.5)
        else:
            x = [float(r.config[name]) for r in active]
            axis.set_xscale("log" if spec.log else "linear")
        _marks(axis, active, x)
        axis.set_title(_label(name))
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
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
        for r in records[-MOST_LINES:]:
            if r.trajectory and name in r.online and r.number != chosen.number:
                axis.plot(*_path(r, name), color=RULE, lw=0.8, zorder=1)
        x, y = _path(chosen, name)
        axis.plot(x, y, color=ACCENT, lw=2, zorder=3)
        axis.plot(x[0], y[0], "o", mfc="white", mec=ACCENT, zorder=4, clip_on=False)
        axis.plot(x[-1], y[-1], "o", color=ACCENT, zorder=4, clip_on=False)
        title = f"{_label(name)}: {y[0]:.3g} to {y[-1]:.3g}"
        axis.set(title=title, xlabel="epoch", ylim=(spec.low, spec.high))
        axis.set_yscale("log" if spec.log else "logit" if spec.logit else "linear")
        if spec.logit:
            axis.minorticks_off()
    return figure


def _marks(axis: Axes, records: list[Record], places: list[float]) -> None:
    """Draw a mark for the loss of each trial, coloured by its state; say so if there is none."""
    found = [(r, at) for r, at in zip(records, places, strict=True) if math.isfinite(r.loss)]
    for state, colour in COLOURS.items():
        points = [(at, r.loss) for r, at in found if r.state == state]
        if points:
            x, y = zip(*points, strict=True)
            look: dict[str, Any] = {"edgecolors": "white", "lw": 0.6, "zorder": 3, "rasterized": True}
            axis.scatter(x, y, s=25, c=colour, label=state, **look)
    if found and all(r.loss > 0 for r, _ in found):
        axis.set_yscale("log")
    elif not found:
        note(axis, "No trial has reported a loss yet.")
    axis.tick_params(labelcolor=MUTED)


def _path(record: Record, name: str) -> tuple[list[int], list[float]]:
    """Return epochs and values; a hyperparameter with several entries gives their mean."""
    points = [(e, values[name]) for e, values in [(0, record.starts), *record.trajectory] if name in values]
    return [epoch for epoch, _ in points], [float(np.mean(value)) for _, value in points]


def _label(value: Any) -> str:
    """Return a short text that matplotlib does not read as mathematics."""
    text = " ".join(str(value).split())
    return (text if len(text) <= LABEL else text[: LABEL - 3] + "...").replace("$", r"\$")
