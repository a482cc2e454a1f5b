"""Write a page that compares each statement of the paper with this study's measurement.

Every number comes from `summarise`; this file only formats. The page is one file without scripts.
"""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import rich.table
from markupsafe import Markup, escape

from midflight._reporting.figures import save
from midflight._reporting.page import data_uri, write_page
from midflight.study import summary as summaries
from midflight.study.figures import DATASET_NAMES, all_figures, by
from midflight.study.spec import PRESETS, Spec, changed_fields
from midflight.study.store import Row, Store
from midflight.study.summary import Numbers, summarise


class Cell(NamedTuple):
    """Hold a cell of a table: text, small print below it, and a style of the page (strong, failed, ...)."""

    text: str
    small: str = ""
    style: str = ""


class Table(NamedTuple):
    """Hold a table of the page; the first column heads the lines, columns from `numbers` are numeric.

    A text stands for a cell without small print and style.
    """

    head: Iterable[Cell | str]
    lines: Iterable[Sequence[Cell | str]]
    numbers: int = 99
    """Default: no column is numeric."""


MISSING = Cell("–")  # noqa: RUF001 - a typographic dash marks a missing number
TERMINAL_COLUMNS = ("Arm", "Done", "Median", "Quartiles", "Rescued", "Made worse", "Added time")


def write_report(
    store: Store,
    run: str,
    folder: Path,
    checks: list[dict[str, Any]] | None = None,
    rows: list[Row] | None = None,
) -> Path:
    """Write the figures (PNG and SVG) and report.html of a run; the page says if the run is incomplete.

    Args:
        run: name of the run in the store.
        folder: output folder; created if missing.
        checks: the table of `midflight check`, one dict per line; None omits the section.
        rows: the rows of the run if they were read already; reading thousands takes seconds.

    Returns:
        The path of report.html.

    Raises:
        UnknownName: the store has no such run.
    """
    spec, rows = store.spec(run), store.rows(run) if rows is None else rows
    svgs = [p for p in save(all_figures(spec, rows), folder) if p.suffix == ".svg"]
    path = folder / "report.html"
    write_page(
        path,
        "midflight.study",
        "report.html.j2",
        {"typeset": _typeset, "scientific": _scientific, "cosine": _cosine},
        run=run,
        machine=store.machine(run),
        spec=spec,
        dataset=DATASET_NAMES[spec.dataset],
        summary=summarise(spec, rows),
        estimators=spec.estimator,
        main=summaries.main_estimator(spec),
        reference=summaries.reference(spec),
        by=by,
        statements=statements_table,
        arms=arms_table,
        eq6=_eq6,
        figures={svg.stem: data_uri(svg) for svg in svgs},
        checks=checks or [],
        check_table=_check_table(checks or []),
        settings=_settings(spec),
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
        "summary": summaries.as_dict(summarise(spec, store.rows(run))),
    }
    return json.dumps(whole, indent=2, allow_nan=False)


def summary_table(summary: Numbers) -> rich.table.Table:
    """Return the table of a study for the terminal: one line per network and arm."""
    state = "" if summary.complete else ", incomplete"
    table = rich.table.Table(
        title=f"{summary.arms_done} of {summary.arms_planned} arms{state}; test errors in percent"
    )
    for column in ("Network", *TERMINAL_COLUMNS):
        table.add_column(column, justify="left" if column in ("Network", "Arm") else "right")
    for network in summary.networks:
        for arm in network.arms:
            if arm.kind != "landscape":
                line = _arm(network, arm)
                table.add_row(network.network, *(_text(line[column]) for column in TERMINAL_COLUMNS))
        table.add_section()
    return table


def _typeset(text: str) -> Markup:
    """Escape a text; set minus signs, no-break spaces before %, and 10^-5.5 as a superscript."""
    text = re.sub(r"(?<!\w)-(?=[\d.])", "−", str(escape(text))).replace(" %", "\N{NO-BREAK SPACE}%")  # noqa: RUF001
    return Markup(re.sub(r"\^([−λ\d.]*[λ\d])", r"<sup>\1</sup>", text))  # noqa: RUF001


def _text(cell: Cell | str) -> str:
    return cell if isinstance(cell, str) else cell.text


def _arm(network: Numbers, arm: Numbers) -> dict[str, Cell | str]:
    """Return column -> cell of one kind of arm."""
    name = {"rerun": "re-run"}.get(arm.kind, arm.kind) + (f", {arm.estimator}" if arm.estimator else "")
    errors, kept = arm.test_error_percent, arm.best and arm.best.test_error_percent
    cells: dict[str, Cell | str] = {
        "Arm": name,
        "Done": Cell(f"{arm.done} of {arm.planned}", style="failed" if arm.done < arm.planned else ""),
        "Median": Cell(_median(errors), style="strong") if errors else MISSING,
        "Quartiles": _quartiles(errors),
        "Extremes": f"{errors.minimum:.2f} to {errors.maximum:.2f}" if errors else MISSING,
        "Kept": MISSING if kept is None else f"{kept:.2f}",
        "Rescued": "",
        "Made worse": "",
        "s per epoch": _median(arm.epoch_seconds, ".3g"),
        "Added time": "",
    }
    for t in network.tunings:
        if (arm.kind, arm.estimator) == ("tuned", t.estimator):
            cells["Added time"] = _median(t.overhead_percent, "+.1f", " %")
            if t.pairs:
                cells["Rescued"] = f"{t.rescued} of {t.pairs}"
                cells["Made worse"] = f"{t.worse} of {t.pairs}"
    return cells


def arms_table(network: Numbers) -> Table:
    lines = [_arm(network, arm) for arm in network.arms if arm.kind != "landscape"]
    return Table(lines[0], [list(line.values()) for line in lines], numbers=1)


def _eq6(network: Numbers) -> Table:
    """Return where the noise goes with each estimator."""
    end, change = "Noise at the end", "tuned − initial, median points"  # noqa: RUF001
    head = (
        "Tuned by", Cell(end, "median"), Cell(end, "quartiles"), Cell("log₁₀ L2 at the end", "median"),
        Cell("Noise steps down", "share of all"), Cell("Test error", change),
    )  # fmt: skip
    lines = [
        (
            t.estimator,
            _median(t.noise_end),
            _quartiles(t.noise_end),
            _median(t.log10_l2_end),
            MISSING if t.noise_steps_down_percent is None else f"{t.noise_steps_down_percent:.0f} %",
            _median(t.tuned_minus_initial_points, "+.2f"),
        )
        for t in network.tunings
    ]
    return Table(head, lines, numbers=1)


def statements_table(summary: Numbers, network: Numbers) -> Table:  # one table, so one long function
    """Return each statement of the paper with its definition, beside the measurement of each estimator."""
    paper, tunings = summary.paper, network.tunings
    poor, good = network.poor_above_test_error_percent, paper.good_starts_below_test_error_percent
    low, high = paper.good_starts_end_at_test_error_percent
    here = "" if poor is None else f" ({poor:.2f} % here)"
    lines = [
        (
            "Test error after tuning",
            "Median over the tuned runs.",
            f"about {paper.tuned_test_error_percent:g} %",
            [_spread(a.test_error_percent, ".2f", " %") for a in network.arms if a.kind == "tuned"],
        ),
        (
            "Starts rescued",
            f"A start is poor if its initial run exceeds {summaries.POOR:g} times the lowest test error of "
            f"all fixed runs of this network{here}. It is rescued if its tuned run does not. Share of all "
            "starts. The threshold is ours.",
            f"{paper.rescued_percent_of_starts:g} %",
            [
                _share(t.rescued_percent_of_starts, t.rescued, t.pairs, f"; {t.poor_starts} were poor")
                for t in tunings
            ],
        ),
        (
            "Runs on the diagonal of Fig. 3",
            "The test errors at the end of tuning and of the re-run differ by at most one standard error, "
            f"√(p(1−p)/{summary.test_images:,}), where p is their mean. The threshold is ours.",  # noqa: RUF001
            f"{paper.on_diagonal_percent:g} %",
            [_share(t.on_diagonal_percent, t.on_diagonal, t.reruns) for t in tunings],
        ),
        (
            "End of tuning against re-run",
            "Test error at the end of tuning minus that of a fresh run fixed at the tuned values, start by "
            "start, in percentage points. Below 0, the end of tuning is better.",
            "compared in Fig. 3",
            [_spread(t.tuned_minus_rerun_points, "+.2f") for t in tunings],
        ),
        (
            "Time that tuning adds",
            "Mean epoch time of the tuned run over that of the initial run of the same start, minus 1. "
            "Median over starts.",
            f"{paper.overhead_percent:+.2f} %",
            [_spread(t.overhead_percent, "+.1f", " %") for t in tunings],
        ),
        (
            "The noise goes to 0",
            f"Tuned runs whose noise ends in the lowest {100 * summaries.NEAR_LOW_END:g} % of its interval.",
            "every start of Fig. 1",
            [_noise_at_low_end(t) for t in tunings],
        ),
        (
            "Starts that tuning made worse",
            "Starts with a higher test error after tuning.",
            f"good starts, under {good:g} %, end at {low:g} to {high:g} %",
            [_worse(t, good) for t in tunings],
        ),
    ]
    head = ["Statement", "The paper", *(f"Measured, {t.estimator}" for t in tunings)]
    return Table(
        head,
        [
            [Cell(words, definition), paper, *(cell._replace(style="strong") for cell in measured)]
            for words, definition, paper, measured in lines
        ],
    )


def _noise_at_low_end(t: Numbers) -> Cell:
    if t.noise_end is None:
        return MISSING
    more = f"; median {t.noise_end.median:.2f}"
    return _share(t.noise_at_low_end_percent, t.noise_at_low_end, t.noise_end.count, more)


def _worse(t: Numbers, good: float) -> Cell:
    if not t.pairs:
        return MISSING
    ends = t.good_starts_tuned_test_error_percent
    of_good = f"no start was under {good:g} %"
    if ends:
        of_good = f"the {t.good_starts} under {good:g} % end at {ends.minimum:.2f} to {ends.maximum:.2f} %"
    beyond = f"{t.worse_beyond_sampling_error} beyond one standard error"
    return Cell(f"{t.worse} of {t.pairs}", f"{beyond}; {of_good}")


def _share(percent: float | None, part: int, whole: int, more: str = "") -> Cell:
    return MISSING if percent is None else Cell(f"{percent:.0f} %", f"{part} of {whole}{more}")


def _spread(spread: Numbers | None, form: str, unit: str = "") -> Cell:
    return Cell(_median(spread, form, unit), f"quartiles {_quartiles(spread, form)}") if spread else MISSING


def _median(spread: Numbers | None, form: str = ".2f", unit: str = "") -> str:
    return f"{spread.median:{form}}{unit}" if spread else MISSING.text


def _quartiles(spread: Numbers | None, form: str = ".2f") -> str:
    return f"{spread.quartile_low:{form}} to {spread.quartile_high:{form}}" if spread else MISSING.text


def _settings(spec: Spec) -> Table:
    """Return every setting of this study and of the preset "paper"."""
    lines = []
    for f in fields(Spec):
        here, paper = (_as_text(getattr(s, f.name)) for s in (spec, PRESETS["paper"]))
        same = Cell("the same" if paper == here else paper, style="same")
        lines.append((Cell(f.name, style="code"), here, same))
    return Table(("Field", "This study", "Preset “paper”"), lines)


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return (" to " if isinstance(value[0], float) else ", ").join(map(_as_text, value))
    return format(value, "," if isinstance(value, int) else "g" if isinstance(value, float) else "")


def _commands(spec: Spec, run: str) -> list[str]:
    """Return the commands that repeat the study and its report, from the closest preset."""
    name = min(PRESETS, key=lambda name: len(changed_fields(PRESETS[name], spec)))
    words = ["midflight", "study", name]
    for field in changed_fields(PRESETS[name], spec):
        value, option = getattr(spec, field), field.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    return [shlex.join([*words, "--run", run]), shlex.join(["midflight", "report", run])]


def _check_table(checks: list[dict[str, Any]]) -> Table:
    """Return the checks with one line per optimiser and hyperparameter, one column per estimator."""
    names = list(dict.fromkeys(c["estimator"] for c in checks))
    lines: dict[tuple[str, str], dict[str, Cell]] = {}
    for c in checks:
        failed = c.get("passed") is False
        lines.setdefault((c["rule"], c["hyperparameter"]), {})[c["estimator"]] = Cell(
            _scientific(c["relative_error"]) + (", failed" if failed else ""),
            f"cos {_cosine(c['cosine'])}",
            "failed" if failed else "strong" if c.get("exact") else "",
        )
    return Table(
        ("Optimiser", "Hyperparameter", *names),
        [(*key, *(cells.get(name, MISSING) for name in names)) for key, cells in lines.items()],
        numbers=2,
    )


def _cosine(value: float) -> str:
    return f"{value:.3f}" if isfinite(value) else MISSING.text


def _scientific(value: float) -> str:
    """Format 3.1e-9 as 3.1·10^-9; numbers from 0.01 on stay plain."""
    if not isfinite(value):
        return MISSING.text
    digits, exponent = f"{value:.1e}".split("e")
    return f"{value:.2g}" if value == 0 or abs(value) >= 0.01 else f"{digits}·10^{int(exponent)}"
