"""Validation data that changes at each pass, so that one run trains on all of the data."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class Rotation:
    """T1 and T2 as two samplers of one dataset: the data in `folds` parts, each in its turn T2.

        rotation = mf.Rotation(len(dataset), folds=5)
        train_loader = DataLoader(dataset, batch_size=128, sampler=rotation.train)
        valid_loader = DataLoader(dataset, batch_size=256, sampler=rotation.valid)

    A new pass through `train` moves on to the next fold, and a pass through `valid` that is still under
    way ends there. Validation data has then been trained on in earlier passes: it still ranks the next
    step, but its loss no longer tells memorising from learning. Measured in docs/running.md; leave it
    out unless data are so few that holding out T2 for good costs more.

    Args:
        length: of the dataset.
        folds: parts, 2 <= folds <= length.
        seed: of the parts and of the orders.

    Attributes:
        train: sampler of everything but the current fold; each pass begins the next fold.
        valid: sampler of the current fold.
        seen: sampler of the same as `train` that leaves the fold as it is, for the tuner's train_loader.

    Raises:
        ValueError: 2 <= folds <= length does not hold.
    """

    def __init__(self, length: int, folds: int = 5, seed: int = 0) -> None:
        if not 2 <= folds <= length:
            raise ValueError(f"2 <= folds <= {length}, the length, must hold, but folds={folds}.")
        self.generator = torch.Generator().manual_seed(seed)
        self._parts = torch.randperm(length, generator=self.generator).chunk(folds)
        self.fold = 0
        self._begun = False
        self.train: Sampler[int] = _Part(self, held_out=False, turns=True)
        self.valid: Sampler[int] = _Part(self, held_out=True, turns=False)
        self.seen: Sampler[int] = _Part(self, held_out=False, turns=False)

    def __copy__(self) -> "Rotation":
        return self  # the samplers must agree on the fold

    def turn(self) -> None:
        """On to the next fold; the first call stays at the first."""
        self.fold = (self.fold + self._begun) % len(self._parts)
        self._begun = True

    def indices(self, held_out: bool) -> torch.Tensor:
        """Of the current fold, or of all the others."""
        others = [part for i, part in enumerate(self._parts) if (i == self.fold) == held_out]
        return torch.cat(others)


class _Part(Sampler[int]):
    def __init__(self, rotation: Rotation, held_out: bool, turns: bool) -> None:
        self._rotation, self._held_out, self._turns = rotation, held_out, turns

    def __len__(self) -> int:
        return len(self._rotation.indices(self._held_out))

    def __iter__(self) -> Iterator[int]:
        if self._turns:
            self._rotation.turn()
        fold, chosen = self._rotation.fold, self._rotation.indices(self._held_out)
        for i in torch.randperm(len(chosen), generator=self._rotation.generator):
            if self._rotation.fold != fold:
                return
            yield int(chosen[i])
