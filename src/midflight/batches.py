"""Data in memory, batches of it in random order, and an endless stream of any loader's batches."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

    A loader that shuffles draws its order when a pass begins, from its own generator or the global
    one. The state keeps that generator as it was then, so that a restored stream draws the same.

    Raises:
        ValueError: the loader is empty.
    """

    def __init__(self, loader: Iterable[Any], name: str) -> None:
        self.loader = loader
        self._name = name
        self._begin()

    def __next__(self) -> Any:
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._used == 0:
                raise ValueError(
                    f"{self._name} must give at least one batch each time it is iterated, but gave none; "
                    "pass a DataLoader or a list rather than a generator that runs out."
                ) from None
            self._begin()
            return next(self)
        self._used += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"used": self._used, "random_state": self._random_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken; the global generator is left as it is."""
        generator = self._generator()
        global_state = torch.get_rng_state()
        generator.set_state(state["random_state"])
        self._begin()
        for _ in range(state["used"]):
            next(self)
        torch.set_rng_state(global_state)

    def _begin(self) -> None:
        self._random_state = self._generator().get_state()
        self._iterator = iter(self.loader)
        self._used = 0

    def _generator(self) -> torch.Generator:
        own = getattr(self.loader, "generator", None)
        return own if isinstance(own, torch.Generator) else torch.default_generator
