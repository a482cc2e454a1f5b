"""`midflight report`: write figures and a page from stored results."""

from dataclasses import dataclass
from pathlib import Path

import tyro

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
        store.spec(report.run)
        with err.status("comparing hypergradients with central differences"):
            checks = as_dicts(run_checks())
        folder = report.out or report.store.parent / report.run
        page = write_report(store, report.run, folder, checks)
        out.print(summary_table(summarise(store.spec(report.run), store.rows(report.run))))
    out.print(f"Report: {page.resolve()}", soft_wrap=True)
    return 0
