"""Count hyper-steps whose losses or hypergradients are not finite, and shorten the next ones."""

from midflight.tuner.saved import Saved

PATIENCE = 3
"""Failed hyper-steps in a row after which their length is halved."""
RECOVERY = 10
"""Good hyper-steps in a row after which a halved length doubles again."""


class Failures(Saved):
    """Counts hyper-steps that were not finite, which are left out, and shortens the next ones.

    Attributes:
        skipped: failed hyper-steps so far.
        shrink: the factor on the length of hyper-steps. It halves after PATIENCE failures in a row, and
            doubles after RECOVERY good hyper-steps in a row, up to 1.
    """

    SAVED = ("skipped", "shrink", "_row")

    def __init__(self) -> None:
        self.skipped = 0
        self.shrink = 1.0
        self._row = 0  # > 0: failures in a row; < 0: good ones

    def good(self) -> None:
        """Count a hyper-step with finite values."""
        self._row = min(self._row, 0) - 1
        if self._row % RECOVERY == 0:
            self.shrink = min(1.0, 2 * self.shrink)

    def failed(self) -> None:
        """Count a failure. A single bad batch costs no more than its own hyper-step."""
        self._row = max(self._row, 0) + 1
        self.skipped += 1
        if self._row % PATIENCE == 0:
            self.shrink /= 2

    def report(self) -> list[str]:
        """Return a sentence if hyper-steps failed."""
        if not self.skipped:
            return []
        steps = "hyper-step was" if self.skipped == 1 else "hyper-steps were"
        return [f"{self.skipped} {steps} left out: a loss or hypergradient was not finite."]
