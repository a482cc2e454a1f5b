"""Consoles of the commands: `out` for results, `err` for progress."""

import sys

from rich.console import Console

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True)
