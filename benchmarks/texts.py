"""Define texts in ten languages, and a small Transformer that predicts their next byte.

Debian's manual pages in eight languages (apt-get downloads the packages and installs none), the source code
of Python's standard library, and the C++ headers of torch. Files are split by name: a tenth is "valid", a
tenth "test". The texts are kept in the user's cache.
"""

import gzip
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from midflight.datasets import cache_folder

PACKAGES = {
    "english": "manpages", "german": "manpages-de", "french": "manpages-fr", "spanish": "manpages-es",
    "polish": "manpages-pl", "italian": "manpages-it", "dutch": "manpages-nl", "swedish": "manpages-sv",
}  # fmt: skip
SOURCES = ["english", "german", "french", "spanish", "polish", "italian", "python", "c++"]
MOST = 8_000_000
"""Bytes of a text that are kept."""


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of its training.

    Attributes:
        hashed: rows of each hashed embedding.
        context: bytes of a window.
        batch: windows of a batch.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    hashed: int = 8192
    context: int = 64
    batch: int = 16
    steps: int = 600
    lr: float = 5e-3


SMALL = Size()
"""1.19 million weights; 15 seconds of training on one core."""
LARGE = Size(width=512, layers=12, heads=8, hashed=16384, context=512, batch=64, steps=2000, lr=1e-3)
"""55 million weights; for a GPU."""


@cache
def text(name: str) -> dict[str, Tensor]:
    """Return "train", "valid" and "test" of a text as bytes, its files in a fixed order."""
    path = cache_folder(None) / "texts" / f"{name}.npz"
    if not path.exists():
        parts: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
        for file, content in sorted(_files(name), key=lambda pair: sha256(pair[0].encode()).digest()):
            place = sha256(file.encode()).digest()[0] % 10
            parts[{0: "valid", 1: "test"}.get(place, "train")].append(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {part: np.frombuffer(b"\n".join(all_), np.uint8) for part, all_ in parts.items()}
        np.savez_compressed(path, **{part: array[:MOST] for part, array in arrays.items()})
    return {part: torch.from_numpy(array.astype(np.int64)) for part, array in np.load(path).items()}


def _files(name: str) -> list[tuple[str, bytes]]:
    """Return (name, content) of the files of a text."""
    if name in PACKAGES:
        with TemporaryDirectory() as folder:
            download = ["apt-get", "download", PACKAGES[name]]
            subprocess.run(download, cwd=folder, check=True, capture_output=True)
            (package,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
            found = [path for path in Path(folder).glob("usr/share/man/**/*.gz") if not path.is_symlink()]
            return [(path.name, gzip.decompress(path.read_bytes())) for path in found]
    if name == "python":
        place, pattern = Path(sysconfig.get_paths()["stdlib"]), "*.py"
    else:
        place, pattern = Path(torch.__file__).parent / "include/ATen", "*.h"
    return [(path.name, path.read_bytes()) for path in place.glob(pattern)]


class Windows(Dataset[tuple[Tensor]]):
    """Pieces of texts, each with `context` bytes and the next one.

    Args:
        texts: bytes, each of shape (n,).
        context: bytes of a piece.
        length: bytes that are kept of each text, in pieces spread evenly over it; None keeps all.
    """

    def __init__(self, texts: Sequence[Tensor], context: int, length: int | None = None) -> None:
        found = [_spread(text.unfold(0, context + 1, context), context, length) for text in texts]
        self.pieces = found[0] if len(found) == 1 else torch.cat(found)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.pieces[index],)


def _spread(pieces: Tensor, context: int, length: int | None) -> Tensor:
    count = len(pieces) if length is None else length // context
    return pieces if count == len(pieces) else pieces[torch.linspace(0, len(pieces) - 1, count).long()]


class Block(nn.Module):
    """A layer of the Transformer: attention, then a perceptron, each after a normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(self.before(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.perceptron(self.between(x))


class Transformer(nn.Module):
    """Predicts each next byte; the input has hashed embeddings of the last two and three bytes.

    Source of the hashed embeddings: Pagnoni et al. 2024, Byte Latent Transformer, Section 3.2.1.
    """

    def __init__(self, size: Size = SMALL) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, size.width), nn.Embedding(size.context, size.width)
        self.pairs, self.triples = (nn.Embedding(size.hashed, size.width) for _ in range(2))
        for table in (self.bytes, self.places, self.pairs, self.triples):
            nn.init.normal_(table.weight, std=0.05)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm, self.last = nn.LayerNorm(size.width), nn.Linear(size.width, 256)

    def states(self, x: Tensor) -> Tensor:
        """Return the last states, shape (n, length, width), for bytes of shape (n, length)."""
        one, two = F.pad(x, (1, 0))[:, :-1], F.pad(x, (2, 0))[:, :-2]
        hashed = self.pairs.num_embeddings
        pairs = self.pairs((31 * x + 7919 * one) % hashed)
        triples = self.triples((31 * x + 7919 * one + 104729 * two) % hashed)
        places = self.places(torch.arange(x.shape[1], device=x.device))
        found: Tensor = self.norm(self.blocks(self.bytes(x) + pairs + triples + places))
        return found

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.states(x))
        return logits


def losses_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the loss of each window, the mean over its bytes, shape (n,)."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)


@torch.no_grad()
def bits(model: nn.Module, data: Windows) -> float:
    """Return the mean loss in bits per byte."""
    device = next(model.parameters()).device
    model.eval()
    found = [losses_of(model, batch.to(device)) for (batch,) in DataLoader(data, 128)]
    model.train()
    return float(torch.cat(found).mean() / np.log(2))
