"""Loaders of all kinds: the loop reads and draws what it would without a tuner, and resumed runs go on."""

import contextlib
import hashlib
import io
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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


class SelfSeeding(DataLoader):
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


class Named(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Fields:
    x: Tensor
    y: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.y))


def collated(kind: Any, rows: list[tuple[Tensor, Tensor]]) -> Any:
    return kind(**as_dict(rows))


class Growing(Sampler[list[int]]):
    """Batches of 1, 2, 3, ... rows."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([(7 * n + i) % ROWS for i in range(n)] for n in range(1, 7))

    def __len__(self) -> int:
        return 6


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
    "generators of the module": lambda: load(Rows(plus_global)),
    "collated to a dict": lambda: load(shuffle=True, collate_fn=as_dict),
    "collated to a named tuple": lambda: load(shuffle=True, collate_fn=partial(collated, Named)),
    "collated to a dataclass": lambda: load(shuffle=True, collate_fn=partial(collated, Fields)),
    "batches that grow": lambda: load(batch_sampler=Growing()),
    "collated at random": lambda: load(shuffle=True, collate_fn=shaken),
    "collated by a closure": lambda: load(collate_fn=shaken_by_closure()),
    "rows that know how many were read": lambda: load(Ageing(), shuffle=True),
    "rows drawn once and kept": lambda: load(Cached(), shuffle=True),
}
STREAMS: dict[str, Callable[[], Any]] = {
    "a stream": lambda: load(Stream()),
    "a stream without an end": lambda: load(Endless()),
    "a stream that goes on": lambda: load(Continued()),
    "a stream that goes on, collated at random": lambda: load(Continued(), collate_fn=shaken),
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
    "a subclass that seeds each pass": lambda: SelfSeeding(rows(), batch_size=BATCH, shuffle=True),
}
WORKERS: dict[str, Callable[[], Any]] = {
    "workers": lambda: load(shuffle=True, num_workers=2),
    "workers and a generator": lambda: load(shuffle=True, num_workers=1, generator=seeded()),
    "persistent workers": lambda: load(shuffle=True, num_workers=2, persistent_workers=True),
    "persistent workers and a generator": lambda: load(
        shuffle=True, num_workers=1, persistent_workers=True, generator=seeded()
    ),
    "persistent workers, random transforms": lambda: load(
        Rows(lambda x: x + torch.rand(1) + random.random()), num_workers=2, persistent_workers=True
    ),
    "persistent workers, a counting sampler": lambda: load(
        sampler=Turning(), num_workers=1, persistent_workers=True
    ),
    "a stream in a worker": lambda: load(Stream(), num_workers=1),
}
KINDS = SHUFFLED | AUGMENTED | STREAMS | CUSTOM
GOING_ON = {
    "a sampler that counts passes",
    "a batch sampler on a counting one",
    "rows that know how many were read",
    "rows drawn once and kept",
    "a stream that goes on",
    "a stream that goes on, collated at random",
    "a wrapper of a wrapper",
    "a wrapper of a stream",
    "a subclass that seeds each pass",
}
"""Kinds that keep something between passes: what they keep is the user's to save."""


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


@dataclass
class Run:
    """A small network with noise, dropout and decay."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    space: mf.Space
    tuner: mf.Tuner | None = None

    def step(self, batch: Any) -> None:
        self.optimizer.zero_grad()
        (loss_fn(self.model, batch) + 0 * np.random.rand() + 0 * random.random()).backward()
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def new_run() -> Run:
    space = mf.Space(noise=mf.Float(0, 1, init=0.3), weight_decay=mf.Float(1e-4, 1e-1, log=True, init=1e-2))
    model = nn.Sequential(
        mf.nn.GaussianNoise(space["noise"]), nn.Linear(3, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 2)
    )
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": float(space["weight_decay"])}
    return Run(model, torch.optim.SGD(model.parameters(), **options), space)


def tuned(run: Run, train: Any, valid: Any, **arguments: Any) -> mf.Tuner:
    run.tuner = mf.Tuner(run.model, run.optimizer, run.space, loss_fn, train, valid, **arguments)
    return run.tuner


Loaders = Callable[[], tuple[Any, Any, Any]]
"""-> the loop's loader, and the tuner's for training and validation data"""


def trace(loaders: Loaders, with_tuner: bool, passes: int = 2, first: int = 6) -> Trace:
    """Two passes, with or without a tuner that moves nothing."""
    seed_everything()
    loop, train, valid = loaders()
    run = new_run()
    if with_tuner:
        tuned(run, train, valid, schedule=2, hyper_optimizer=Still)
    order = []
    for _ in range(passes):
        for batch in itertools.islice(loop, first):
            order.append(digest(*(batch.values() if isinstance(batch, dict) else batch)))
            run.step(batch)
    weights = run.weights()
    if run.tuner is not None:
        run.tuner.finish()
    if isinstance(loop, DataLoader):
        loop._iterator = None  # the garbage collector would wait 5 s for each persistent worker
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


def one_generator(**settings: Any) -> tuple[Any, Any, Any]:
    """All loaders draw from one generator of the user's."""
    generator = seeded()
    train, valid = (load(shuffle=True, generator=generator, **settings) for _ in range(2))
    return train, train, valid


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_reads_and_draws_what_it_would_without_a_tuner(kind):
    for shared in (both, apart):
        loaders = partial(shared, KINDS[kind])
        assert_same(trace(loaders, True), trace(loaders, False))


def test_so_with_an_evaluation_of_the_loops_own_between_steps():
    def run_of(hyper_optimizer: Any) -> list[Any]:
        seed_everything()
        run, loader, valid = new_run(), load(shuffle=True), load(shuffle=True)
        if hyper_optimizer is not None:
            tuned(run, loader, valid, schedule=2, hyper_optimizer=hyper_optimizer)
        found = []
        for batch in [*loader, *loader]:
            run.step(batch)
            run.model.eval()
            with torch.no_grad():
                found += [float(loss_fn(run.model, other)) for other in valid]
            run.model.train()
        return [*found, drawn()]

    assert run_of(Still) == run_of(None)
    assert run_of(mf.SignSteps) != run_of(None)


def test_a_loop_that_stops_early_finishes_as_any():
    run, valid = new_run(), list(load())
    tuner = tuned(run, load(), valid, schedule=2, total_steps=1000)
    for batch in load():
        run.step(batch)
    found = tuner.finish()
    best = sum(evaluated(run, batch) * len(batch[1]) for batch in valid) / ROWS
    assert best == pytest.approx(min(found.values()), rel=1e-6)
    assert any("5 optimiser steps, but total_steps=1000" in sentence for sentence in tuner.report())


@pytest.mark.parametrize("kind", WORKERS)
def test_so_with_workers_in_one_loader_for_loop_and_tuner(kind):
    loaders = partial(both, WORKERS[kind])
    assert_same(trace(loaders, True), trace(loaders, False))


@pytest.mark.parametrize(
    "settings", [{}, {"drop_last": True}, {"num_workers": 1}], ids=lambda thing: type(thing).__name__
)
def test_so_with_one_generator_for_all_loaders(settings):
    loaders = partial(one_generator, **settings)
    assert_same(trace(loaders, True), trace(loaders, False))


def test_what_the_loop_says_to_its_sampler_reaches_the_tuner_with_its_next_pass():
    class Epochs(Turning):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            yield from [self.epoch] * ROWS

    sampler = Epochs()
    sampler.set_epoch(0)
    read = set()

    def noting(model: nn.Module, batch: Any) -> Tensor:
        read.add(float(batch[0][0, 0]))
        return loss_fn(model, batch)

    run, valid = new_run(), list(load())
    mf.Tuner(
        run.model,
        run.optimizer,
        run.space,
        noting,
        load(sampler=sampler),
        valid,
        valid_loss_fn=loss_fn,
        schedule=1,
    )
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for _ in range(5):  # as many as the tuner's pass has
            run.step(valid[0])
    assert read == {float(rows()[epoch][0][0]) for epoch in range(3)}


# --- iterators, and loaders without an end ------------------------------------------------------------------


class Counted:
    """Counts what is taken out of it, and has no end."""

    def __init__(self, length: int | None = None) -> None:
        self.taken = 0
        if length is not None:
            self.length = length

    def __iter__(self) -> Iterator[Any]:
        for batch in itertools.cycle(load()):
            self.taken += 1
            yield batch


class CountedWithLength(Counted):
    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize(
    "kind",
    {
        "an endless stream in a DataLoader": lambda: load(Endless()),
        "a wrapper of it": lambda: Wrapped(load(Endless())),
        "cycle": lambda: itertools.cycle(load()),
        "a generator": lambda: (batch for batch in itertools.cycle(load())),
        "map of cycle": lambda: map(lambda batch: batch, itertools.cycle(load())),  # noqa: C417
        "a class of its own": lambda: Counted(),
        "a class that says a length": lambda: CountedWithLength(7),
    }.items(),
    ids=lambda item: item[0],
)
def test_finish_ends_with_a_valid_loader_that_does_not(kind):
    run = new_run()
    valid = kind[1]()
    tuner = tuned(run, load(), valid, schedule=2)
    for batch in load():
        run.step(batch)
    before = getattr(valid, "taken", 0)
    assert set(tuner.finish()) == {"last", "average", "earlier"}
    if isinstance(valid, Counted):
        each = 100 if type(valid) is Counted else 7
        assert valid.taken - before <= 3 * (each + 1)


@pytest.mark.parametrize(
    "loader",
    [iter([1]), itertools.cycle([1]), (batch for batch in [1]), map(str, [1]), zip([1], [2], strict=True)],
    ids=lambda loader: type(loader).__name__,
)
def test_an_iterator_of_training_data_is_refused_since_the_loop_would_miss_its_batches(loader):
    with pytest.raises(mf.errors.UnusableLoader, match="would be missing"):
        tuned(new_run(), loader, load())


class ByIndex:
    """Rows read by index, of a class that torch does not know, with an iterator for another purpose."""

    def __init__(self) -> None:
        self.rows, self.names = rows(), itertools.count()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


class ByPasses:
    """The same rows, one after the other, from an iterator that it keeps."""

    def __init__(self) -> None:
        self.rows = itertools.cycle(load())

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.rows, 4)


class ByBoth(ByPasses, ByIndex):
    """A loader with an index too."""


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_iterator_in_a_dataset_that_is_read_by_index_is_not_what_the_loop_reads(shuffle):
    run, loader = new_run(), load(ByIndex(), shuffle=shuffle)
    tuned(run, loader, load(), schedule=1)
    for batch in loader:
        run.step(batch)
    for loader in (ByPasses(), ByBoth()):
        with pytest.raises(mf.errors.UnusableLoader, match="keeps the cycle"):
            tuned(new_run(), loader, load())


@pytest.mark.parametrize(
    "loader", [None, 3, object(), nn.Linear(1, 1)], ids=lambda thing: type(thing).__name__
)
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_loader_is_refused(loader, which):
    loaders = [load(), load()]
    loaders[which] = loader
    with pytest.raises(mf.errors.UnusableLoader, match=("train_loader", "valid_loader")[which]):
        tuned(new_run(), *loaders)


@pytest.mark.parametrize("empty", [[], load(Subset(rows(), []))], ids=["list", "DataLoader"])
@pytest.mark.parametrize("which", [0, 1])
def test_an_empty_loader_is_an_error_that_names_it(empty, which):
    loaders = [load(), load()]
    loaders[which] = empty
    run = new_run()
    with pytest.raises(mf.errors.UnusableLoader, match=("train_loader", "valid_loader")[which]):
        tuned(run, *loaders, schedule=1)


def test_a_generator_of_validation_data_that_runs_out_is_an_error_that_names_it():
    run = new_run()
    batch = next(iter(load()))
    tuned(run, load(), iter([batch]), schedule=1, horizon="step")
    run.step(batch)
    with pytest.raises(mf.errors.UnusableLoader, match=r"valid_loader .*a generator that runs out\."):
        run.step(batch)


# --- what finish compares -----------------------------------------------------------------------------------


def test_finish_takes_the_mean_over_examples_and_not_over_batches():
    run = new_run()
    x, y = rows(300).tensors
    tuner = tuned(run, load(), [(x[:299], y[:299]), (x[299:], y[299:])], schedule=2)
    for batch in load():
        run.step(batch)
    found = tuner.finish()
    assert min(found.values()) == pytest.approx(evaluated(run, (x, y)), rel=1e-6)


def test_each_candidate_of_finish_meets_the_state_that_a_validation_loss_carries_as_the_first_did():
    run = new_run()

    def carrying(model: nn.Module, batch: Any) -> Tensor:
        model.seen = getattr(model, "seen", 0) + 1
        return loss_fn(model, batch) + model.seen

    valid = list(load())
    tuner = tuned(run, valid, list(valid), schedule=2, valid_loss_fn=carrying)
    for batch in valid:
        run.step(batch)
    found = tuner.finish()
    sizes = [len(batch[1]) for batch in valid]
    plain = sum(evaluated(run, b) * n for b, n in zip(valid, sizes, strict=True)) / sum(sizes)
    counted = sum(seen * n for seen, n in enumerate(sizes, 1)) / sum(sizes)
    assert min(found.values()) == pytest.approx(plain + counted, rel=1e-5)
    assert max(found.values()) - min(found.values()) < 1  # nobody is charged for coming later
    assert not hasattr(run.model, "seen")


@torch.no_grad()
def evaluated(run: Run, batch: Any) -> float:
    run.model.eval()
    return float(loss_fn(run.model, batch))


# --- batches that are bad -----------------------------------------------------------------------------------


def looks_at(batches: list[Any]) -> tuple[Run, list[float]]:
    """The hypergradients of weight decay, one for each look that succeeds; the run moves nothing else."""
    seed_everything()
    run = new_run()
    run.space = mf.Space(weight_decay=mf.Float(1e-4, 1e-1, log=True, init=1e-2))
    run.model[0], run.model[2] = nn.Identity(), nn.Identity()
    tuner = tuned(run, list(load()), batches, schedule=1, horizon="step", hyper_optimizer=Still)
    for batch in itertools.islice(itertools.cycle(load()), 60):
        run.step(batch)
    return run, [float(given[0]) for given in tuner.hyper_optimizer.given]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_batch_of_ten_costs_its_own_looks_and_no_others(bad):
    good = list(DataLoader(rows(50), BATCH))
    spoilt = [(x * bad if n == 3 else x, y) for n, (x, y) in enumerate(good)]
    _, all_looks = looks_at(good)
    run, looks = looks_at(spoilt)
    assert looks == [look for n, look in enumerate(all_looks) if n % 10 != 3]
    assert run.tuner.log()["skipped"] == 6
    assert "6 hyper-steps were left out" in run.tuner.report()[0]


def test_finish_ranks_by_the_batches_that_are_good():
    def finished(batches: list[Any]) -> dict[str, float]:
        seed_everything()
        run = new_run()
        tuner = tuned(run, list(load()), batches, schedule=2)
        for batch in load():  # two hyper-steps, which do not come to the tenth batch
            run.step(batch)
        return tuner.finish()

    good = list(DataLoader(rows(50), BATCH))
    spoilt = [*good[:9], (good[9][0] * float("nan"), good[9][1])]
    assert finished(spoilt) == finished(good[:9])


def test_the_length_of_a_hyperstep_is_kept_through_single_bad_batches():
    seed_everything()
    batches = [(x * float("nan") if n == 3 else x, y) for n, (x, y) in enumerate(DataLoader(rows(50), BATCH))]
    run = new_run()
    tuner = tuned(run, list(load()), batches, schedule=1, horizon="step")
    for batch in itertools.islice(itertools.cycle(load()), 60):
        run.step(batch)
    assert tuner.log()["skipped"] == 6
    assert tuner._controller.failures.shrink == 1


# --- resuming -----------------------------------------------------------------------------------------------


def saved(run: Run) -> bytes:
    """What a user saves."""
    assert run.tuner is not None
    file = io.BytesIO()
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "torch": torch.get_rng_state(),
    }
    torch.save(state | {"tuner": run.tuner.state_dict()}, file)
    return file.getvalue()


def load_into(run: Run, state: bytes, order: str = "model optimizer tuner") -> None:
    assert run.tuner is not None
    loaded = torch.load(io.BytesIO(state))
    parts = {"model": run.model, "optimizer": run.optimizer, "tuner": run.tuner}
    for name in order.split():
        parts[name].load_state_dict(loaded[name])
    torch.set_rng_state(loaded["torch"])


def uninterrupted_and_resumed(
    make: Callable[[], Any],
    *stops: int,
    steps: int = 14,
    order: str = "model optimizer tuner",
    **arguments: Any,
) -> list[list[Any]]:
    """Weights and values after a run, and after those that were stopped at a step and built anew."""
    batches = list(load(rows(ROWS * 4)))

    def begun() -> Run:
        seed_everything()
        run = new_run()
        tuned(run, make(), make(), **{"schedule": 2, **arguments})
        return run

    run, states = begun(), {}
    for n in range(steps):
        if n in stops:
            states[n] = saved(run)
        run.step(batches[n])
    ends = [[*run.weights(), run.space.as_dict(), run.tuner.finish()]]
    for at, state in states.items():
        again = begun()
        torch.manual_seed(99)
        np.random.seed(99)
        random.seed(99)
        load_into(again, state, order)
        for n in range(at, steps):
            again.step(batches[n])
        ends.append([*again.weights(), again.space.as_dict(), again.tuner.finish()])
    return ends


def assert_equal(a: list[Any], *others: list[Any]) -> None:
    assert others
    for b in others:
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


@pytest.mark.parametrize("kind", sorted(set(KINDS) - GOING_ON))
def test_a_resumed_run_is_the_uninterrupted_one(kind):
    """Stopped within the tuner's first pass, and in a later one."""
    assert_equal(*uninterrupted_and_resumed(KINDS[kind], 3, 9, steps=12))


def test_a_run_can_be_resumed_at_any_step():
    assert_equal(*uninterrupted_and_resumed(SHUFFLED["shuffled"], *range(0, 13, 2), schedule=3))


@pytest.mark.parametrize("order", ["tuner model optimizer", "optimizer tuner model"])
def test_the_order_of_loading_does_not_matter(order):
    assert_equal(*uninterrupted_and_resumed(SHUFFLED["shuffled"], 5, order=order))


@pytest.mark.parametrize(
    "estimator", ["one_step", "one_step_cheap", "central_difference", "unrolled", "t1t2"]
)
def test_a_run_with_another_estimator_is_resumed(estimator):
    assert_equal(*uninterrupted_and_resumed(SHUFFLED["shuffled"], 5, estimator=estimator))


@pytest.mark.parametrize("total", [14, None])
@pytest.mark.parametrize("horizon", ["run", "step"])
def test_a_run_with_a_known_or_an_open_end_is_resumed(horizon, total):
    arguments = {"horizon": horizon, "total_steps": total, "schedule": mf.FrontLoaded(2)}
    assert_equal(*uninterrupted_and_resumed(SHUFFLED["shuffled"], 5, **arguments))


# --- wrong twins: what the comparison with the loop without a tuner must reject -----------------------------


def test_a_tuner_that_reads_the_loops_own_loader_is_found_out(monkeypatch):
    monkeypatch.setattr("midflight.tuner.data.own_copy", lambda loader: loader)
    with pytest.raises(AssertionError):
        test_the_loop_reads_and_draws_what_it_would_without_a_tuner("rows that know how many were read")


def test_a_tuner_that_draws_from_the_loops_generators_is_found_out(monkeypatch):
    monkeypatch.setattr(
        "midflight.tuner.randomness.Randomness.borrowed", lambda self: contextlib.nullcontext()
    )
    with pytest.raises(AssertionError):
        test_the_loop_reads_and_draws_what_it_would_without_a_tuner("shuffled")


@pytest.mark.parametrize(
    "part",
    [
        "data.EndlessBatches", "randomness.Randomness", "horizon.Averaged", "hyper_optimizer.Move",
    ],
)  # fmt: skip
def test_a_tuner_that_resumes_without_a_part_of_its_state_is_found_out(part, monkeypatch):
    monkeypatch.setattr(f"midflight.tuner.{part}.load_state_dict", lambda self, state: None)
    with pytest.raises(AssertionError):
        assert_equal(*uninterrupted_and_resumed(SHUFFLED["shuffled"], 7, schedule=3))
