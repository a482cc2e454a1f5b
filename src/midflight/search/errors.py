"""What can go wrong in a search."""

from typing import TYPE_CHECKING

from midflight.errors import MidflightError

if TYPE_CHECKING:
    from midflight.search.search import Result


class SearchError(MidflightError, ValueError):
    """A search that cannot be as it was asked for."""


class StorageLost(MidflightError, OSError):
    """The storage of a search could be reached, and then no longer."""

    exit_code = 1


class ObjectiveFailed(MidflightError, RuntimeError):
    """The first trials all failed, so the next ones would."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a search.

    Attributes:
        result: what was found until then.
    """

    def __init__(self, result: "Result") -> None:
        super().__init__("the search was interrupted")
        self.result = result
