"""The exceptions of a search."""

from typing import Any

from midflight.errors import MidflightError


class SearchError(MidflightError, ValueError):
    """An argument or the storage of a search is invalid."""


class StorageLost(MidflightError, OSError):
    """The storage failed during a search."""

    exit_code = 1


class ObjectiveFailed(MidflightError, RuntimeError):
    """The first trials all failed, so the search stopped."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed during a search.

    Attributes:
        result: the `Result` so far.
    """

    def __init__(self, result: Any) -> None:
        super().__init__("the search was interrupted")
        self.result = result
