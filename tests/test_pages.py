"""Links of the pages lead somewhere, and broken code in a page fails."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MADE = ("gallery", "generated", "learn", "_build")
"""Folders that the build of the site makes."""
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("dev/**/*.md"), *ROOT.glob("docs/**/*.md")]
    if not set(page.relative_to(ROOT).parts) & set(MADE)
)


def anchors(page):
    """The anchors of a page, as GitHub and Sphinx make them from its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_leads_to_a_file_and_a_heading(page):
    broken = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if ":" in target or set(Path(target).parts) & set(MADE):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(f"{target}#{anchor}")
    assert broken == []


def test_every_page_is_in_the_contents_of_its_folder():
    for folder in ("how-to", "explanation", "reference", "benchmarks"):
        listed = (ROOT / "docs" / folder / "index.md").read_text()
        pages = {page.stem for page in (ROOT / "docs" / folder).glob("*.md")} - {"index"}
        assert {page for page in pages if f"\n{page}\n" not in listed} == set()


def commands(page):
    """The commands in the code of a page: of blocks for a shell, and between backticks."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).splitlines()
    inline = re.findall(
        r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )
    for command in (" ".join(text.partition("#")[0].split()) for text in [*blocks, *inline]):
        if command.startswith(("make ", "midflight ", "python ")):
            yield command


@cache
def known_options(program):
    """The options of a script, or of a command of midflight."""
    if program.endswith(".py"):
        text = (ROOT / program).read_text() + (ROOT / "benchmarks/tasks.py").read_text()
        return set(re.findall(r"[\"'](--[a-z-]+)[\"']", text))
    preset = ["paper"] if program == "study" else []
    command = [sys.executable, "-m", "midflight", program, *preset, "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z-]+", said))


def test_commands_in_pages_exist_and_so_do_their_options():
    targets, unknown, seen = (ROOT / "Makefile").read_text(), [], 0
    for page in PAGES:
        if "log" in page.parts or "dev" in page.parts:
            continue
        for command in commands(page):
            first, program, *words = [*command.split(), ""]
            if first == "make":
                missing = [] if f"\n{program}:" in targets or "=" in program else [program]
            elif program in ("-m", "-c") or program.startswith(("tests", "-")):
                continue
            else:
                missing = [w for w in words if w.startswith("--") and w not in known_options(program)]
                missing += [] if first == "midflight" or (ROOT / program).exists() else [program]
            unknown += [(page.name, command, missing)] if missing else []
            seen += 1
    assert unknown == [], unknown
    assert seen > 40


FENCES = {"python", "sh", "text", "mermaid", "{toctree}", "{eval-rst}"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_of_a_kind_that_is_run_or_has_no_code(page):
    opened = re.findall(r"^[ >]*(?:`{3,}|~{3,})(.+)$", page.read_text(), re.MULTILINE)
    assert set(opened) <= FENCES


@pytest.mark.parametrize(("code", "passes"), [("assert steps > 0", True), ("assert steps < 0", False)])
def test_broken_code_in_a_page_fails(tmp_path, code, passes):
    (tmp_path / "conftest.py").write_text((ROOT / "docs" / "conftest.py").read_text())
    (tmp_path / "page.md").write_text(f"# A page\n\n```python\n{code}\n```\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        tmp_path,
    ]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode == 0) == passes, ran.stdout
    assert ("1 passed" if passes else "AssertionError") in ran.stdout
