"""Count long sentences in the pages.

    python dev/prose.py                 # a line per page: sentences, and those of more than 30 words
    python dev/prose.py --show          # print the long ones
    python dev/prose.py docs/faq.md

Code, tables and headings do not count.
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 30
"""Words of a sentence."""
MADE = {"gallery", "generated", "learn", "_build", "results"}


def pages() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return [page for page in found if not set(page.parts) & MADE]


def sentences(text: str) -> list[str]:
    """Return the sentences of a page."""
    text = re.sub(r"<!--.*?-->|```.*?```|^:::.*?$|^[|#].*?$", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text):
        plain = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
        found += [s for s in re.split(r"(?<=[.!?:])\s+(?=[A-Z`*])", plain) if s]
    return found


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("pages", nargs="*", type=Path, default=pages())
    parser.add_argument("--show", action="store_true", help="print the long sentences")
    options = parser.parse_args()
    all_, long_ = 0, 0
    for page in options.pages:
        found = sentences(page.read_text())
        long = [sentence for sentence in found if len(sentence.split()) > MOST]
        all_, long_ = all_ + len(found), long_ + len(long)
        print(f"{len(long):3} of {len(found):4}  {page.resolve().relative_to(ROOT)}")
        for sentence in long if options.show else []:
            print(f"     {len(sentence.split())}: {sentence}")
    print(f"{long_:3} of {all_:4}  all")


if __name__ == "__main__":
    main()
