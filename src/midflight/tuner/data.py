"""Read the user's loaders without disturbing the loop, and cut batches to a few examples."""

import copy
import io
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from midflight.errors import InvalidLoss, UnusableLoader
from midflight.tuner.randomness import (
    DEPTH,
    ENTRIES,
    Randomness,
    generators,
    held,
    parts_of,
    plain,
    restored,
)

PASS = 100
"""Batches that count as one pass through a loader of unknown length."""


class EndlessBatches(Iterator[Any]):
    """Iterates over a loader again and again, and can resume at the same place.

    The loop may iterate over the same loader and is not disturbed: what torch's loaders and samplers keep
    between passes is copied, and random numbers are the tuner's own.

    Args:
        loader: iterable of batches; the training loop may use the same object.
        name: of the argument, for messages.

    Raises:
        UnusableLoader: the loader is not iterable, or has no batch; the latter may show when it is read.

    Attributes:
        loader: the copy being read; the user's own loader before the first pass.
        examples: how many the last batch had; None if they cannot be counted.
    """

    def __init__(self, loader: Iterable[Any], name: str, randomness: Randomness) -> None:
        if not hasattr(loader, "__iter__"):
            raise UnusableLoader(
                f"{name} must be an iterable of batches, such as a DataLoader or a list, but got "
                f"{type(loader).__name__}."
            )
        if isinstance(loader, DataLoader | list | tuple) and batches_of(loader) == 0:
            raise _empty(name, loader)
        self._theirs = self.loader = loader
        self._name = name
        self._randomness = randomness
        self._iterator: Iterator[Any] | None = None
        self._states: list[Any] | None = None
        self._used = 0
        self.examples: int | None = None

    def __next__(self) -> Any:
        with self._randomness.borrowed():
            if self._iterator is None:
                self._begin()
            assert self._iterator is not None
            try:
                batch = next(self._iterator)
            except StopIteration:
                if self._used == 0 or self._iterator is self.loader:
                    raise _empty(self._name, self.loader) from None
                self._begin()
                return next(self)
            self._used += 1
            self.examples = examples_of(batch)
            return batch

    @property
    def repeats(self) -> bool:
        """Whether a second pass is possible."""
        return not isinstance(self.loader, Iterator)

    def whole_pass(self) -> Iterator[Any]:
        """Yield every batch once, from the beginning; the first `PASS` if the length is not known."""
        with self._randomness.borrowed():
            loader = own_copy(self._theirs)
            yield from islice(iter(loader), batches_of(loader) or PASS)

    def close(self) -> None:
        """End worker processes; `state_dict` still gives the place in the data."""
        self._iterator, self.loader = None, self._theirs

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data."""
        return {"used": self._used, "states": plain(self._states), "examples": self.examples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`, by reading the current pass up to the same batch."""
        self.examples = state.get("examples")
        if state["states"] is None:
            self._iterator, self._states, self._used = None, None, 0
        else:
            self._read_to(state)

    def read_again(self, state: Mapping[str, Any]) -> Any:
        """Return the batch after which `state_dict` gave this state, from a pass of its own."""
        return EndlessBatches(self._theirs, self._name, self._randomness)._read_to(state)

    def _read_to(self, state: Mapping[str, Any]) -> Any:
        """Read the pass of a state up to its last batch, and return that."""
        batch = None
        with self._randomness.borrowed():
            now = self._randomness.snapshot()
            self._randomness.rewind(restored(state["states"]))
            self._begin()
            assert self._iterator is not None
            for _ in range(state["used"]):
                batch = next(self._iterator)
                self._used += 1
            self._randomness.rewind(now)
        return batch

    def _begin(self) -> None:
        self._states = self._randomness.snapshot()
        # at each pass, because the loop may call `sampler.set_epoch(n)` in between
        self.loader = own_copy(self._theirs)
        self._iterator = iter(self.loader)
        self._used = 0


def _empty(name: str, loader: Iterable[Any]) -> UnusableLoader:
    cause = (
        "pass a DataLoader or a list rather than a generator that runs out."
        if isinstance(loader, Iterator)
        else "is its dataset empty, or smaller than batch_size with drop_last=True?"
    )
    return UnusableLoader(f"{name} must give batches each time it is iterated, but gave no batch; {cause}")


def batches_of(loader: Iterable[Any]) -> int | None:
    """Return the number of batches in a pass; None if it is not known."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # a `DataLoader` of a stream has `__len__` too
        return None


def own_copy(loader: Any) -> Any:
    """Return a copy of a loader and of all that its parts keep between passes, such as counters and caches.

    Arrays, functions and random generators are shared. So is what cannot be copied safely: iterators,
    objects with a finalizer, large containers.
    """
    return _copied(loader, {}, DEPTH, ROOM)


ROOM = 10_000
"""The most entries that are copied of a container, including those of containers within it."""


def _copied(thing: Any, known: dict[int, Any], depth: int, room: int) -> Any:
    if id(thing) in known:
        return known[id(thing)]
    if depth == 0 or _is_shared(thing):
        return thing
    if type(thing) in _CONTAINERS:
        if len(thing) > min(ENTRIES, room):
            return thing
        room //= max(1, len(thing))
        if isinstance(thing, dict):
            own: Any = {key: _copied(value, known, depth - 1, room) for key, value in thing.items()}
        else:
            own = type(thing)(_copied(value, known, depth - 1, room) for value in thing)
        known[id(thing)] = own
        return own
    try:
        own = copy.copy(thing)
    except Exception:  # whatever the user's class says to being copied
        return thing
    known[id(thing)] = own
    if own is thing:  # its `__copy__` asks for sharing
        return own
    parts = {name: _copied(value, known, depth - 1, room) for name, value in vars(thing).items()}
    if isinstance(thing, DataLoader):
        parts["_iterator"] = None  # persistent workers belong to the loop's own iterator
    own.__dict__.update(parts)  # DataLoader forbids setting attributes
    return own


_CONTAINERS = (list, tuple, dict, set)
_SHARED = (*_CONTAINERS, Iterator, Tensor, np.ndarray, nn.Module, type, FunctionType, ModuleType, partial)


def _is_shared(thing: Any) -> bool:
    kind = type(thing)
    if kind in _CONTAINERS:  # subclasses of these may not be copied safely
        return False
    return (
        isinstance(thing, (*_SHARED, *generators()))
        or kind.__module__ == "builtins"
        or hasattr(kind, "__del__")
        or not hasattr(thing, "__dict__")
    )


def same_data(a: Any, b: Any) -> bool:
    """Return whether two loaders are the same, or are DataLoaders that read all of the same dataset."""
    both = [loader for loader in (a, b) if isinstance(loader, DataLoader)]
    return a is b or (len(both) == 2 and a.dataset is b.dataset and all(map(_reads_all, both)))


def _reads_all(loader: DataLoader[Any]) -> bool:
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    return type(sampler) in (RandomSampler, SequentialSampler)


def require_many_passes(loader: Any, name: str) -> None:
    """Raise `UnusableLoader` for an iterator, because the loop would miss each batch that the tuner takes."""
    if isinstance(loader, Iterator):
        raise UnusableLoader(
            f"{name} must be iterable anew at each pass, such as a DataLoader or a list, but got the "
            f"iterator {type(loader).__name__}: batches taken by the tuner would be missing in the loop."
        )
    by_passes = not isinstance(loader, Dataset) and _is_read_by_index(loader)  # the loop iterates over it
    for thing in held(parts_of(loader) if by_passes else [loader], (Iterator, io.IOBase), _kept):
        if not isinstance(thing, io.IOBase) or (not thing.closed and thing.readable()):
            raise UnusableLoader(
                f"{name} must open its files and make its iterators anew at each pass, but keeps the "
                f"{type(thing).__name__} that the loop reads: rows taken by the tuner would be missing in "
                "the loop. Call open or iter in __iter__."
            )


def _kept(thing: Any) -> list[Any]:
    """Return what a loader keeps while it is read, without datasets that are read by index."""
    if _is_read_by_index(thing):
        return []
    if isinstance(thing, DataLoader):  # `own_copy` drops its iterator
        return [value for name, value in vars(thing).items() if name != "_iterator"]
    return parts_of(thing)


def _is_read_by_index(thing: Any) -> bool:
    """Return whether this is a map-style dataset: of torch, or of a class like that of Hugging Face."""
    if isinstance(thing, IterableDataset | Mapping | list | tuple):
        return False
    return isinstance(thing, Dataset) or all(hasattr(type(thing), m) for m in ("__getitem__", "__len__"))


def require_no_iterators(function: Any, name: str) -> None:
    """Raise `InvalidLoss` for a loss that reads an iterator: the loop would miss what the tuner takes."""
    for thing in held([function], Iterator, _of_functions):
        if not isinstance(thing, io.IOBase):
            raise InvalidLoss(
                f"{name} must not take anything out of an iterator, but reads the "
                f"{type(thing).__name__} that it closes over: what the tuner takes would be missing in the "
                "loop. Take it from the batch."
            )


def _of_functions(thing: Any) -> list[Any]:
    return parts_of(thing) if isinstance(thing, FunctionType | MethodType | partial) else []


def fresh(batch: Any, copies: bool = False) -> Any:
    """Return the batch in new containers and objects, because a loss may change them.

    Inference tensors, which have no derivative, are copied.

    Args:
        copies: whether tensors are copied too, because a loss may write to them. Those that require a
            gradient cannot be written in place.
    """
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() or (copies and not batch.requires_grad) else batch
    if isinstance(batch, MutableMapping):
        own = copy.copy(batch)
        for key, value in batch.items():
            if (new := fresh(value, copies)) is not value:
                own[key] = new
        return own
    if isinstance(batch, list | tuple):
        parts = [fresh(value, copies) for value in batch]
        if type(batch) is list:
            return parts
        if any(new is not value for new, value in zip(parts, batch, strict=True)):
            return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
        return batch
    if hasattr(batch, "__dict__") and not isinstance(batch, nn.Module | type) and not callable(batch):
        own = copy.copy(batch)
        for name in _parts_of_dataclass(batch):
            own.__dict__[name] = fresh(getattr(batch, name), copies)  # also if the dataclass is frozen
        return own
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors in a batch."""
    return [array for array in _arrays(batch) if isinstance(array, Tensor)]


def examples_of(batch: Any) -> int | None:
    """Return how many examples a batch has: the length of its arrays.

    None if their lengths differ, or if one is sparse or nested, such as the adjacency of a graph.
    """
    arrays = list(_arrays(batch))
    if any(isinstance(a, Tensor) and (a.is_nested or a.layout is not torch.strided) for a in arrays):
        return None
    sizes = {len(array) for array in arrays}
    return sizes.pop() if len(sizes) == 1 else None


def first_examples(batch: Any, count: int) -> Any:
    """Return the first `count` examples of a batch; the batch itself if they cannot be counted."""
    size = examples_of(batch)
    return batch if size is None or size <= count else _cut(batch, size, count)


def _arrays(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Tensor | np.ndarray):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _arrays(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _arrays(value)
    elif parts := _parts_of_dataclass(batch):
        yield from _arrays(parts)


def _cut(batch: Any, size: int, count: int) -> Any:
    if isinstance(batch, Tensor | np.ndarray):
        return batch[:count] if batch.ndim else batch
    if isinstance(batch, Mapping):
        own: Any = copy.copy(batch)  # keeps the type, such as that of a tokenizer's output
        for key, value in batch.items():
            own[key] = _cut(value, size, count)
        return own
    if isinstance(batch, list | tuple):
        if len(batch) == size and not any(True for _ in _arrays(batch)):  # such as file names, one each
            return batch[:count]
        parts = [_cut(value, size, count) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    cut = {name: _cut(value, size, count) for name, value in _parts_of_dataclass(batch).items()}
    return replace(batch, **cut) if cut else batch


def _parts_of_dataclass(batch: Any) -> dict[str, Any]:
    """Return field -> value; empty for anything but a dataclass."""
    if not is_dataclass(batch) or isinstance(batch, type):
        return {}
    return {part.name: getattr(batch, part.name) for part in fields(batch) if part.init}
