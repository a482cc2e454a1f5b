"""Write a page about a search from its stored trials."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from midflight._reporting.figures import save
from midflight._reporting.page import data_uri, write_page
from midflight.search.figures import all_figures
from midflight.search.ledger import Declaration, Record, best
from midflight.search.space import Config

MAX_TRIALS = 200  # trials listed on the page, the best first
CAPTIONS = {
    "history": (
        "Loss over the search",
        "Each mark is a trial. Horizontal axis: epochs trained in it and all earlier trials. The line is the "
        "best validation loss of the complete trials so far.",
    ),
    "importance": (
        "Importance of the searched hyperparameters",
        "How much a hyperparameter decides whether a trial is among the best, by Optuna's PED-ANOVA on all "
        "complete and stopped trials. Hyperparameters tuned during the trials are not included.",
    ),
    "configurations": (
        "Every configuration",
        "Each mark is a trial, in the panel of each hyperparameter that is active in it, at its last loss.",
    ),
    "online": (
        "Tuned during training",
        "Each panel is a hyperparameter that was tuned by its hypergradient during the best trial, from its "
        "start (hollow) to its end (filled). Grey: other trials.",
    ),
}


def write_report(name: str, declaration: Declaration, records: list[Record], folder: Path) -> Path:
    """Write the figures (PNG and SVG) and report.html of a search; return the path of the page."""
    svgs = [p for p in save(all_figures(declaration.space, records), folder) if p.suffix == ".svg"]
    order = sorted(records, key=lambda r: (r.state != "complete", -r.epoch, _key(r.loss), r.number))
    path = folder / "report.html"
    write_page(
        path,
        "midflight.search",
        "search.html.j2",
        {"value": value_text, "config": config_text, "loss": loss_text},
        name=name,
        declaration=declaration,
        numbers=summary(declaration, records),
        headline=headline(records),
        best=best(records),
        trials=order[:MAX_TRIALS],
        hidden=max(0, len(records) - MAX_TRIALS),
        figures=[(svg.stem, *CAPTIONS[svg.stem], data_uri(svg)) for svg in svgs],
    )
    return path


def as_json(name: str, declaration: Declaration, records: list[Record]) -> str:
    """Return the search and its trials as JSON; null for a loss that is not finite."""
    chosen = best(records)
    whole = {
        "study": name,
        **vars(declaration),
        "space": json.loads(declaration.space.to_json()),
        "summary": summary(declaration, records),
        "best": chosen and chosen.number,
        "trials": [asdict(r) for r in records],
    }
    return json.dumps(json.loads(json.dumps(whole), parse_constant=lambda infinite: None), indent=2)


def summary(declaration: Declaration, records: list[Record]) -> dict[str, Any]:
    """Count trials by state, trained epochs, and epochs continued from checkpoints."""
    states = ("complete", "pruned", "failed", "unfinished")
    return {
        "trials": len(records),
        **{state: sum(r.state == state for r in records) for state in states},
        "epochs_trained": sum(r.epoch - r.from_epoch for r in records),
        "epochs_continued": sum(r.from_epoch for r in records),
        "engines": sorted({r.engine for r in records if r.engine}),
    }


def headline(records: list[Record]) -> str:
    """Return one sentence on the best trial."""
    chosen = best(records)
    if chosen is None:
        return "No trial has reported a loss yet."
    extra = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in chosen.extra.items())
    return f"Validation loss {chosen.loss:.4g}{extra}: {config_text(chosen.config)} (trial {chosen.number})."


def summary_table(records: list[Record], most: int = 5) -> Table:
    """Return a table of the best trials for the terminal."""
    done = [r for r in records if r.state == "complete"] or [r for r in records if r.losses]
    order = sorted(done, key=lambda r: (-r.epoch, _key(r.loss)))
    shown = order[:most]
    return trials_table(f"The best {len(shown)} of {len(records)} trials", shown, best(records))


def trials_table(title: str, records: list[Record], chosen: Record | None) -> Table:
    """Return a table of these trials for the terminal; the chosen one is bold."""
    table = Table(title=title)
    for column in ("trial", "configuration", "tuned values", "epochs", "loss", "state", "other numbers"):
        table.add_column(column, justify="right" if column in ("trial", "epochs", "loss") else "left")
    for r in records:
        is_best = chosen is not None and r.number == chosen.number
        state = ("running" if r.state == "unfinished" else r.state) + ", best" * is_best
        extra = ", ".join(f"{name} {value:.4g}" for name, value in r.extra.items())
        cells = (f"{r.number}", config_text(r.config), config_text(r.online), f"{r.epoch}", loss_text(r.loss))
        # a Text shows brackets, which a string would turn into markup
        table.add_row(*map(Text, (*cells, state, extra)), style="bold" if is_best else None)
    return table


def config_text(config: Config) -> str:
    """Return a text such as: layers 2, optimizer adam, lr 0.003."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in config.items()) or "-"


def value_text(value: Any) -> str:
    """Format a number to three digits, a list by its mean, a boolean as yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return f"mean {np.mean(value):.3g} of {np.size(value)}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def loss_text(loss: float) -> str:
    """Format a loss to four digits; a dash if there is none."""
    return f"{loss:.4g}" if math.isfinite(loss) else "-" if math.isnan(loss) else "diverged"


def _key(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
