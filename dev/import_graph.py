"""Draw which unit of midflight imports which, as the picture in CONTRIBUTING.md.

    python dev/import_graph.py           write the picture
    python dev/import_graph.py --check   exit 1 unless CONTRIBUTING.md shows the imports of today

A unit is a file or folder right under src/midflight. An arrow points from a unit to one that it imports.
Arrows that follow from others are left out. The exit code is 1 as well if an arrow is part of a circle, or if
there are more than 20 units.
"""

import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
BEGIN, END = "<!-- import graph -->\n", "<!-- end of import graph -->"
MOST_UNITS = 20


def imports() -> dict[str, set[str]]:
    """Unit -> the units that it imports."""
    graph = grimp.build_graph("midflight", cache_dir=None)
    found: dict[str, set[str]] = {_unit(module): set() for module in graph.modules if "." in module}
    for module in graph.modules:
        if "." in module:
            theirs = {_unit(m) for m in graph.find_modules_directly_imported_by(module) if "." in m}
            found[_unit(module)] |= theirs - {_unit(module)}
    return found


def _unit(module: str) -> str:
    return module.split(".")[1]


def reduced(found: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others."""

    def below(unit: str) -> set[str]:
        return found[unit] | {lower for other in found[unit] for lower in below(other)}

    return sorted(
        (unit, other)
        for unit in found
        for other in found[unit]
        if not any(other in below(third) for third in found[unit] - {other})
    )


def picture(found: dict[str, set[str]]) -> str:
    """The graph in the language of Mermaid, which GitHub draws."""
    arrows = [f"    {unit} --> {other}" for unit, other in reduced(found)]
    return "\n".join(["```mermaid", "flowchart TD", *arrows, "```\n"])


def main() -> None:
    found = imports()
    list(TopologicalSorter(found).static_order())  # raises CycleError for a circle
    if len(found) > MOST_UNITS:
        sys.exit(f"midflight must have at most {MOST_UNITS} units, but has {len(found)}.")
    page = PAGE.read_text()
    if BEGIN not in page:
        sys.exit(f"{PAGE.name} must have a line {BEGIN.strip()}, but has none.")
    new = re.sub(f"{BEGIN}.*?{END}", lambda _: BEGIN + picture(found) + END, page, flags=re.DOTALL)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == page else f"{PAGE.name} shows other imports; run python dev/import_graph.py.")
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
