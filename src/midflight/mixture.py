"""Tune how much each source of data counts, while the model trains.

    C1 = sum_i w_i E_i[loss],   w on the simplex,   E_i the mean over source i

C1 is the training loss, C2 the validation loss, U the optimiser's step from the training gradient g, and v
the gradient of C2. The weight of a source acts on the next step, so the derivative after one step sees its
effect:

    dC2/dw_i = <w*, gradient of E_i[loss]>,   w* = (dU/dg)^T v           (`hypergrad.mixed`)

Two ways to use the weights have this C1 and this hypergradient on average. A source i is drawn with the
probability q_i, and each of its examples counts w_i / q_i:

    as loss weights     sources are drawn equally often; q_i = 1/k
    as probabilities    sources are drawn by their weights; q = w, so each example counts 1

Probabilities have less noise in the training gradient. Loss weights have less noise in the hypergradients
of sources with low weights. In a batch of n examples, source i has n q_i examples, rounded down or up
(systematic sampling). Losses count as differences from their mean b in the batch, which lowers the noise
further:

    mean over the batch of (w_i / q_i) (loss - b) / c, plus b

b depends on the sources in its batch. Without c, this would take a part 1 - c off the effect of the
weights. c holds for k sources drawn equally often, of which r = n mod k have one example more than the
others:

    c = 1 - r (k - r) / (n^2 (k - 1))             0 at n = 1, where b is left out; 1 if k divides n
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from midflight._tensors import one_per_example, with_part
from midflight.errors import SpaceError, UnknownName
from midflight.space.hyperparameter import Hyperparameter
from midflight.space.specs import Shares, Value

MOST_SHOWN = 8
"""How many weights `repr` shows, the largest ones."""


_OWN = {"batch_sampler", "drop_last", "sampler", "shuffle"}
"""The options of a `DataLoader` that `Mixture.loader` does not take."""


class _Parts(NamedTuple):
    source: Tensor
    chance: Tensor


class Drawn(_Parts):
    """Where the examples of a batch come from.

    Attributes:
        source: index of the source of each example, shape (B,), whole numbers.
        chance: the probability with which this source was drawn, shape (B,).
    """

    __slots__ = ()

    def __new__(cls, source: Any, chance: Tensor | None = None) -> "Drawn":
        """Take the parts, or both in an iterable, as Hugging Face's Trainer gives them."""
        return super().__new__(cls, *(source if chance is None else (source, chance)))

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Drawn":
        """Return it on a device, as other parts of a batch do. `Mixture.loss` needs no such call."""
        return Drawn(*(part.to(device, non_blocking=non_blocking) for part in self))

    def cpu(self) -> "Drawn":
        """Return it on the CPU."""
        return self.to("cpu")

    def cuda(self, device: int | None = None, non_blocking: bool = False) -> "Drawn":
        """Return it on a GPU; on the present one by default."""
        return self.to("cuda" if device is None else device, non_blocking)


class Mixture(Hyperparameter):
    """The weights of data sources, or of loss terms: positive numbers with the sum 1.

        mixture = mf.Mixture(["code", "law", "letters"])
        space = mf.Space(mixture=mixture)
        loader = mixture.loader([code, law, letters], batch_size=32)      # of (x, y, drawn)

        def loss_fn(model, batch):
            x, y, drawn = batch
            return mixture.loss(F.cross_entropy(model(x), y, reduction="none"), drawn)

    Its value is the tensor of weights, shape (k,). For loss terms, take `mixture.value @ terms`.

    Args:
        sources: their names, or how many there are.
        init: initial weights, of any sum; equal by default.
        ratio: the largest factor between two weights, apart from `floor`.
        floor: the part of the whole that all sources share equally, so that no weight reaches 0.

    Attributes:
        sources: their names, in the order of the weights.

    Raises:
        SpaceError: there are fewer than two sources, two have the same name, or an argument is invalid.
    """

    def __init__(
        self,
        sources: Sequence[str] | int,
        init: Value | None = None,
        *,
        ratio: float = 1000.0,
        floor: float = 0.2,
    ) -> None:
        self.sources = _names(sources)
        spec = Shares(0.0, 1.0, init=init, shape=(len(self.sources),), ratio=ratio, floor=floor)
        super().__init__("mixture", spec, torch.get_default_dtype())

    def shares(self) -> dict[str, float]:
        """Return source -> its weight now."""
        return dict(zip(self.sources, self.tolist(), strict=True))

    def parts(self) -> dict[str, float]:
        return {f"{self.name}/{source}": weight for source, weight in self.shares().items()}

    def __repr__(self) -> str:
        shares = sorted(self.shares().items(), key=lambda pair: -pair[1])
        shown = ", ".join(f"{source} {weight:.3g}" for source, weight in shares[:MOST_SHOWN])
        more = len(shares) - MOST_SHOWN
        return f"{self.name} = {shown}" + (f" and {more} more" if more > 0 else "")

    def loss(self, losses: Tensor, drawn: Drawn) -> Tensor:
        """Return the mixed loss of a batch, shape (); differentiable in the weights.

        Args:
            losses: one loss per example, shape (B,) or (B, ...); the mean over the rest is taken.
            drawn: the part of the batch that `loader` adds.

        Raises:
            TypeError: `drawn` is something else.
            ValueError: there is not one loss per example.
        """
        if not isinstance(drawn, tuple | list) or len(drawn) != 2:
            raise TypeError(
                "drawn must be the part of the batch that `loader` adds, or Drawn(source, chance), but is of "
                f"type {type(drawn).__name__}."
            )
        source, chance = (part.to(losses.device) for part in drawn)
        losses = one_per_example(losses, source)
        weight = self.value.to(losses)[source] / chance.to(losses)
        n, k = len(losses), len(self.sources)
        if n == 1:
            return (weight * losses).mean()
        mean, kept = losses.mean(), 1 - n % k * (k - n % k) / (n * n * (k - 1))
        return (weight * (losses - mean)).mean() / kept + mean

    def loader(
        self,
        datasets: Sequence[Dataset[Any]] | Mapping[str, Dataset[Any]],
        batch_size: int,
        *,
        by: Literal["loss", "sampling"] = "sampling",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> "DataLoader[Any]":
        """Return a loader of all sources; a pass takes as many examples as they have together.

        A batch is what the datasets give, with a `Drawn` at its end, or under "drawn" in a dict. A list of
        the examples themselves, such as strings, is one part: (list, drawn). If several processes train
        together, each draws batches of its own, and they share the number of batches of a pass.

        Args:
            datasets: one per source, with a length, in the order of `sources`; or source -> dataset.
            batch_size: examples of a batch.
            by: "sampling" draws sources with the present weights as probabilities; "loss" draws them equally
                often.
            generator: draws the random numbers.
            options: further arguments of `torch.utils.data.DataLoader`, such as `num_workers`. A
                `collate_fn` gets the examples as the datasets give them.

        Raises:
            ValueError: there is not one dataset per source, one is empty or a stream, `batch_size` is
                below 1, or an option says how batches are drawn.
            UnknownName: `by` is neither of the two.
        """
        if by not in ("loss", "sampling"):
            raise UnknownName("by", by, ("loss", "sampling"))
        if isinstance(datasets, Mapping):
            if set(datasets) != set(self.sources):
                raise ValueError(
                    f"the datasets must be those of {self.sources}, but are of {list(datasets)}."
                )
            datasets = [datasets[name] for name in self.sources]
        if len(datasets) != len(self.sources):
            raise ValueError(
                f"each of the {len(self.sources)} sources must have one dataset, but got {len(datasets)}."
            )
        if streams := [d for d in datasets if isinstance(d, IterableDataset) or not _has_places(d)]:
            kind = type(streams[0]).__name__
            raise ValueError(
                f"each dataset must have a length and give examples by index, but {kind} does not; draw "
                "its examples yourself, and pass a Drawn(source, chance) to mixture.loss."
            )
        sizes = [len(dataset) for dataset in datasets]  # type: ignore[arg-type]
        if empty := [name for name, size in zip(self.sources, sizes, strict=True) if not size]:
            raise ValueError(f"each source must have examples, but {empty[0]} has none; leave it out.")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(
                f"batch_size must be a whole number of at least 1, but batch_size={batch_size!r}."
            )
        if own := _OWN & options.keys():
            raise ValueError(
                f"{', '.join(sorted(own))} must be left out, because the mixture draws the batches: each is "
                "full, and the examples of a source come in random order."
            )
        batches = _Batches(self, sizes, batch_size, by == "sampling", generator)
        collate = _Collate(options.pop("collate_fn", None) or default_collate)
        return DataLoader(_Sources(datasets), batch_sampler=batches, collate_fn=collate, **options)


class _Sources(Dataset[Any]):
    """Gives an example, with its source and chance, for a place (source, index, chance)."""

    def __init__(self, datasets: Sequence[Dataset[Any]]) -> None:
        self.datasets = list(datasets)

    def __getitem__(self, place: tuple[int, int, float]) -> tuple[Any, int, float]:
        source, index, chance = place
        return self.datasets[source][index], source, chance


class _Collate:
    """Makes a batch of examples as `of` does, and adds where they come from."""

    def __init__(self, of: Callable[[list[Any]], Any]) -> None:
        self.of = of

    def __call__(self, places: Sequence[tuple[Any, int, float]]) -> Any:
        examples, source, chance = zip(*places, strict=True)
        batch, drawn = self.of(list(examples)), Drawn(torch.tensor(source), torch.tensor(chance))
        if isinstance(batch, list) and [*map(id, batch)] == [*map(id, examples)]:  # as of strings: one part
            return batch, drawn
        return with_part(batch, "drawn", drawn)


class _Batches(Sampler[Any]):
    """Draws batches of places; each source's examples come in random order, again and again.

    Processes that train together have random numbers of their own, even if all have the same seed.
    """

    def __init__(
        self,
        mixture: Mixture,
        sizes: Sequence[int],
        batch_size: int,
        by_weight: bool,
        generator: torch.Generator | None,
    ) -> None:
        self.mixture, self.sizes, self.batch_size, self.by_weight = (
            mixture,
            list(sizes),
            batch_size,
            by_weight,
        )
        self.generator = generator

    def __len__(self) -> int:
        return max(1, sum(self.sizes) // (self.batch_size * _process()[1]))

    def __iter__(self) -> Iterator[list[tuple[int, int, float]]]:
        seed = int(torch.randint(2**62, (), generator=self.generator))
        own = torch.Generator().manual_seed(seed + _process()[0])
        orders = [_endless(size, own) for size in self.sizes]
        even = torch.full((len(self.sizes),), 1 / len(self.sizes), dtype=torch.float64)
        for _ in range(len(self)):
            chances = self.mixture.value.detach().double().cpu() if self.by_weight else even
            drawn = _systematic(chances, self.batch_size, own)
            yield [
                (s, next(orders[s]), c) for s, c in zip(drawn.tolist(), chances[drawn].tolist(), strict=True)
            ]


def _has_places(data: Any) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def _process() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    together = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)


def _systematic(chances: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw n sources in random order, each int(n chance) or one more time."""
    order = torch.randperm(len(chances), generator=generator)  # else neighbours would come together
    places = (
        torch.arange(n, dtype=torch.float64) + torch.rand((), dtype=torch.float64, generator=generator)
    ) / n
    ends = chances[order].cumsum(0)
    drawn = order[torch.searchsorted(ends / ends[-1], places).clamp(max=len(chances) - 1)]
    return drawn[torch.randperm(n, generator=generator)]


def _endless(size: int, generator: torch.Generator) -> Iterator[int]:
    """Yield 0 to size - 1 in random order, again and again."""
    while True:
        yield from torch.randperm(size, generator=generator).tolist()


def _names(sources: Sequence[str] | int) -> list[str]:
    if isinstance(sources, int) and not isinstance(sources, bool):
        sources = [str(n) for n in range(sources)]
    if (
        isinstance(sources, str | set | frozenset)
        or not isinstance(sources, Iterable)
        or not all(isinstance(name, str) for name in sources)
    ):
        raise SpaceError(f"sources must be a list of names, or a number, but got {sources!r}.")
    names = list(sources)
    if len(names) < 2 or len(set(names)) < len(names):
        raise SpaceError(f"sources must be at least two different names, but got {names}.")
    return names
