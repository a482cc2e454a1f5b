"""Write tables of stored rows into the pages: `make tables` runs the cog blocks of all pages.

A block is a comment in a page. It names a benchmark with its options, and words of the caption or head of one
of the tables that `python benchmarks/<it> --table` prints. cog writes this table between the two comments:

    <!-- [[[cog show("any_start --four", "within 10 %") ]]] -->
    <!-- [[[end]]] -->
"""

import json
import os
import re
import runpy
import sys
from collections.abc import Collection
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from midflight.study import report

os.environ["OMP_NUM_THREADS"] = "1"  # some benchmarks start again without it

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@cache
def printed(command: str) -> str:
    """Return what a benchmark prints of its stored rows.

    Args:
        command: name of the script and its options, without `--table`.
    """
    name, *options = command.split()
    script = str(BENCHMARKS / f"{name}.py")
    text = StringIO()
    with (
        patch.object(sys, "argv", [script, *options, "--table"]),
        patch.object(sys, "path", [str(BENCHMARKS), *sys.path]),
        redirect_stdout(text),
    ):
        runpy.run_path(script, run_name="__main__")
    return text.getvalue()


def tables(text: str) -> list[tuple[str, list[str]]]:
    """Return the (caption, lines) of each markdown table in a text; the caption is the line before it."""
    found = re.findall(r"(?:^([^|\n].*)\n\n?)?((?:^\|.*\n?)+)", text, re.MULTILINE)
    return [(caption, lines.splitlines()) for caption, lines in found]


def lines(command: str, words: str) -> None:
    """Print as a list the lines with these words that are not of a table."""
    found = [line for line in printed(command).splitlines() if words in line and not line.startswith("|")]
    if not found:
        raise LookupError(f"no line of `{command} --table` contains {words!r}")
    print("\n" + "\n".join(f"- {line}" for line in found) + "\n")


def show(command: str, words: str = "", without: Collection[str] = ()) -> None:
    """Print one table of a benchmark.

    Args:
        command: name of the script and its options, without `--table`.
        words: part of the caption or the head of the table.
        without: columns to leave out, by their heads.

    Raises:
        LookupError: not one table, but none or several have the words.
    """
    found = [lines for caption, lines in tables(printed(command)) if words in f"{caption}\n{lines[0]}"]
    if len(found) != 1:
        raise LookupError(f"{len(found)} tables of `{command} --table` contain {words!r}, not one")
    rows = [line.strip("|").split("|") for line in found[0]]
    unknown = set(without) - {head.strip() for head in rows[0]}
    if len(rows) < 3 or unknown:
        why = f"no columns {unknown}" if unknown else "no rows; are they stored?"
        raise LookupError(f"the table {words!r} of `{command} --table` has {why}")
    kept = [n for n, head in enumerate(rows[0]) if head.strip() not in without]
    print("\n" + "\n".join(f"|{'|'.join(row[n] for n in kept)}|" for row in rows) + "\n")


def study(name: str, which: str) -> None:
    """Print a table of each network of a study.

    Args:
        name: folder in docs/results whose summary.json `midflight report --json` wrote.
        which: "arms", or "statements" of the paper beside what was measured.
    """
    text = (ROOT / "docs/results" / name / "summary.json").read_text()
    summary = json.loads(text, object_hook=lambda names: SimpleNamespace(**names)).summary
    for network in summary.networks:
        table = report.arms_table(network) if which == "arms" else report.statements_table(summary, network)
        cells = [[_cell(cell) for cell in row] for row in (table.head, *table.lines)]
        cells.insert(1, ["---"] * len(cells[0]))
        print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n")


def _cell(cell: report.Cell | str) -> str:
    return cell if isinstance(cell, str) else f"{cell.text}<br>{cell.small}" if cell.small else cell.text
