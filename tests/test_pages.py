"""Links of the pages lead somewhere, and broken code in a page fails."""

import re
import subprocess
import sys
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
