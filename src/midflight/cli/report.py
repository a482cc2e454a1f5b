"""`midflight report`: write figures and a page from stored results."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from midflight._reporting.files import file_name
from midflight._reporting.text import printable
from midflight.cli import search
from midflight.cli._console import err, out
from midflight.cli.study import DEFAULT_STORE
from midflight.gradcheck.table import as_dicts, run_checks
from midflight.study.report import as_json, summary_table, write_report
from midflight.study.store import Store
from midflight.study.summary import summarise


@dataclass(frozen=True)
class Report:
    """Write the figures and report.html of a stored study, or of a stored search with --storage."""

    run: tyro.conf.Positional[str]
    """Name of the study or search."""
    store: Path = DEFAULT_STORE
    """SQLite file of the study."""
    storage: str | None = None
    """Storage of a search: a .sqlite or .journal file, or a URL."""
    out: Path | None = None
    """Output folder; default: a folder of this name beside the store."""
    json: bool = False
    """Print the numbers as JSON and write no file."""


def run(arguments: list[str]) -> int:
    """Write or print the report; return the exit code."""
    report = tyro.cli(Report, args=arguments, prog="midflight report")
    if report.storage is not None:
        return search.report(report.run, report.storage, report.out, report.json)
    with Store(report.store, create=False) as store:
        if report.json:
            print(as_json(store, report.run))
            return 0
        spec, rows = store.spec(report.run), store.rows(report.run)
        folder = report.out or report.store.parent / file_name(report.run)
        folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is refused before the work
        with err.status("comparing hypergradients with central differences"):
            torch.set_num_threads(1)  # the networks are too small to profit from more
            checks = as_dicts(run_checks())
        page = write_report(store, report.run, folder, checks, rows)
    out.print(summary_table(summarise(spec, rows)))
    print(f"Report: {printable(str(page.resolve()))}")
    return 0
