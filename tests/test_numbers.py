"""Numbers in the tables of pages are those that the benchmarks print from the stored rows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"(?<![\w.])[+-]?\d*\.\d{2,}(?![\w.])")
"""A number with at least two decimals; others are settings, counts or shares of few."""

PAGES = {
    "how-to/mixture.md": ["mixture", "mixture_cost", "mixture_steps"],
    "how-to/loss_terms.md": ["multitask"],
    "how-to/finetune.md": ["finetune"],
    "how-to/example_weights.md": ["noisy_labels"],
}
"""Page -> the benchmarks whose `--table` prints its numbers."""
NOT_STORED = {
    "how-to/mixture.md": "T2 is German",  # the cosines of last layers
    "how-to/loss_terms.md": "weight of the main term",  # trials on four other seeds
}
"""Page -> a word in the head of the one table whose rows are not stored, as the page says."""


PRINTED = re.compile(r"[+-]?\d*\.\d+")


def numbers(text, kind=NUMBER):
    """The numbers in a text, all in the same form: .5 and +0.50 are 0.5."""
    return {float(found) for found in kind.findall(text)}


def tables(page):
    """The tables of a page, without code."""
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    return re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_each_number_of_a_table_comes_from_a_stored_row(page):
    printed = ""
    for benchmark in PAGES[page]:
        command = [sys.executable, f"benchmarks/{benchmark}.py", "--table"]
        printed += subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known, untraced, traced = numbers(printed, PRINTED), [], 0
    for table in tables(page):
        if page in NOT_STORED and NOT_STORED[page] in table.splitlines()[0]:
            continue
        traced += len(numbers(table) & known)
        untraced += sorted(numbers(table) - known)
    assert untraced == []
    assert traced > 20
