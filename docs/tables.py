"""Write the pages of the reference that are made from the code, when Sphinx starts."""

import os
import subprocess
import sys
from pathlib import Path

from sphinx.application import Sphinx

from midflight import cli
from midflight.gradcheck import KINDS, OPTIMIZERS, why_skipped
from midflight.hypergrad import CLAIMS, ESTIMATORS

FOLDER = Path(__file__).parent / "reference" / "generated"


def commands() -> str:
    """Return the help of each command."""
    parts = ["# Commands\n"]
    for command in ["", *cli.COMMANDS]:
        asked = [sys.executable, "-m", "midflight", *([command] if command else []), "--help"]
        environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
        said = subprocess.run(asked, capture_output=True, text=True, check=True, env=environment).stdout
        parts.append(f"## midflight {command}\n\n```text\n{said.rstrip()}\n```\n")
    return "\n".join(parts)


def tuned() -> str:
    """Return which kinds of hyperparameters can be tuned with which optimiser."""
    reasons: dict[str, int] = {}
    rows = []
    for kind in KINDS:
        cells = []
        for optimizer in OPTIMIZERS:
            why = why_skipped(optimizer, kind)
            absent = why is not None and "has no option" in why
            cells.append(
                "yes" if why is None else "-" if absent else f"{reasons.setdefault(why, len(reasons) + 1)}"
            )
        rows.append([kind, *cells])
    head = ["kind", *OPTIMIZERS]
    notes = "\n".join(f"{number}. {why}" for why, number in reasons.items())
    claims = [[f"`{name}`", str(claim.steps), f"{claim.tolerance:g}"] for name, claim in CLAIMS.items()]
    others = ", ".join(f"`{name}`" for name in ESTIMATORS if name not in CLAIMS)
    return f"""# Kinds, optimisers, estimators

`midflight check --all` compares the hypergradient of each "yes" with a central difference in float64.
A dash: the optimiser has no such option. A number refers to the reason below the table.

{_table(head, rows)}

{notes}

These estimators claim to equal the derivative after so many steps, up to a relative error. The command
checks it for each "yes":

{_table(["estimator", "steps", "error"], claims)}

The others make no claim: {others}. What they compute is in [estimators](../../explanation/estimators.md).
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(app: Sphinx) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, page in (("commands", commands()), ("tuned", tuned())):
        file = FOLDER / f"{name}.md"
        if not file.exists() or file.read_text() != page:  # Sphinx reads a page again if it is newer
            file.write_text(page)
