"""The report of a search: quick on many trials, and whatever a name holds is shown as it is."""

import os
import random
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

import midflight as mf
from midflight import search
from midflight.search.ledger import Declaration, Record
from midflight.search.report import as_json, headline, summary_table, write_report

NASTY = [
    "[/INST]",
    "[red]",
    "<script>alert(1)</script>",
    "$x^$",
    "a_b$",
    "'; DROP TABLE trials; --",
    "x" * 300,
]
SPACE = search.Space(
    {
        "$lr_{x}": mf.Float(1e-4, 1e-1, log=True),
        "<b>net</b>": mf.Categorical(NASTY),
        "depth": mf.Int(1, 9, when={"<b>net</b>": tuple(NASTY[:3])}),
        "decay": mf.Float(1e-6, 1e-2, log=True, online=True),
    }
)
DECLARATION = Declaration(SPACE, 4, 0, "<i>mine</i>")


def made(count, sign=1.0):
    """Trials of every state, some of which diverged."""
    draw, found = random.Random(0), []
    for n in range(count):
        config = {"$lr_{x}": 10 ** draw.uniform(-4, -1), "<b>net</b>": draw.choice(NASTY)}
        if config["<b>net</b>"] in NASTY[:3]:
            config["depth"] = draw.randint(1, 9)
        state = draw.choice(["complete", "complete", "pruned", "failed", "unfinished"])
        losses = {
            e: sign * (draw.random() + config["$lr_{x}"]) for e in range(1, 5 if state == "complete" else 2)
        }
        if n % 50 == 49:
            losses[max(losses)] = float("inf")
        path = [(e, {"decay": 1e-4 * e}) for e in losses]
        message = "ValueError: <script>[/x]" if state == "failed" else ""
        found.append(Record(n, state, config, {"decay": 1e-4}, losses, path, {"test [/error]": 0.5}, message))
    return found


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_names_are_shown_as_they_are_in_page_table_and_figures(sign, tmp_path):
    records = made(40, sign)
    page = write_report("[/s] <u>", DECLARATION, records, tmp_path).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>net</b>" not in page
    assert "<u>" not in page
    console = Console(width=400, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(summary_table(records, most=40))
    shown = console.export_text()
    assert all(name in shown for name in NASTY[:6])
    assert headline(records)
    svg = (tmp_path / "configurations.svg").read_text()
    assert "[/INST]" in svg
    assert "$lr_{x}" in svg  # no mathematics


def test_a_report_on_5000_trials_takes_less_than_5_seconds_and_stays_small(tmp_path):
    records, seconds = made(5000), {}
    for count in (20, 20, 5000):  # the first one imports and loads fonts
        began = time.process_time()
        page = write_report("s", DECLARATION, records[:count], tmp_path)
        seconds[count] = time.process_time() - began
    assert seconds[5000] - seconds[20] < 3
    assert page.stat().st_size < 5e6
    assert as_json("s", DECLARATION, records).count('"number"') == 5000


@pytest.mark.parametrize("records", [[], made(1), made(3)], ids=len)
def test_a_report_on_few_trials_says_what_is_missing(records, tmp_path):
    page = write_report("s", DECLARATION, records, tmp_path).read_text()
    assert f"{len(records)} trials" in page
    assert "Needs 12 finished trials" in (tmp_path / "importance.svg").read_text()


def test_a_loss_below_zero_is_drawn(tmp_path):
    from midflight.search.figures import history

    [axis] = history(made(30, -1.0)).axes
    assert axis.get_yscale() == "linear"
    assert min(axis.get_ylim()) < -0.5


def test_a_choice_in_brackets_is_searched_and_reported_also_to_an_ascii_terminal(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import midflight as mf\nfrom midflight import search\n"
        "space = search.Space({'é': mf.Categorical(['[/INST]', 'ü·'])})\n"
        "def f(trial):\n    return 1.0\n"
    )
    settings = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    options = {"capture_output": True, "cwd": tmp_path, "env": settings, "timeout": 300}
    command = [sys.executable, "-m", "midflight"]
    search_it = ["search", "mine.py:f", "--engine", "random", "--trials", "4", "--epochs", "1"]
    for arguments in (
        [*search_it, "--workers", "1", "--study", "s", "--storage", "s.journal"],
        ["report", "s", "--storage", "s.journal"],
    ):
        found = subprocess.run([*command, *arguments], **options)
        assert found.returncode == 0, found.stderr
        assert found.stdout.isascii()
        assert b"[/INST]" in found.stdout


@pytest.mark.parametrize("trials", ["1", "2"])
def test_a_search_whose_trials_all_fail_ends_with_exit_code_1(trials, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import midflight as mf\nfrom midflight import search\n"
        "space = search.Space(x=mf.Int(1, 9))\ndef f(trial):\n    raise ValueError('no')\n"
    )
    command = [sys.executable, "-m", "midflight", "search", "mine.py:f", "--trials", trials, "--epochs", "1"]
    found = subprocess.run(
        [*command, "--workers", "1", "--storage", "s.journal"], capture_output=True, cwd=tmp_path, timeout=300
    )
    assert found.returncode == 1
    assert re.search(rb"no trial|all failed", found.stderr)
    assert b"Traceback" not in found.stderr
