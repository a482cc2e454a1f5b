"""The tuner's own way through the user's loaders, and a few examples of a batch."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from midflight.errors import UnusableLoader
from midflight.tuner.randomness import NoRandomness, Randomness

PASS = 100
"""Batches that count as a pass through a loader without an end."""


@dataclass(frozen=True)
class Split:
    """Inputs, shape (n, ...), and targets, shape (n, ...), on one device."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, chosen: Any) -> "Split":
        return Split(self.x[chosen], self.y[chosen])


class Shuffled:
    """Batches (x, y) of a split in a new random order at each pass; an incomplete last one is left out."""

    def __init__(self, split: Split, batch: int, seed: int) -> None:
        self.split = split
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.split) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from _in_order(self.split, self.batch, _order(self.split, self.generator))


class ShuffledForEach:
    """For n seeds what n `Shuffled` would give, stacked: x of shape (n, batch, ...)."""

    def __init__(self, split: Split, batch: int, seeds: Iterable[int]) -> None:
        self.split = split
        self.batch = batch
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        orders = [_order(self.split, generator) for generator in self.generators]
        yield from _in_order(self.split, self.batch, torch.stack(orders))


def _order(split: Split, generator: torch.Generator) -> Tensor:
    return torch.randperm(len(split), generator=generator)


def _in_order(split: Split, batch: int, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    order = order.to(split.x.device)
    for i in range(0, len(split) - batch + 1, batch):
        chosen = order[..., i : i + batch]
        yield split.x[chosen], split.y[chosen]


class EndlessBatches(Iterator[Any]):
    """Goes through a loader again and again; can be put to sleep and woken at the same place.

    The loop's own way through the same loader is left alone: what torch's loaders and samplers keep between
    passes is copied, and random numbers are the tuner's own.

    Args:
        loader: iterable of batches; the same object may serve the training loop.
        name: for messages.
        randomness: the tuner's numbers; None leaves generators alone.

    Raises:
        ValueError: the loader is empty, or an iterator that ran out.
    """

    def __init__(self, loader: Iterable[Any], name: str, randomness: Randomness | None = None) -> None:
        if not hasattr(loader, "__iter__"):
            raise UnusableLoader(
                f"{name} must be an iterable of batches, such as a DataLoader or a list, but got "
                f"{type(loader).__name__}."
            )
        self.loader = loader if randomness is None else own_copy(loader)
        self._name = name
        self._randomness = randomness or NoRandomness()
        self._iterator: Iterator[Any] | None = None
        self._states: list[Any] | None = None
        self._used = 0

    def __next__(self) -> Any:
        with self._randomness.borrowed():
            if self._iterator is None:
                self._begin()
            assert self._iterator is not None
            try:
                batch = next(self._iterator)
            except StopIteration:
                if self._used == 0 or self._iterator is self.loader:
                    raise ValueError(
                        f"{self._name} must give batches each time it is iterated, but gave none; "
                        "pass a DataLoader or a list rather than a generator that runs out."
                    ) from None
                self._begin()
                return next(self)
            self._used += 1
            return batch

    @property
    def repeats(self) -> bool:
        """Whether a pass can be made again."""
        return not isinstance(self.loader, Iterator)

    def whole_pass(self) -> Iterator[Any]:
        """Every batch once, from the beginning; of a loader without an end the first `PASS`."""
        with self._randomness.borrowed():
            ends = hasattr(self.loader, "__len__")
            for n, batch in enumerate(iter(self.loader)):
                if not ends and n >= PASS:
                    return
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"used": self._used, "states": self._states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        if state["states"] is None:
            self._iterator, self._states, self._used = None, None, 0
            return
        with self._randomness.borrowed():
            now = self._randomness.snapshot()
            self._randomness.rewind(state["states"])
            self._begin()
            assert self._iterator is not None
            for _ in range(state["used"]):
                next(self._iterator)
                self._used += 1
            self._randomness.rewind(now)

    def _begin(self) -> None:
        self._states = self._randomness.snapshot()
        self._iterator = iter(self.loader)
        self._used = 0


def own_copy(loader: Any) -> Any:
    """A loader with what it keeps between passes copied, such as counters; data and random numbers are
    shared.

    What cannot be copied safely, an iterator or an object with a finalizer, is returned as it is.
    """
    kind = type(loader)
    if isinstance(loader, Iterator) or hasattr(kind, "__del__") or not hasattr(loader, "__dict__"):
        return loader
    own = copy.copy(loader)
    parts = {name: own_copy(value) for name, value in vars(loader).items() if isinstance(value, DataLoader)}
    if isinstance(loader, DataLoader):
        parts["_iterator"] = None  # of persistent workers
        parts |= {
            name: copy.copy(part)
            for name in ("sampler", "batch_sampler")
            if (part := getattr(loader, name, None)) is not None
        }
        if getattr(parts.get("batch_sampler"), "sampler", None) is loader.sampler:
            parts["batch_sampler"].sampler = parts["sampler"]
        if isinstance(loader.dataset, IterableDataset):
            parts["dataset"] = copy.copy(loader.dataset)
    own.__dict__.update(parts)  # past DataLoader's guard against changes
    return own


def require_many_passes(loader: Any, name: str) -> None:
    """Raise `UnusableLoader` for an iterator: each batch the tuner takes would be missing in the loop."""
    if isinstance(loader, Iterator):
        raise UnusableLoader(
            f"{name} must be iterable anew at each pass, such as a DataLoader or a list, but got the "
            f"iterator {type(loader).__name__}: batches taken by the tuner would be missing in the loop."
        )


def examples_of(batch: Any) -> int | None:
    """How many examples a batch has: the first dimension that its arrays share; None if they share none."""
    sizes = {len(array) for array in _arrays(batch)}
    return sizes.pop() if len(sizes) == 1 else None


def first_examples(batch: Any, count: int) -> Any:
    """The first `count` examples of a batch; the batch itself where they cannot be told apart."""
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


def _cut(batch: Any, size: int, count: int) -> Any:
    if isinstance(batch, Tensor | np.ndarray):
        return batch[:count] if batch.ndim else batch
    if isinstance(batch, Mapping):
        cut = {key: _cut(value, size, count) for key, value in batch.items()}
        return cut if type(batch) is dict else _rebuilt(batch, cut)
    if isinstance(batch, list | tuple):
        if len(batch) == size and not any(True for _ in _arrays(batch)):  # such as names of files
            return batch[:count]
        parts = [_cut(value, size, count) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _rebuilt(batch: Mapping[Any, Any], cut: dict[Any, Any]) -> Any:
    """A mapping of another type, such as a tokenizer's output, with other values."""
    new = copy.copy(batch)
    for key, value in cut.items():
        new[key] = value  # type: ignore[index]
    return new
