"""Save and resume an object by the names of its attributes."""

from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor


class Saved:
    """Saves the attributes named in SAVED, those of its base classes too, and restores them.

    Both make copies, so a state stays as it was while the run goes on. An attribute that has a `state_dict`
    of its own is saved and restored by it.
    """

    SAVED: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume."""
        return {name.lstrip("_"): _saved(getattr(self, name)) for name in self._saved_names()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        for name in self._saved_names():
            value, saved = getattr(self, name), state[name.lstrip("_")]
            if isinstance(value, Saved):
                value.load_state_dict(saved)
            elif hasattr(value, "load_state_dict"):
                value.load_state_dict(copied(saved))
            else:
                setattr(self, name, copied(saved))

    def _saved_names(self) -> list[str]:
        return [name for kind in reversed(type(self).__mro__) for name in vars(kind).get("SAVED", ())]


def _saved(value: Any) -> Any:
    if isinstance(value, Saved):
        return value.state_dict()
    return copied(value.state_dict() if hasattr(value, "state_dict") else value)


def copied(value: Any) -> Any:
    """Return a copy of tensors, numbers and text in dicts, lists, tuples, sets and deques."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    if type(value) in (list, tuple, set, deque):
        return type(value)(map(copied, value))
    return value
