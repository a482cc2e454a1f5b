"""Write a page that compares each statement of the paper with this study's measurement.

Every number comes from `summarise`; this file only formats. The page is one file without scripts.
"""

import html
import json
import re
import shlex
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from markupsafe import Markup
from rich.table import Table

from midflight._reporting.figures import save
from midflight._reporting.page import data_uri, write_page
from midflight.study.figures import DATASET_NAMES, all_figures, by
from midflight.study.spec import DEFAULT, PRESETS, Spec
from midflight.study.store import Store
from midflight.study.summary import NEAR_LOW_END, POOR, estimators, main_estimator, reference, summarise

Numbers: TypeAlias = dict[str, Any]
"""`summarise`, or a part of it."""

NONE = "–"  # noqa: RUF001 - a typographic dash marks a missing number

_CAPTIONS = {
    "fig1": (
        "Where tuning moves",
        "Each line is one training run, from its random start (hollow) to the end of tuning (filled). The "
        "background is the validation error of runs with fixed hyperparameters; lighter is better. Good "
        "tuning ends in a light area from any start. All background runs share one seed.",
    ),
    "fig2": (
        "Before and after",
        "Each mark is one start. Horizontal axis: test error with the hyperparameters fixed at the start. "
        "Vertical axis: test error with the hyperparameters tuned during training. Tuning helped below the "
        "diagonal and harmed above it (crosses).",
    ),
    "fig3": (
        "End of tuning and re-run",
        "Each mark is one start. Horizontal axis: test error of a fresh training fixed at the tuned values. "
        "Vertical axis: test error at the end of tuning. The band is one standard error of a test error; "
        "filled marks lie inside. Above the band, a fresh training pays off.",
    ),
    "fig4": (
        "Time per epoch",
        "Left: mean seconds of training per epoch, one dot per start; the line is the median. Right: time "
        "that tuning adds to the initial run of the same start; the diamond is the median, the bar spans "
        "the quartiles. On a GPU the first epoch is excluded, because torch compiles in it.",
    ),
    "fig5": (
        "Eq. 6 against the other estimator",
        "Left: test error at the end of tuning with each estimator, one mark per start. Middle and right: "
        "the noise of these starts during tuning, and its median. If an estimate carries a signal, lines "
        "from different starts approach each other.",
    ),
}

_TEXT_AND_NOTEBOOK = (
    ("The noise in the validation pass", "off", "stays on"),
    ("The last layer", "gives logits", "a ReLU on the logits"),
    ("The gradient of the L2 exponent", "with its factor ln(10)·10^λ", "without it"),
    ("A noise gradient of 0", "no step", "a random step"),
    (
        "The “optimized” arm of Fig. 3",
        "a fresh model with the tuned values",
        "a fresh model with the initial values",
    ),
    ("Intervals of the starts", "L2 10^−5.5 to 10^−2.5, noise 0 to 0.8", "L2 10^−5 to 10^−1, noise 0 to 0.9"),  # noqa: RUF001
)


def write_report(store: Store, run: str, folder: Path, checks: list[dict[str, Any]] | None = None) -> Path:
    """Write the figures (PNG and SVG) and report.html of a run; the page says if the run is incomplete.

    Args:
        run: name of the run in the store.
        folder: output folder; created if missing.
        checks: the table of `midflight check`, one dict per line; None omits the section.

    Returns:
        The path of report.html.

    Raises:
        UnknownName: the store has no such run.
    """
    spec, rows = store.spec(run), store.rows(run)
    svgs = [p for p in save(all_figures(spec, rows), folder) if p.suffix == ".svg"]
    summary = summarise(spec, rows)
    path = folder / "report.html"
    write_page(
        path,
        "midflight.study",
        "report.html.j2",
        {"sup": _superscripts, "typeset": _typeset},
        run=run,
        machine=store.machine(run),
        spec=spec,
        dataset=DATASET_NAMES[spec.dataset],
        summary=summary,
        headline=_headline(summary, main_estimator(spec)),
        others=[e for e in estimators(spec) if e != DEFAULT],
        choices=_choices(spec),
        networks=[_network(summary, network) for network in summary["networks"]],
        worse=_made_worse(summary),
        estimators=estimators(spec),
        reference=reference(spec),
        figures=[(svg.stem, *_CAPTIONS[svg.stem], data_uri(svg)) for svg in svgs],
        checks=_check_table(checks) if checks else None,
        cosines=_paper_cosines(checks or []),
        differences=_TEXT_AND_NOTEBOOK,
        commands=_commands(spec, run),
    )
    return path


def as_json(store: Store, run: str) -> str:
    """Return the spec and every number of the report as JSON; null where rows are missing.

    Raises:
        UnknownName: the store has no such run.
    """
    spec = store.spec(run)
    whole = {
        "run": run,
        "machine": store.machine(run),
        "spec": asdict(spec),
        "summary": summarise(spec, store.rows(run)),
    }
    return json.dumps(whole, indent=2, allow_nan=False)


def summary_table(summary: Numbers) -> Table:
    """Return the table of a study for the terminal: one line per network and arm."""
    state = "" if summary["complete"] else ", incomplete"
    table = Table(title=f"{summary['arms_done']} of {summary['arms_planned']} arms{state}")
    table.add_column("network")
    table.add_column("arm")
    for column in (
        "done",
        "test error %\nmedian",
        "\nquartiles",
        "starts\nrescued",
        "made\nworse",
        "added\ntime",
    ):
        table.add_column(column, justify="right")
    for network in summary["networks"]:
        for arm in network["arms"]:
            line = _arm_line(network, arm)
            if arm["kind"] != "landscape":
                cells = ("name", "done", "median", "quartiles", "rescued", "worse", "overhead")
                table.add_row(network["network"], *(line[cell] for cell in cells))
        table.add_section()
    return table


def _network(summary: Numbers, network: Numbers) -> Numbers:
    return {
        "name": network["network"],
        "arms": [_arm_line(network, arm) for arm in network["arms"]],
        "statements": _statements(summary, network),
        "comparisons": [_comparison(c) for c in network["comparisons"] if c["pairs"]],
        "tunings": network["tunings"],
    }


def _superscripts(text: str) -> Markup:
    """Turn 10^−5.5 into a superscript; escape everything else."""
    return Markup(re.sub(r"\^([−λ\d.]*[λ\d])", r"<sup>\1</sup>", html.escape(text)))  # noqa: RUF001


def _headline(summary: Numbers, estimator: str) -> str:
    """Return one sentence on one estimator and the first network."""
    network = summary["networks"][0]
    tuning = next(t for t in network["tunings"] if t["estimator"] == estimator)
    before, after = tuning["initial_test_error_percent"], tuning["tuned_test_error_percent"]
    if before is None or after is None:
        return "No start has both an initial and a tuned arm yet, so there is nothing to compare."
    change = (
        f"Tuning {by(estimator)} while training took the median test error of "
        f"{_starts(tuning['pairs'])} from {before['median']:.2f} % to {after['median']:.2f} %"
    )
    cost = _signed_percent(tuning["overhead_percent"])
    time = f", at {cost} time per epoch" if cost != NONE else ""
    worse = f"; it made {_starts(tuning['better'])} better and {tuning['worse']} worse"
    where = f" ({network['network']})" if len(summary["networks"]) > 1 else ""
    return _typeset(f"{change}{where}{time}{worse}.")


def _made_worse(summary: Numbers) -> list[str]:
    several = len(summary["networks"]) > 1
    return [
        f"{t['estimator']}{' on ' + network['network'] if several else ''}: "
        f"{t['worse']} of {t['pairs']} starts made worse"
        f"{_of_them(t['worse'], t['worse_beyond_sampling_error'])}"
        for network in summary["networks"]
        for t in network["tunings"]
        if t["pairs"]
    ]


def _of_them(count: int, beyond: int) -> str:
    return f", {beyond} of them by more than one standard error of a test error" if count else ""


def _arm_line(network: Numbers, arm: Numbers) -> dict[str, str]:
    kind, estimator = arm["kind"], arm["estimator"]
    name = {"initial": "initial", "rerun": "re-run", "landscape": "landscape"}.get(kind, "tuned")
    tuning = next((t for t in network["tunings"] if kind == "tuned" and t["estimator"] == estimator), None)
    errors, best = arm["test_error_percent"], arm["best"]
    paired = tuning is not None and tuning["pairs"]
    return {
        "kind": kind,
        "name": f"{name}, {estimator}" if estimator else name,
        "done": f"{arm['done']} of {arm['planned']}",
        "missing": "yes" if arm["done"] < arm["planned"] else "",
        "median": f"{errors['median']:.2f}" if errors else NONE,
        "quartiles": _quartiles(errors),
        "extremes": f"{errors['minimum']:.2f} to {errors['maximum']:.2f}" if errors else NONE,
        "kept": f"{best['test_error_percent']:.2f}"
        if best and best["test_error_percent"] is not None
        else NONE,
        "rescued": f"{tuning['rescued']} of {tuning['pairs']}" if tuning and paired else "",
        "worse": f"{tuning['worse']} of {tuning['pairs']}" if tuning and paired else "",
        "overhead": _signed_percent(tuning["overhead_percent"]) if tuning else "",
        "seconds": f"{arm['epoch_seconds']['median']:.3g}" if arm["epoch_seconds"] else NONE,
    }


class _Statement(NamedTuple):
    """A statement of the paper, with (value, details) of each estimator and how the value is defined."""

    statement: str
    paper: str
    measured: list[tuple[str, str]]
    definition: str


def _statements(summary: Numbers, network: Numbers) -> list[_Statement]:  # one table, so one long function
    paper, tunings = summary["paper"], network["tunings"]
    tuned = [a["test_error_percent"] for a in network["arms"] if a["kind"] == "tuned"]
    poor = network["poor_above_test_error_percent"]
    low, high = paper["good_starts_end_at_test_error_percent"]
    good = paper["good_starts_below_test_error_percent"]
    here = f" ({poor:.2f} % here)" if poor is not None else ""
    return [
        _Statement(
            "Test error after tuning",
            f"about {paper['tuned_test_error_percent']:g} %",
            [_median(e, ".2f", " %") for e in tuned],
            "Median over the tuned runs.",
        ),
        _Statement(
            "Starts rescued",
            f"{paper['rescued_percent_of_starts']:g} %",
            [
                _share(
                    t["rescued_percent_of_starts"],
                    t["rescued"],
                    t["pairs"],
                    f"; {t['poor_starts']} were poor",
                )
                for t in tunings
            ],
            f"A start is poor if its initial run exceeds {POOR:g} times the lowest test error of all fixed "
            f"runs of this network{here}. It is rescued if its tuned run does not. Share of all starts. "
            "The threshold is ours.",
        ),
        _Statement(
            "Runs on the diagonal of Fig. 3",
            f"{paper['on_diagonal_percent']:g} %",
            [_share(t["on_diagonal_percent"], t["on_diagonal"], t["reruns"]) for t in tunings],
            "The test errors at the end of tuning and of the re-run differ by at most one standard error, "
            f"√(p(1−p)/{summary['test_images']:,}), where p is their mean. The threshold is ours.",  # noqa: RUF001
        ),
        _Statement(
            "End of tuning against re-run",
            "compared in Fig. 3",
            [_median(t["tuned_minus_rerun_points"], "+.2f") for t in tunings],
            "Test error at the end of tuning minus that of a fresh run fixed at the tuned values, start by "
            "start, in percentage points. Below 0, the end of tuning is better.",
        ),
        _Statement(
            "Time that tuning adds",
            f"{paper['overhead_percent']:+.2f} %",
            [_median(t["overhead_percent"], "+.1f", " %") for t in tunings],
            "Mean epoch time of the tuned run over that of the initial run of the same start, minus 1. "
            "Median over starts.",
        ),
        _Statement(
            "The noise goes to 0",
            "every start of Fig. 1",
            [_noise_at_low_end(t) for t in tunings],
            f"Tuned runs whose noise ends in the lowest {100 * NEAR_LOW_END:g} % of its interval.",
        ),
        _Statement(
            "Starts that tuning made worse",
            f"good starts, under {good:g} %, end at {low:g} to {high:g} %",
            [
                (f"{t['worse']} of {t['pairs']}", _about_worse(t, good)) if t["pairs"] else (NONE, "")
                for t in tunings
            ],
            "Starts with a higher test error after tuning.",
        ),
    ]


def _noise_at_low_end(tuning: Numbers) -> tuple[str, str]:
    end = tuning["noise_end"]
    count, more = (end["count"], f"; median {end['median']:.2f}") if end else (0, "")
    return _share(tuning["noise_at_low_end_percent"], tuning["noise_at_low_end"], count, more)


def _about_worse(tuning: Numbers, good: float) -> str:
    ends = tuning["good_starts_tuned_test_error_percent"]
    beyond = f"{tuning['worse_beyond_sampling_error']} beyond one standard error"
    if not ends:
        return f"{beyond}; no start was under {good:g} %"
    span = f"{ends['minimum']:.2f} to {ends['maximum']:.2f} %"
    return f"{beyond}; the {tuning['good_starts']} under {good:g} % end at {span}"


def _comparison(c: Numbers) -> str:
    spread = c["difference_points"]
    return _typeset(
        f"Over {_starts(c['pairs'])}, the test error of {c['estimator']} minus that of {c['other']} is "
        f"{spread['median']:+.2f} points in the median (quartiles {spread['quartile_low']:+.2f} to "
        f"{spread['quartile_high']:+.2f}); it is lower in {c['lower']}, higher in {c['higher']}."
    )


def _share(percent: float | None, part: int, whole: int, more: str = "") -> tuple[str, str]:
    return (NONE, "") if percent is None else (f"{percent:.0f} %", f"{part} of {whole}{more}")


def _median(spread: Numbers | None, form: str, unit: str = "") -> tuple[str, str]:
    if spread is None:
        return NONE, ""
    return _typeset(f"{spread['median']:{form}}{unit}"), f"quartiles {_quartiles(spread, form)}"


def _quartiles(spread: Numbers | None, form: str = ".2f") -> str:
    if spread is None:
        return NONE
    return _typeset(f"{spread['quartile_low']:{form}} to {spread['quartile_high']:{form}}")


def _signed_percent(spread: Numbers | None) -> str:
    return _median(spread, "+.1f", " %")[0]


def _typeset(text: str) -> str:
    """Set minus signs before digits and no-break spaces before %."""
    return re.sub(r"(?<!\w)-(?=[\d.])", "−", text).replace(" %", "\N{NO-BREAK SPACE}%")  # noqa: RUF001


def _starts(count: int) -> str:
    return f"{count} start" if count == 1 else f"{count} starts"


def _choices(spec: Spec) -> list[tuple[str, str, str]]:
    """Return (field, this study, preset "paper") of every setting."""
    paper = PRESETS["paper"]
    return [(f.name, _as_text(getattr(spec, f.name)), _as_text(getattr(paper, f.name))) for f in fields(Spec)]


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple) and all(isinstance(v, float) for v in value):
        return _typeset(" to ".join(f"{v:g}" for v in value))
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
    )


def _commands(spec: Spec, run: str) -> list[str]:
    """Return the commands that repeat the study and its report, from the closest preset."""
    name, changed = min(
        (
            (n, [f.name for f in fields(Spec) if getattr(p, f.name) != getattr(spec, f.name)])
            for n, p in PRESETS.items()
        ),
        key=lambda found: len(found[1]),
    )
    words = ["midflight", "study", name]
    for field in changed:
        value = getattr(spec, field)
        option = field.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    words += ["--run", run]
    return [shlex.join(words), shlex.join(["midflight", "report", run])]


def _check_table(checks: list[Numbers]) -> Numbers:
    """Return the checks with one line per optimiser and hyperparameter, one column per estimator."""
    columns = list(dict.fromkeys(str(c["estimator"]) for c in checks))
    lines: dict[tuple[str, str], dict[str, Numbers]] = {}
    for c in checks:
        lines.setdefault((str(c["rule"]), str(c["hyperparameter"])), {})[str(c["estimator"])] = {
            "error": _scientific(c["relative_error"]),
            "cosine": _signed(c["cosine"]),
            "exact": bool(c.get("exact")),
            "failed": c.get("passed") is False,
        }
    claims = [c for c in checks if c.get("exact")]
    return {
        "estimators": columns,
        "lines": [(*key, [cells.get(e) for e in columns]) for key, cells in lines.items()],
        "worst": _scientific(max(c["relative_error"] for c in claims)) if claims else None,
    }


def _paper_cosines(checks: list[Numbers]) -> list[tuple[str, str]]:
    return [
        (str(c["rule"]), _signed(c["cosine"]))
        for c in checks
        if c["estimator"] == "paper" and c["hyperparameter"] == "noise"
    ]


def _signed(value: float) -> str:
    return _typeset(f"{value:.3f}") if isfinite(value) else NONE


def _scientific(value: float) -> str:
    """Format 3.1e-9 as 3.1·10⁻⁹; numbers from 0.01 on stay plain."""
    if not isfinite(value) or value == 0 or abs(value) >= 0.01:
        return f"{value:.2g}" if isfinite(value) else NONE
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}·10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
