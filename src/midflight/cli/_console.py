"""Consoles of the commands: `out` for results, `err` for progress. Both show names as they are."""

import sys

from rich.console import Console

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)
