"""Print the lines of each folder in the first edition (git tag first-edition) and now, as a table.

    python dev/lines.py

"Code" leaves out docstrings, comments and empty lines.
"""

import ast
import io
import subprocess
import tokenize
from collections import Counter

FIRST = "first-edition"
SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip
MOVED = {
    "batches": "tuner", "binding": "tuner", "capture": "tuner", "checking": "gradcheck", "cli": "cli",
    "foresight": "tuner", "graph": "hypergrad", "guards": "tuner", "hypersteps": "tuner", "levels": "nn",
    "losses": "nn", "machine": "_reporting", "memory": "tuner", "pacing": "tuner", "penalties": "nn",
    "population": "tuner", "problem": "hypergrad", "ranges": "space", "rotation": "tuner",
    "solvers": "hypergrad", "space": "space", "testing": "gradcheck", "training_gradient": "tuner",
    "trajectory": "tuner", "transforms": "space", "tuner": "tuner", "study/data": "files on top",
}  # fmt: skip
"""Module of the first edition -> the folder that has its task now."""


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def code_lines(source: str) -> int:
    """Count the lines that hold code."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            texts |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in SILENT for line in range(t.start[0], t.end[0] + 1)}
    return len(code - texts)


def counted(revision: str) -> dict[str, Counter[str]]:
    """Folder -> lines and code lines."""
    found: dict[str, Counter[str]] = {}
    for path in git("ls-tree", "-r", "--name-only", revision).splitlines():
        top, _, rest = path.partition("/")
        if top not in ("src", "tests") or not path.endswith(".py"):
            continue
        unit = "tests"
        if top == "src":
            inner = rest.removeprefix("midflight/").removesuffix(".py")
            folder = inner.partition("/")[0] if "/" in inner else "files on top"
            old = revision == FIRST
            unit = MOVED.get(inner, MOVED.get(inner.partition("/")[0], folder)) if old else folder
        text = git("show", f"{revision}:{path}")
        found.setdefault(unit, Counter()).update(all=text.count("\n"), code=code_lines(text))
    return found


def main() -> None:
    first, now = counted(FIRST), counted("HEAD")
    print("| folder | first edition: lines, code | now: lines, code |\n|---|---|---|")
    users = ("search", "automl", "study")
    units = sorted(set(first | now) - {"tests", *users})
    for name, group in (
        [(u, [u]) for u in units] + [("**core**", units)] + [(u, [u]) for u in (*users, "tests")]
    ):
        cells = [
            ", ".join(f"{sum(edition.get(u, Counter())[kind] for u in group):,}" for kind in ("all", "code"))
            for edition in (first, now)
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
