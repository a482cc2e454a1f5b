"""Save a training in one file, with all that a bit-for-bit continuation needs.

A file holds tensors and plain values only, so loading one from a shared folder cannot run code.
"""

import io
import pickle
import random
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from midflight._reporting.files import replacing
from midflight.errors import warn
from midflight.search.errors import SearchError, StorageLost


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
    """A training after an epoch.

    Attributes:
        points: its reports so far.
        state: what the objective reported.
        random_state: of the global generators, see `random_state`.
        config: configuration that was trained; another one if population-based training copied the file.
    """

    points: list[Point]
    state: Any
    random_state: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the file; a reader never sees a part of it.

        Raises:
            SearchError: the state holds something else than tensors and plain values.
            StorageLost: the folder cannot be written, for instance because the disk is full.
        """
        content = io.BytesIO()
        torch.save({**vars(self), "points": [asdict(point) for point in self.points]}, content)
        if len(self.points) == 1:
            _read(content, f"the state of {path.name}")  # fails at the first report
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_bytes(content.getbuffer())
        except OSError as error:
            raise StorageLost(
                f"checkpoints must be written to {path.parent}, but {error.strerror or error}; the trials "
                "stay unfinished, and the same command continues them when there is space."
            ) from error


def load(path: Path) -> Checkpoint | None:
    """Load the checkpoint in `path`; return None if there is none.

    Raises:
        SearchError: the file holds more than tensors and plain values, or is damaged.
        StorageLost: the file cannot be read.
    """
    try:
        content = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageLost(
            f"the checkpoint {path} must be readable, but {error.strerror or error}; its trial stays "
            "unfinished."
        ) from error
    try:
        broken = zipfile.ZipFile(content).testzip()  # torch does not compare the checksums
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        broken = str(error) or type(error).__name__
    if broken:
        raise SearchError(f"a checkpoint must be whole, but {path.name} is damaged ({broken}).")
    saved = _read(content, path.name)
    try:
        return Checkpoint(**{**saved, "points": [Point(**point) for point in saved["points"]]})
    except (TypeError, KeyError) as error:
        raise SearchError(
            f"{path.name} must be a checkpoint of a search, but it is not ({error})."
        ) from error


def load_or_drop(path: Path) -> Checkpoint | None:
    """Load a checkpoint; warn and delete it if it cannot be used, so that the trial begins anew."""
    try:
        return load(path)
    except SearchError as error:
        path.unlink(missing_ok=True)
        warn(f"a trial begins anew: {error}")
        return None


def _read(content: io.BytesIO, name: str) -> Any:
    content.seek(0)
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise SearchError(
            f"a checkpoint must hold tensors, strings, numbers and lists or dicts of them, but {name} "
            f"does not ({str(error).splitlines()[0]}); pass such a state to `trial.report`, and convert "
            "arrays by torch.from_numpy."
        ) from error


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
    random.setstate(state["random"])


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
