"""Print the lines of each folder in the first edition and now, as a table.

    python dev/lines.py

"Code" leaves out docstrings, comments and empty lines.
"""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIRST = {
    "_reporting": (26, 18), "cli": (358, 249), "files on top": (485, 312), "gradcheck": (894, 613),
    "hypergrad": (885, 472), "nn": (551, 241), "space": (508, 313), "tuner": (2205, 1376),
    "updates": (1155, 700), "search": (2833, 2013), "automl": (1505, 977), "study": (2548, 1884),
    "tests": (8378, 6626),
}  # fmt: skip
"""Folder that has the task now -> (lines, code) in the first edition, commit 007a9dc."""
USERS = ("search", "automl", "study")
"""Folders that are not part of the core."""
SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(source: str) -> int:
    """Count the lines that hold code."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            texts |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in SILENT for line in range(t.start[0], t.end[0] + 1)}
    return len(code - texts)


def counted() -> dict[str, tuple[int, int]]:
    """Return folder -> (lines, code) of the working tree."""
    lines, code = Counter[str](), Counter[str]()
    for top in (ROOT / "src/midflight", ROOT / "tests"):
        for path in top.rglob("*.py"):
            folder = path.relative_to(top).parts[0] if path.parent != top else "files on top"
            unit = "tests" if top.name == "tests" else folder
            text = path.read_text()
            lines[unit] += text.count("\n")
            code[unit] += code_lines(text)
    return {unit: (lines[unit], code[unit]) for unit in lines}


def main() -> None:
    now = counted()
    print("| folder | first edition: lines, code | now: lines, code |\n|---|---|---|")
    core = sorted(set(FIRST | now) - {"tests", *USERS})
    for name, group in [
        *((u, [u]) for u in core),
        ("**core**", core),
        *((u, [u]) for u in (*USERS, "tests")),
    ]:
        cells = [
            ", ".join(f"{sum(edition.get(u, (0, 0))[kind] for u in group):,}" for kind in (0, 1))
            for edition in (FIRST, now)
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
