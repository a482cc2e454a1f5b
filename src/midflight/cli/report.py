"""`midflight report`: figures and a page from stored rows."""

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
    """Write the figures and report.html of a study, or with --storage of a search, from its stored rows."""

    run: tyro.conf.Positional[str]
    """The study's name in the store."""
    store: Path = DEFAULT_STORE
    """SQLite file."""
    storage: str | None = None
    """Of a search: a .sqlite or .journal file, or a URL."""
    out: Path | None = None
    """Folder to write to; runs/RUN beside the store if not given."""
    json: bool = False
    """Print the same numbers for machines and write nothing."""


def run(arguments: list[str]) -> int:
    report = tyro.cli(Report, args=arguments, prog="midflight report")
    if report.storage is not None:
        return search.report(report.run, report.storage, report.out, report.json)
    with Store(report.store, create=False) as store:
        if report.json:
            print(as_json(store, report.run))
            return 0
        store.spec(report.run)
        with err.status("checking the hypergradients"):
            checks = as_dicts(run_checks())
        folder = report.out or report.store.parent / report.run
        page = write_report(store, report.run, folder, checks)
        out.print(summary_table(summarise(store.spec(report.run), store.rows(report.run))))
    out.print(f"Report: {page.resolve()}", soft_wrap=True)
    return 0
