"""Show a run in the terminal: one line, updated after each hyper-step."""

import weakref
from contextlib import suppress
from typing import Any

from midflight.errors import require_extra, warn


class LiveLine:
    """Shows the optimiser step, tuned values, validation loss and number of restores of a run.

    Pass it to `Tuner` as `on_hyperstep=LiveLine()`. A terminal shows one line, and prints of the loop stand
    above it. A file, a pipe or a notebook gets a line at hyper-steps 1, 2, 4, 8 and so on. If the output
    fails, a warning says so and the line ends, but the run goes on. Copies of the object, such as pickles,
    begin a line of their own on standard output.

    Args:
        total_steps: length of the run in optimiser steps, shown as in "step 40/200"; None leaves it out.
        console: where to write, a `Console` of rich; standard output by default.

    Raises:
        MissingExtra: rich is not installed.
    """

    def __init__(self, total_steps: int | None = None, console: Any = None) -> None:
        require_extra("rich", "study")
        self._total, self._console, self._shown = total_steps, console, 0
        self._live: Any = None
        self._ended = False

    def __call__(self, step: int, numbers: dict[str, float]) -> None:
        """Show the numbers of `Tuner.log` at an optimiser step; do nothing once the line has ended."""
        if self._ended:
            return
        try:
            self._show(self._text(step, numbers))
        except (Exception, SystemExit) as error:  # rich exits if the reader of a pipe has ended
            self.close()
            warn(f"the live line ends, because it cannot be written: {type(error).__name__}: {error}")

    def close(self) -> None:
        """End the line and leave it on the terminal; otherwise it ends with the object or the process."""
        self._ended = True
        if self._live is not None:
            _stop(self._live)

    def __reduce__(self) -> Any:
        return type(self), (self._total,)

    def _text(self, step: int, numbers: dict[str, float]) -> str:
        of = "" if self._total is None else f"/{self._total}"
        values = {name.removeprefix("value/"): x for name, x in numbers.items() if name.startswith("value/")}
        shown = [f"{name} {x:.4g}" for name, x in values.items()]
        loss = numbers.get("valid_loss", float("nan"))
        return " | ".join(
            [f"step {step}{of}", *shown, f"valid loss {loss:.4g}", f"restored {numbers['restored']:.0f}"]
        )

    def _show(self, line: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._console = self._console or Console()
        self._shown += 1
        if not self._console.is_terminal:
            if self._shown.bit_count() == 1:
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
            weakref.finalize(self, _stop, self._live)
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)


def _stop(live: Any) -> None:
    """Give standard output and the cursor back, also if the terminal is gone."""
    with suppress(Exception, SystemExit):
        live.stop()
