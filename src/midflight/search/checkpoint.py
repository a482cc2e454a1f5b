"""Save a training in one file, with all that a bit-for-bit continuation needs.

A file holds tensors and plain values only, so loading one from a shared folder cannot run code.
"""

import pickle
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from midflight._reporting.files import replacing
from midflight.search.errors import SearchError


@dataclass(frozen=True)
class Point:
    """A trial's report after an epoch.

    Attributes:
        epoch: epochs done, from 1.
        loss: validation loss, which the search minimises.
        online: values of the tuned hyperparameters.
        extra: other numbers, such as a test error; shown, but never used.
    """

    epoch: int
    loss: float
    online: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A training after an epoch: its reports so far, the objective's state, and the random state."""

    points: list[Point]
    state: Any
    random_state: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the file; a reader never sees a part of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            torch.save({**vars(self), "points": [asdict(point) for point in self.points]}, part)


def load(path: Path) -> Checkpoint | None:
    """Load the checkpoint in `path`; return None if there is none.

    Raises:
        SearchError: the file holds more than tensors and plain values, or is damaged.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise SearchError(
            f"a checkpoint must hold tensors, strings, numbers and lists or dicts of them, but {path.name} "
            f"does not ({str(error).splitlines()[0]}); pass such a state to `trial.report`, and convert "
            "arrays by torch.from_numpy."
        ) from error
    return Checkpoint([Point(**point) for point in saved["points"]], saved["state"], saved["random_state"])


def random_state() -> dict[str, Any]:
    """Return the state of the global generators of torch, numpy and random."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "random": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the state of the global generators."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["random"]
    random.setstate((version, tuple(internal), gauss))


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
