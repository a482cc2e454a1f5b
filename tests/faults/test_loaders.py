"""A tuner that cannot move anything leaves no trace: data order, weights and random numbers are the loop's own."""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from loops import Still
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

import midflight as mf

ROWS, BATCH = 22, 5
GLOBAL_NUMPY = np.random.default_rng(3)
GLOBAL_TORCH = torch.Generator()
GLOBAL_PYTHON = random.Random(3)


def rows(count: int = ROWS) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


class Rows(Dataset):
    """Rows whose first input is changed by `transform`."""

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.rows, self.transform = rows(), transform

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows[i]
        return self.transform(x), y


class Own:
    """A transform with a generator of its own."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.draw()


class Slotted:
    """The same without a `__dict__`."""

    __slots__ = ("generator",)

    def __init__(self) -> None:
        self.generator = np.random.default_rng(5)

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.generator.random()


class Ageing(Dataset):
    """Rows that depend on how many were read before."""

    def __init__(self) -> None:
        self.rows, self.read = rows(), 0

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        x, y = self.rows[i]
        return x + self.read, y


class Cached(Dataset):
    """Rows that are drawn at random when they are first read, and kept."""

    def __init__(self) -> None:
        self.rows, self.kept = rows(), {}

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows[i]
        if i not in self.kept:
            self.kept[i] = x + torch.randn(3)
        return self.kept[i], y


class Turning(Sampler[int]):
    """An order that depends on how many passes came before."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        yield from ((7 * self.passes + i) % ROWS for i in range(ROWS))


class OwnBatches(Sampler[list[int]]):
    """Batches of indices from a generator of Python's."""

    def __init__(self) -> None:
        self.random = random.Random(5)

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(4):
            yield self.random.sample(range(ROWS), BATCH)


class Stream(IterableDataset):
    """A stream of rows with an end."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from iter(rows())


class Endless(IterableDataset):
    """A stream of random rows without an end."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.randn(3)
            yield x, (x.sum() > 0).long()


class Continued(IterableDataset):
    """A stream that goes on where the pass before ended."""

    def __init__(self) -> None:
        self.place, self.rows = 0, rows()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(12):
            self.place += 1
            yield self.rows[self.place % ROWS]


class Custom:
    """A loader of a user's own, with a generator and a counter of its own."""

    def __init__(self, generator: Any) -> None:
        self.generator, self.passes, self.rows = generator, 0, rows()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        for _ in range(4):
            yield self.rows[self._chosen()]

    def _chosen(self) -> list[int]:
        if isinstance(self.generator, torch.Generator):
            return torch.randint(ROWS, (BATCH,), generator=self.generator).tolist()
        draw = getattr(self.generator, "randrange", None) or getattr(self.generator, "integers", None)
        return [int((draw or self.generator.randint)(ROWS)) + 0 * self.passes for _ in range(BATCH)]


class Wrapped:
    """What moves batches of another loader to a device, say."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield tuple(part.clone() for part in batch)


class WithAttributes(DataLoader):
    """A subclass that counts its passes, as those of libraries do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        torch.manual_seed(self.passes)  # such as a distributed sampler
        return super().__iter__()


def as_dict(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    x, y = zip(*rows, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


def shaken(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*rows, strict=True)
    return torch.stack(x) + np.random.rand() + random.random(), torch.stack(y)


def shaken_by_closure() -> Callable[[Any], Any]:
    generator = np.random.default_rng(7)

    def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = zip(*rows, strict=True)
        return torch.stack(x) + generator.random(), torch.stack(y)

    return collate


def plus_global(x: Tensor) -> Tensor:
    return x + GLOBAL_NUMPY.random() + torch.rand(1, generator=GLOBAL_TORCH) + GLOBAL_PYTHON.random()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def load(*arguments: Any, **settings: Any) -> DataLoader:
    data = arguments[0] if arguments else rows()
    if "batch_sampler" not in settings:
        settings.setdefault("batch_size", BATCH)
    return DataLoader(data, **settings)


SHUFFLED: dict[str, Callable[[], Any]] = {
    "a list of batches": lambda: list(load()),
    "in order": load,
    "shuffled": lambda: load(shuffle=True),
    "shuffled, the last left out": lambda: load(shuffle=True, drop_last=True),
    "shuffled by a generator": lambda: load(shuffle=True, generator=seeded()),
    "with replacement": lambda: load(sampler=RandomSampler(rows(), replacement=True, num_samples=20)),
    "weighted": lambda: load(sampler=WeightedRandomSampler(torch.arange(1.0, 23), 20)),
    "weighted by a generator": lambda: load(
        sampler=WeightedRandomSampler(torch.arange(1.0, 23), 20, generator=seeded())
    ),
    "a random subset of indices": lambda: load(sampler=SubsetRandomSampler(range(3, 20))),
    "a sampler that counts passes": lambda: load(sampler=Turning()),
    "a batch sampler of its own": lambda: load(batch_sampler=OwnBatches()),
    "a batch sampler of torch's": lambda: load(
        batch_sampler=BatchSampler(RandomSampler(rows(), generator=seeded()), BATCH, False)
    ),
    "a batch sampler on a counting one": lambda: load(batch_sampler=BatchSampler(Turning(), BATCH, False)),
    "a subset": lambda: load(Subset(rows(), range(18)), shuffle=True),
    "a random split": lambda: load(random_split(rows(), [15, 7])[0], shuffle=True),
    "two datasets": lambda: load(ConcatDataset([rows(), Rows(lambda x: x + torch.rand(1))]), shuffle=True),
}
AUGMENTED: dict[str, Callable[[], Any]] = {
    "transforms by torch": lambda: load(Rows(lambda x: x + torch.randn(3)), shuffle=True),
    "transforms by numpy": lambda: load(Rows(lambda x: x + np.random.rand()), shuffle=True),
    "transforms by random": lambda: load(Rows(lambda x: x + random.random()), shuffle=True),
    "transforms by all three": lambda: load(
        Rows(lambda x: x + torch.rand(1) + np.random.rand() + random.random())
    ),
    "a transform's numpy generator": lambda: load(Rows(Own(np.random.default_rng(3).random))),
    "a transform's numpy RandomState": lambda: load(Rows(Own(np.random.RandomState(3).rand))),
    "a transform's Python generator": lambda: load(Rows(Own(random.Random(3).random))),
    "a transform's torch generator": lambda: load(
        Rows(Own(partial(torch.rand, 1, generator=torch.Generator().manual_seed(3))))
    ),
    "a transform with slots": lambda: load(Rows(Slotted())),
    "transforms one after the other": lambda: load(Rows(Own(itertools.count().__next__))),
    "generators of the module": lambda: load(Rows(plus_global)),
    "collated to a dict": lambda: load(shuffle=True, collate_fn=as_dict),
    "collated at random": lambda: load(shuffle=True, collate_fn=shaken),
    "collated by a closure": lambda: load(collate_fn=shaken_by_closure()),
    "rows that know how many were read": lambda: load(Ageing(), shuffle=True),
    "rows drawn once and kept": lambda: load(Cached(), shuffle=True),
}
STREAMS: dict[str, Callable[[], Any]] = {
    "a stream": lambda: load(Stream()),
    "a stream without an end": lambda: load(Endless()),
    "a stream that goes on": lambda: load(Continued()),
    "a subset of a stream's own rows": lambda: load(Continued(), collate_fn=shaken),
}
CUSTOM: dict[str, Callable[[], Any]] = {
    "own class, numpy generator": lambda: Custom(np.random.default_rng(3)),
    "own class, numpy RandomState": lambda: Custom(np.random.RandomState(3)),
    "own class, numpy": lambda: Custom(np.random),
    "own class, Python generator": lambda: Custom(random.Random(3)),
    "own class, random": lambda: Custom(random),
    "own class, torch generator": lambda: Custom(seeded()),
    "a wrapper": lambda: Wrapped(load(shuffle=True)),
    "a wrapper of a wrapper": lambda: Wrapped(Wrapped(load(sampler=Turning()))),
    "a wrapper of a stream": lambda: Wrapped(load(Continued())),
    "a subclass that seeds each pass": lambda: WithAttributes(rows(), batch_size=BATCH, shuffle=True),
}
WORKERS: dict[str, Callable[[], Any]] = {
    "workers": lambda: load(shuffle=True, num_workers=2),
    "workers and a generator": lambda: load(shuffle=True, num_workers=2, generator=seeded()),
    "persistent workers": lambda: load(shuffle=True, num_workers=2, persistent_workers=True),
    "persistent workers and a generator": lambda: load(
        shuffle=True, num_workers=2, persistent_workers=True, generator=seeded()
    ),
    "persistent workers, random transforms": lambda: load(
        Rows(lambda x: x + torch.rand(1) + random.random()), num_workers=2, persistent_workers=True
    ),
    "persistent workers, a counting sampler": lambda: load(
        sampler=Turning(), num_workers=2, persistent_workers=True
    ),
    "a stream in a worker": lambda: load(Stream(), num_workers=1),
}
KINDS = SHUFFLED | AUGMENTED | STREAMS | CUSTOM


@dataclass
class Trace:
    """What a run leaves behind."""

    order: list[str]
    weights: list[Tensor]
    drawn: tuple[Any, ...]


def digest(*parts: Any) -> str:
    found = hashlib.sha1()
    for part in parts:
        found.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return found.hexdigest()


def drawn() -> tuple[str, ...]:
    """The states of the global generators."""
    return digest(torch.get_rng_state()), digest(np.random.get_state(legacy=True)), digest(random.getstate())


def seed_everything() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    GLOBAL_NUMPY.bit_generator.state = np.random.default_rng(3).bit_generator.state
    GLOBAL_TORCH.manual_seed(3)
    GLOBAL_PYTHON.seed(3)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    return F.cross_entropy(model(x.float()), y)


Loaders = Callable[[], tuple[Any, Any, Any]]
"""-> the loop's loader, and the tuner's for training and validation data"""


def trace(loaders: Loaders, tuned: bool, passes: int = 2, first: int = 6) -> Trace:
    """A run of two passes, with dropout, noise and draws of the loop's own, with or without a tuner."""
    seed_everything()
    loop, train, valid = loaders()
    space = mf.Space(noise=mf.Float(0, 1, init=0.3), weight_decay=mf.Float(1e-4, 1e-1, log=True, init=1e-2))
    model = nn.Sequential(
        mf.nn.GaussianNoise(space["noise"]), nn.Linear(3, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=float(space["weight_decay"]))
    tuner = None
    if tuned:
        tuner = mf.Tuner(model, optimizer, space, loss_fn, train, valid, schedule=2, hyper_optimizer=Still)
    order = []
    for _ in range(passes):
        for batch in itertools.islice(loop, first):
            order.append(digest(*(batch.values() if isinstance(batch, dict) else batch)))
            optimizer.zero_grad()
            (loss_fn(model, batch) + 0 * np.random.rand() + 0 * random.random()).backward()
            optimizer.step()
    weights = [p.detach().clone() for p in model.parameters()]
    if tuner is not None:
        tuner.finish()
    return Trace(order, weights, drawn())


def assert_same(a: Trace, b: Trace) -> None:
    assert a.order == b.order
    assert all(map(torch.equal, a.weights, b.weights))
    assert a.drawn == b.drawn


def both(make: Callable[[], Any]) -> tuple[Any, Any, Any]:
    """The loop and the tuner read one loader object, and T2 is of the same kind."""
    loader = make()
    return loader, loader, make()


def apart(make: Callable[[], Any]) -> tuple[Any, Any, Any]:
    """The tuner has loaders of its own."""
    return make(), make(), make()


@pytest.mark.parametrize("shared", [both, apart])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_reads_and_draws_what_it_would_without_a_tuner(kind, shared):
    loaders = partial(shared, KINDS[kind])
    assert_same(trace(loaders, tuned=True), trace(loaders, tuned=False))


@pytest.mark.parametrize("kind", WORKERS)
def test_so_with_workers_in_one_loader_for_loop_and_tuner(kind):
    loaders = partial(both, WORKERS[kind])
    assert_same(trace(loaders, tuned=True), trace(loaders, tuned=False))
