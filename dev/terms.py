"""Count the terms that a page uses before it explains them.

    python dev/terms.py                 # a line per page: the terms that it leaves unexplained
    python dev/terms.py docs/faq.md

The first sentence or table row with a term must say what it is, as "*hyper-step*" or "T1 is the ..." do, or
link to a page that does. Code, formulas and headings do not count.
"""

import argparse
import re
from pathlib import Path

from prose import ROOT, pages

SYMBOL = r"(?:data|loss|gradient|weights),? \(?{0}\b|{0}(?:,| is| are)? (?:the|its) |{0} = |^\| {0} \|"
WORD = r"\*[^*]*{0}[^*]*\*|^[|#]+ \[?(?:The )?{0}|\b(?:An?|The) {0} (?:is|sets|says|turns|computes|checks)\b"
TERMS = {
    **{name: (rf"\b{name}\b", SYMBOL) for name in ("T1", "T2", "C1", "C2", "theta")},
    "v": (r"(?<![\w.*-])v(?![\w.-])", SYMBOL),
    **{name: (rf"\b{name}s?\b", WORD) for name in ("hyper-step", "hypergradient", "horizon", "guard", "arm")},
    **{name: (rf"\b{name}s?\b", WORD) for name in ("extrapolation", "mixed partial", "update rule")},
    "averaged weights": (r"\baveraged weights\b", WORD),
    "estimator": (r"(?<!learn )\bestimators?\b", WORD),
    "raw": (r"\braw (?:value|coordinate)s?\b", WORD),
    "trajectory": (r"\btrajector(?:y|ies)\b", WORD),
}
"""Term -> pattern of its use, and pattern of a sentence that says what it is; {0} is the use."""


def units(page: Path) -> list[str]:
    """Return the headings, sentences and table rows of a page, in order."""
    text = re.sub(r"<!--.*?-->|```.*?```|^:::.*?$|^    .*?$", "\n\n", page.read_text(), flags=re.S | re.M)
    blocks = re.split(r"\n\s*\n|\n(?=\||#|\s*(?:[-*]|\d+\.) )", re.sub(r"`[^`]*`", "code", text))
    return [u for b in blocks for u in re.split(r"(?<=[.!?:])\s+(?=[A-Z*])", " ".join(b.split())) if u]


def explains(unit: str, term: str, page: Path | None = None) -> bool:
    """Return whether a unit says what a term is, or links from its page to one that does."""
    use, saying = TERMS[term]
    if re.search(saying.format(f"(?:{use})"), unit, re.I if len(term) > 2 else 0):
        return True
    links = [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s:]*\.md)", unit) if page]
    return any(explains(other, term) for link in links if link.exists() for other in units(link))


def unexplained(page: Path, term: str) -> bool:
    """Return whether a page leaves a term unexplained at its first use."""
    pattern = re.compile(TERMS[term][0], re.I if len(term) > 2 else 0)
    first = next((unit for unit in units(page) if unit[0] != "#" and pattern.search(unit)), None)
    return first is not None and not explains(first, term, page)


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("pages", nargs="*", type=Path, default=[p for p in pages() if p.stem != "CONTRIBUTING"])
found = {p: [t for t in TERMS if unexplained(p, t)] for p in map(Path.resolve, parser.parse_args().pages)}
print(*(f"{len(terms):3}  {p.relative_to(ROOT)}: {', '.join(terms)}" for p, terms in found.items()), sep="\n")
print(f"{sum(map(len, found.values())):3}  all")
