"""Collect the named hyperparameters of a run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from midflight._tensors import Tensors
from midflight.errors import SpaceError, UnknownName
from midflight.space.hyperparameter import Hyperparameter
from midflight.space.specs import Categorical, Float, Int, Shares, Value
from midflight.space.transforms import Simplex, Transform


class Space:
    """The named hyperparameters of a run: a mapping from name to `Hyperparameter`.

    Args:
        specs: name -> `Float`, `Mixture` or `ExampleWeights`, for names that are not Python identifiers.
        dtype: dtype of the raw coordinates; default: torch's default dtype.
        named: the same as keywords: `Space(noise=Float(0, 0.8))`.

    Raises:
        SpaceError: the space is empty, a name is not printable text, an entry is not a `Float`, or its range
            does not fit `dtype`.
    """

    def __init__(
        self,
        specs: Mapping[str, Float | Hyperparameter] | None = None,
        /,
        *,
        dtype: torch.dtype | None = None,
        **named: Float | Hyperparameter,
    ) -> None:
        specs = {**(specs or {}), **named}
        if not specs:
            raise SpaceError("a Space needs at least one hyperparameter, such as noise=Float(0, 0.8).")
        for name, spec in specs.items():
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise SpaceError(
                    f"a hyperparameter's name must be a printable text that is not empty, but got {name!r}."
                )
            if isinstance(spec, Int | Categorical):
                raise SpaceError(
                    f"{name} must be a Float, but is {spec!r}, which has no gradient; "
                    "declare it in a midflight.search.Space instead."
                )
            if not isinstance(spec, Float | Hyperparameter):
                raise SpaceError(f"{name} must be a Float, but got {spec!r}; write {name}={_written(spec)}.")
        shared = [id(spec) for spec in specs.values() if isinstance(spec, Hyperparameter)]
        if len(set(shared)) < len(shared):
            raise SpaceError(
                f"each name must have a hyperparameter of its own, but two of {list(specs)} share one."
            )
        dtype = dtype or torch.get_default_dtype()
        self._entries = {
            name: spec.named(name, dtype)
            if isinstance(spec, Hyperparameter)
            else Hyperparameter(name, spec, dtype)
            for name, spec in specs.items()
        }

    def __getitem__(self, name: str) -> Hyperparameter:
        if name not in self._entries:
            raise UnknownName("a hyperparameter of this space", name, self._entries)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._entries.values()))

    @property
    def raws(self) -> Tensors:
        """The unit coordinates that the tuner moves, name -> leaf tensor in [0, 1]."""
        return {name: entry.raw for name, entry in self._entries.items()}

    def values(self, raws: Tensors | None = None) -> Tensors:
        """Return what the model sees, name -> tensor; at other raw coordinates if these are given."""
        if raws is None:
            return {name: entry.value for name, entry in self._entries.items()}
        return {name: self[name].transform.value(raw) for name, raw in raws.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return the current values as numbers, or as nested lists for a hyperparameter with a shape."""
        return {name: entry.tolist() for name, entry in self._entries.items()}

    def set(self, **values: Value) -> None:
        """Set the named hyperparameters to these values; raise `SpaceError` outside their bounds."""
        for name, value in values.items():
            self[name].set(value)

    def requires_grad_(self, flag: bool = True) -> None:
        """Set whether autograd records later uses of the hyperparameters."""
        for entry in self._entries.values():
            entry.raw.requires_grad_(flag)

    @contextmanager
    def seeing(self, values: Tensors) -> Iterator[None]:
        """Replace values while the context is active; the raw tensors of these names are ignored."""
        try:
            for name, value in values.items():
                self[name]._seen = value
            yield
        finally:
            for name in values:
                self[name]._seen = None

    def state_dict(self) -> dict[str, Any]:
        """Return the raw coordinates and their ranges, to save with the model's state."""
        return {
            "raw": {name: entry.raw.detach().clone() for name, entry in self._entries.items()},
            "range": {name: _range(entry.spec) for name, entry in self._entries.items()},
            "parts": {name: list(entry.parts()) for name, entry in self._entries.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Values stay the same if ranges have changed.

        Raises:
            SpaceError: names, sources or shapes differ, or a value lies outside its range. Nothing changes
                then.
        """
        if set(state["raw"]) != set(self._entries):
            raise SpaceError(
                f"the saved space has {sorted(state['raw'])}, but this one has {sorted(self._entries)}; "
                "build the same space before loading."
            )
        for name, entry in self._entries.items():
            own = list(entry.parts())
            for saved, now in zip(state.get("parts", {}).get(name, own), own, strict=False):
                if saved != now:
                    raise SpaceError(f"the saved space has {saved} where this one has {now}; build the same.")
        raws = {
            name: _moved(entry, state["raw"][name], state.get("range", {}).get(name))
            for name, entry in self._entries.items()
        }
        with torch.no_grad():
            for name, raw in raws.items():
                self[name].raw.copy_(raw)


def _written(spec: object) -> str:
    """Return what to write in place of something that is no `Float`."""
    pair = isinstance(spec, tuple | list) and len(spec) == 2
    return f"mf.Float({spec[0]!r}, {spec[1]!r})" if pair else "mf.Float(low, high)"  # type: ignore[index]


def _range(spec: Float) -> tuple[float, float, str]:
    if isinstance(spec, Shares):
        return float(spec.ratio), float(spec.floor), "simplex"
    return float(spec.low), float(spec.high), "log" if spec.log else "logit" if spec.logit else "linear"


def _transform(saved: Sequence[Any]) -> Transform:
    """Return the transform of a saved range, the inverse of `_range`."""
    a, b, scale = saved
    if scale == "simplex":
        return Simplex(0.0, 1.0, a, b)
    return Float(a, b, log=scale == "log", logit=scale == "logit").transform


def _moved(entry: Hyperparameter, raw: Tensor, saved: Sequence[Any] | None) -> Tensor:
    """Convert `raw` from the range `saved` to the range of `entry`; None means the same range."""
    spec = entry.spec
    if raw.shape != spec.shape:
        raise SpaceError(f"{entry.name} must have shape {spec.shape}, but was saved with {tuple(raw.shape)}.")
    if saved is None or tuple(saved) == _range(spec):
        return raw
    value = _transform(saved).value(raw.double())
    try:
        return spec.transform.raw(spec.check(value)).clamp(0, 1)
    except SpaceError as error:
        raise SpaceError(f"the saved {entry.name} does not fit: {error}") from None
