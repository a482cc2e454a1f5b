"""One page about a search, made from its stored trials alone."""

import base64
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from rich.table import Table

from midflight._reporting.figures import replace_file, save
from midflight.search.figures import all_figures
from midflight.search.ledger import Declaration, Record, best
from midflight.search.space import Config

MOST = 200  # trials listed on the page, the best first
CAPTIONS = {
    "history": (
        "What the search cost, and what it found",
        "Each mark is a trial; across, the epochs trained in it and in all before it. The line is the best "
        "validation loss among those trained to the end.",
    ),
    "importance": (
        "What mattered",
        "A random forest predicts the rank of a trial from its configuration and its length; the bars say "
        "how much it loses when the values of one hyperparameter are shuffled, with the standard deviation "
        "over shuffles. Only what was searched is here; what was tuned inside the trials is not.",
    ),
    "configurations": (
        "Every configuration",
        "Each line is a trial, the darker the better, the blue one the best. A hyperparameter that a "
        "configuration does not have passes below its axis.",
    ),
    "online": (
        "Tuned while it trained",
        "Each panel is a hyperparameter that no engine searched: it starts at the hollow mark and was moved "
        "by its hypergradient during the best trial. Grey: the other trials.",
    ),
}


def write_report(name: str, declaration: Declaration, records: list[Record], folder: Path) -> Path:
    """Write the figures (PNG and SVG) and report.html of a search; returns the path of the page."""
    svgs = [p for p in save(all_figures(declaration.space, records), folder) if p.suffix == ".svg"]
    numbers = summary(declaration, records)
    chosen = best(records)
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("midflight.search", "."), PackageLoader("midflight.study", ".")]
        ),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    order = sorted(records, key=lambda r: (r.state != "complete", -r.epoch, _key(r.loss), r.number))
    page = environment.get_template("search.html.j2").render(
        name=name,
        declaration=declaration,
        numbers=numbers,
        headline=headline(records),
        best=chosen,
        rows=[
            (key, value_text(value), value_text(chosen.starts[key]) if key in chosen.starts else "")
            for key, value in chosen.params.items()
        ]
        if chosen
        else [],
        trials=[(r, config_text(r.config), config_text(r.online), loss_text(r.loss)) for r in order[:MOST]],
        hidden=max(0, len(records) - MOST),
        figures=[
            (svg.stem, *CAPTIONS[svg.stem],
             "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode())
            for svg in svgs
        ],
    )  # fmt: skip
    path = folder / "report.html"
    replace_file(path, page.encode())
    return path


def as_json(name: str, declaration: Declaration, records: list[Record]) -> str:
    """The search and its trials for machines; null for a loss that is not finite."""
    chosen = best(records)
    whole = {
        "study": name,
        **vars(declaration),
        "space": json.loads(declaration.space.to_json()),
        "summary": summary(declaration, records),
        "best": chosen and chosen.number,
        "trials": [{**asdict(r), "losses": {str(e): x for e, x in r.losses.items()}} for r in records],
    }
    return json.dumps(_finite(whole), indent=2, allow_nan=False)


def summary(declaration: Declaration, records: list[Record]) -> dict[str, Any]:
    """Counts: trials by state, epochs trained, and those that were found in checkpoints instead."""
    states = ("complete", "pruned", "failed", "unfinished")
    return {
        "trials": len(records),
        **{state: sum(r.state == state for r in records) for state in states},
        "epochs_trained": sum(r.epoch - r.from_epoch for r in records),
        "epochs_continued": sum(r.from_epoch for r in records),
        "engines": sorted({r.engine for r in records if r.engine}),
    }


def headline(records: list[Record]) -> str:
    """One sentence on the best trial."""
    chosen = best(records)
    if chosen is None:
        return "No trial has reported a loss yet."
    extra = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in chosen.extra.items())
    return f"Validation loss {chosen.loss:.4g}{extra}: {config_text(chosen.config)} (trial {chosen.number})."


def summary_table(records: list[Record], most: int = 5) -> Table:
    """The best trials for the terminal."""
    table = Table(title=f"{len(records)} trials, the best first")
    for column in ("trial", "configuration", "tuned inside"):
        table.add_column(column)
    for column in ("epochs", "loss", "beside"):
        table.add_column(column, justify="right")
    done = [r for r in records if r.state == "complete"] or [r for r in records if r.losses]
    for r in sorted(done, key=lambda r: (-r.epoch, _key(r.loss)))[:most]:
        beside = ", ".join(f"{name} {value:.4g}" for name, value in r.extra.items())
        table.add_row(
            str(r.number),
            config_text(r.config),
            config_text(r.online),
            str(r.epoch),
            loss_text(r.loss),
            beside,
        )
    return table


def config_text(config: Config) -> str:
    """layers 2 · optimizer adam · lr 0.003"""
    return " · ".join(f"{name} {value_text(value)}" for name, value in config.items()) or "–"  # noqa: RUF001


def value_text(value: Any) -> str:
    """A number to three digits; of a list, its mean; anything else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        flat = _flat(value)
        return f"mean {sum(flat) / len(flat):.3g} of {len(flat)}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def loss_text(loss: float) -> str:
    """The loss to four digits; a dash if there is none."""
    return f"{loss:.4g}" if math.isfinite(loss) else "–" if math.isnan(loss) else "diverged"  # noqa: RUF001


def _flat(value: Any) -> list[float]:
    return [x for part in value for x in _flat(part)] if isinstance(value, list) else [float(value)]


def _key(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
