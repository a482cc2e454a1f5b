"""Numbers in the pages are traced.

Tables of measurements are printed from stored rows. A number in a sentence stands in such a table of the
page, or of a page that it links to; or it is a setting, which the docstring of the benchmark names; or it is
a constant of the code.
"""

import ast
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import midflight as mf
from midflight.space.default_ranges import RANGES
from midflight.space.transforms import Linear, Log, Logit
from midflight.tuner import controller, guard, horizon, movement, step_options
from midflight.tuner.report import EARLIER

ROOT = Path(__file__).parents[1]
MADE = {"gallery", "generated", "learn", "_build", "results"}
"""Folders that the build of the site makes."""
PAGES = [ROOT / "README.md", *(p for p in ROOT.glob("docs/**/*.md") if not set(p.parts) & MADE)]
TABLE = re.compile(r"<!-- \[\[\[cog (.*?) \]\]\] -->(.*?)<!-- \[\[\[end\]\]\] -->", re.DOTALL)
NUMBER = re.compile(
    r"(?<![\w.-])\d*\.\d+(?=[xs]?\b)(?!\.\d|-\d)|\b\d+(?= ?%)|\b\d+(?= (?:of|to) \d+ %)|\b\d+(?= of \d)"
)
"""A decimal, a percentage, or a part of a whole; other whole numbers are counts and sizes."""


def read(file, pattern):
    """A number in a file."""
    return float(re.search(pattern, (ROOT / file).read_text())[1])


def default(function, name):
    """The default of an argument."""
    return inspect.signature(function).parameters[name].default


IN_BFLOAT16 = 100 * read("tests/faults/test_sharded.py", r"rel=(0.15)")
FIRST_ORDER = 100 * read("tests/oracles/test_combinations.py", r"EXACT, FIRST_ORDER, SURE = [^,]*, ([\d.]*)")
DRAWN = 100 * read("src/midflight/nn/magnitude.py", r"return ([\d.]+) \* magnitude.spec.high")
OVERHEAD = (ROOT / "docs/benchmarks/overhead.md").read_text()
COST = [
    x.strip()
    for steps in ("3,000", "20,000")
    for x in re.search(rf"^\| {steps} \|(.*)\|$", OVERHEAD, re.MULTILINE)[1].split("|")[1].split(",")
]
CONSTANTS = {
    "README.md": [
        f"[{COST[0]} to {COST[1]} times the time]",
        f"in 3,000 steps, {COST[2]} to {COST[3]} in 20,000",
    ],
    "benchmarks/overhead.md": [f"at {len(guard.LOOKS)} of the first {max(guard.LOOKS)} steps"],
    "explanation/estimators.md": [f"up to {100 * default(mf.SignSteps, 'lr'):g} % of its range"],
    "how-to/loss_terms.md": [
        f"With the default, {default(mf.Mixture, 'floor'):g}, no weight of two falls below "
        f"{default(mf.Mixture, 'floor') / 2:g}",
    ],
    "how-to/mixture.md": [f"reaches 0; {default(mf.Mixture, 'floor'):g} by default"],
    "how-to/finetune.md": [
        f"up to {RANGES['noise'].high:g}, for embeddings with a root mean square of about 0.4"
    ],
    "how-to/log.md": [
        f"| {read('constraints.txt', r'tensorboard==([0-9]+[.][0-9]+)'):g} |",
        f"at least {100 - 100 * EARLIER:g} % below the others",
    ],
    "how-to/processes.md": [f"right to {IN_BFLOAT16:g} %"],
    "reference/combinations.md": [f"less than {FIRST_ORDER:g} %", f"right to {IN_BFLOAT16:g} %"],
    "reference/hyperparameters.md": [
        f"never draws below {DRAWN:g} % of the range",
        f"logit, {RANGES['dropout'].low:g} to {RANGES['dropout'].high:g} |",
    ],
    "explanation/trust.md": [
        f"it is {100 * guard.START:g} % above C2 at the initial weights",
        f"{len(guard.LOOKS)} of the first {max(guard.LOOKS)} steps",
        f"it is above {movement.MOVED[16]:g}, or {movement.MOVED[64]:g}, times the initial",
        f"the average is {100 * guard.RISEN:g} % worse",
        f"{100 * guard.MARGIN:g} % of the fall of C2 since the start",
        f"later once per {100 * horizon.WINDOW / horizon.SAMPLES:g} % of the steps so far",
        f"{step_options.CUT:g} of its value; momentum falls",
        f"stays below {guard.BELOW:g} of the value that failed",
        f"rises by {100 * guard.RISE:g} % per hyper-step",
        f"changes the weights by more than {100 * movement.FAST:g} %",
        f"a loss more than {100 * guard.WORSE_AT_END:g} % higher",
        f"a factor of e^{step_options.USUAL:g} in `lr`",
        f"{step_options.USUAL_OF_OTHERS:g} in the same units",
        f"{Log.USUAL / math.log(10):g} powers of 10",
        f"{Logit.USUAL:g}, as from 0.05 to 0.95",
        f"{Linear.TIMES_INIT:g} times the initial value and {Linear.GROWTH:g} times the value now",
        f"has fallen by {100 * controller.LEARNED:g} %",
    ],
    "explanation/horizon.md": [
        f"extrapolation = {horizon.GAIN:g} (threshold - C1 / C2), limited to [0, {horizon.MOST:g}]",
        f"1 - {1 - horizon.MEMORISED:g} sqrt(share of the run that is over); {horizon.OPEN_END:g} without",
        f"this share shrinks to {100 * horizon.LAST_WINDOW:g} %",
        f"a moving average with decay {horizon.STEADY:g} at extrapolation 0",
    ],
}
"""Page -> what it says of constants of the code and the tests."""


def checked(*pages):
    """Compare the tables of pages with the rows, as `make tables` does; return cog's exit code and words."""
    command = [sys.executable, "-m", "cogapp", "-P", "--check", "-I", "docs", "-p", "from rows import *"]
    ran = subprocess.run([*command, *pages], cwd=ROOT, capture_output=True, text=True)
    return ran.returncode, ran.stdout + ran.stderr


def test_each_table_is_that_of_the_stored_rows():
    code, said = checked(*(page for page in PAGES if "[[[cog" in page.read_text()))
    assert code == 0, f"run `make tables`\n{said}"


def test_another_digit_in_a_table_is_noticed(tmp_path):
    page = (ROOT / "docs/benchmarks/mixture.md").read_text()
    changed = tmp_path / "mixture.md"
    changed.write_text(page.replace("| 2.956 |", "| 2.957 |"))
    assert changed.read_text() != page
    code, said = checked(changed)
    assert code != 0
    assert "Check failed" in said


def test_a_table_without_rows_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('<!-- [[[cog show("any_start --seed 99") ]]] -->\n<!-- [[[end]]] -->\n')
    code, said = checked(page)
    assert code != 0
    assert "no rows; are they stored?" in said


def values(text, number=NUMBER):
    """The numbers of a text as floats: .5 and 0.50 are the same."""
    return {float(found) for found in number.findall(text)}


OTHERS = r"at\s[\d.]+ GHz|torch [\d.]+|Ray [\d.]+|\[[\d., -]+\]|\"[\d.]+\"|95 % bootstrap"
"""Clock rates, versions, intervals, texts of examples."""


def sentences(text):
    """What of a page is typed, without tables of rows, code and links."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", TABLE.sub("", text), flags=re.DOTALL)
    return re.sub(rf"`[^`]*`|\]\([^)]*\)|^    .*$|{OTHERS}", "", text, flags=re.MULTILINE)


def in_code(text):
    """The numbers in the code of a page, also as percentages: settings."""
    found = values(" ".join(re.findall(r"`+(?!text)[^`]+`+", text)), re.compile(r"\d*\.?\d+"))
    return found | {100 * number for number in found}


def linked(page):
    """A page, and the pages that it links to."""
    targets = re.findall(r"\]\(([^)#\s:]+\.md)", page.read_text())
    return [page, *(path for target in targets if (path := (page.parent / target).resolve()) in PAGES)]


def known(page):
    """The numbers that a page may say: of code, tables, docstrings of their benchmarks, and constants."""
    said = CONSTANTS.get(str(page.relative_to(ROOT)).removeprefix("docs/"), [])
    found = in_code(page.read_text()) | values(" ".join(said))
    for source in linked(page):
        for code, table in TABLE.findall(source.read_text()):
            name = re.search(r'"(\w+)', code)[1]
            script = ROOT / "benchmarks" / f"{name}.py"
            settings = ast.get_docstring(ast.parse(script.read_text())) if script.exists() else ""
            found |= values(table + settings, re.compile(r"\d*\.?\d+"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_number_in_a_sentence_is_known(page):
    assert sorted(values(sentences(page.read_text())) - known(page)) == []


@pytest.mark.parametrize("page", CONSTANTS)
def test_pages_say_the_constants_of_the_code(page):
    file = ROOT / page if page == "README.md" else ROOT / "docs" / page
    text = " ".join(file.read_text().split())
    assert [said for said in CONSTANTS[page] if said not in text] == []
