"""State that the model does not hold, such as a teacher, files and generators, is left as it was too."""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from loops import Still
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

import midflight as mf

STEPS = 5
RNG = torch.Generator()
AUGMENTER: Any = None
TEACHER: Any = None
Batch = tuple[Tensor, Tensor]


def batches(count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]


def backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


Loss = Callable[[nn.Module, Any], Tensor]


def trained(
    model: nn.Module,
    loss_fn: Loss,
    tuned: bool,
    *,
    beside: tuple[nn.Module, ...] = (),
    loader: Any = None,
    valid: Any = None,
    steps: int = STEPS,
    **arguments: Any,
) -> list[Tensor]:
    """Weights and buffers after a few steps, with or without a tuner that moves nothing."""
    decay = mf.Float(1e-4, 1e-1, log=True, init=1e-2)
    space = mf.Space(weight_decay=decay, noise=mf.Float(0, 1, init=0.1))
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), model)
    modules = [model, *beside]
    weights = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=float(space["weight_decay"]))
    loader = batches() if loader is None else loader
    if tuned:
        mf.Tuner(
            model, optimizer, space, loss_fn, loader, valid or batches(), schedule=1, hyper_optimizer=Still,
            **arguments,
        )  # fmt: skip
    taken = 0
    while taken < steps:
        for batch in loader:
            if taken == steps:
                break
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            taken += 1
    return [t.detach().clone() for m in modules for t in (*m.parameters(), *m.buffers())]


def same(run: Callable[[bool], list[Any]]) -> bool:
    """Whether the tuned run ends where the untuned one does."""
    ends = []
    for tuned in (False, True):
        torch.manual_seed(0)
        ends.append(run(tuned))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*ends, strict=True))


# --- modules that the loss uses beside the model ------------------------------------------------------------


class Centred(nn.Module):
    """A criterion with a buffer that its forward moves, such as the centre of DINO."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("c", torch.zeros(3))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        self.c.lerp_(logits.detach().mean(0), 0.1)
        return F.cross_entropy(logits - self.c, y)


class AsMethod:
    """A trainer whose method is the loss."""

    def __init__(self, criterion: nn.Module) -> None:
        self.parts = {"criterion": criterion}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.parts["criterion"](model(batch[0]), batch[1])


class AsModule(nn.Module):
    """A loss that is itself a module."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.criterion(model(batch[0]), batch[1])


def by_global(model: nn.Module, batch: Batch) -> Tensor:
    return through_helper(model(batch[0]), batch[1])


def through_helper(logits: Tensor, y: Tensor) -> Tensor:
    return TEACHER(logits, y)


def by_argument(criterion: nn.Module, model: nn.Module, batch: Batch) -> Tensor:
    return criterion(model(batch[0]), batch[1])


def by_default(criterion: nn.Module) -> Loss:
    def loss_fn(model: nn.Module, batch: Batch, criterion: nn.Module = criterion) -> Tensor:
        return criterion(model(batch[0]), batch[1])

    return loss_fn


def as_global(criterion: nn.Module) -> Loss:
    global TEACHER
    TEACHER = criterion
    return by_global


REACHED: dict[str, Callable[[nn.Module], Loss]] = {
    "a closure": lambda c: lambda model, batch: c(model(batch[0]), batch[1]),
    "a closure without gradients around it": lambda c: torch.enable_grad()(
        lambda model, batch: c(model(batch[0]), batch[1])
    ),
    "a container in a closure": lambda c: lambda model, batch, cs=(c,): cs[0](model(batch[0]), batch[1]),
    "a global one function deeper": as_global,
    "a method's object": lambda c: AsMethod(c).loss,
    "a partial": lambda c: partial(by_argument, c),
    "a default": by_default,
    "a module": AsModule,
}


@pytest.mark.filterwarnings("ignore:training moves")
@pytest.mark.parametrize("horizon", ["run", "step"])
@pytest.mark.parametrize("way", REACHED)
def test_a_criterion_with_a_buffer_that_moves_is_left_as_it_was(way, horizon):
    def run(tuned: bool) -> list[Tensor]:
        criterion = Centred()
        ends = trained(backbone(), REACHED[way](criterion), tuned, horizon=horizon)
        return [*ends, criterion.c.clone()]

    assert same(run)


def test_a_head_beside_the_model_counts_the_batches_of_the_loop_and_validates_in_eval_mode():
    modes = []
    ends = []
    for tuned in (False, True):
        torch.manual_seed(0)
        model, head = nn.Linear(4, 6), nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
        head[1].eval()

        def loss_fn(model: nn.Module, batch: Batch, head: nn.Module = head) -> Tensor:
            return F.cross_entropy(head(model(batch[0])), batch[1])

        def valid_loss_fn(model: nn.Module, batch: Batch, head: nn.Module = head) -> Tensor:
            modes.append([m.training for m in head.modules()])
            return F.cross_entropy(head(model(batch[0])), batch[1])

        ends.append(trained(model, loss_fn, tuned, beside=(head,), valid_loss_fn=valid_loss_fn))
        assert head[0].num_batches_tracked == STEPS
        assert [m.training for m in head.modules()] == [True, True, False, True]
    assert all(map(torch.equal, *ends))
    assert modes
    assert not any(any(mode) for mode in modes)


@pytest.mark.filterwarnings("ignore:validation reads the running statistics")
def test_a_teacher_with_batch_norm_in_training_mode_is_left_as_it_was():
    def run(tuned: bool) -> list[Tensor]:
        teacher = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            with torch.no_grad():
                soft = teacher(batch[0]).softmax(-1)
            return F.cross_entropy(model(batch[0]), soft)

        ends = trained(backbone(), loss_fn, tuned)
        assert all(p.grad is None for p in teacher.parameters())
        return [*ends, *(b.clone() for b in teacher.buffers())]

    assert same(run)


def test_a_module_that_the_model_holds_out_of_sight_is_left_as_it_was():
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.hidden = backbone(), [nn.BatchNorm1d(4)]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.hidden[0](x))

    def run(tuned: bool) -> list[Tensor]:
        model = Hiding()
        ends = trained(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), tuned)
        return [*ends, *(b.clone() for b in model.hidden[0].buffers())]

    assert same(run)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_of_a_module_beside_the_model_leaves_its_gradients():
    head = nn.Linear(6, 3)  # no optimiser moves it

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(checkpoint(head, model(batch[0]), use_reentrant=True), batch[1])

    def run(tuned: bool) -> list[Tensor]:
        head.zero_grad()
        return [*trained(nn.Linear(4, 6), loss_fn, tuned), head.weight.grad.clone()]

    assert same(run)


def test_a_scripted_criterion_works():
    class Scripted(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return logits * 2

    scripted = torch.jit.script(Scripted())
    assert same(
        lambda tuned: trained(
            backbone(), lambda model, batch: F.cross_entropy(scripted(model(batch[0])), batch[1]), tuned
        )
    )


# --- iterators that the loss reads --------------------------------------------------------------------------


def reading(iterator: Iterator[Any]) -> Loss:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        x, y = next(iterator)
        return F.cross_entropy(model(x), y)

    return loss_fn


@pytest.mark.parametrize(
    "iterator",
    [iter(batches()), itertools.cycle(batches()), (batch for batch in batches())],
    ids=lambda iterator: type(iterator).__name__,
)
@pytest.mark.parametrize("which", ["loss_fn", "valid_loss_fn"])
def test_a_loss_that_takes_batches_from_an_iterator_is_refused(which, iterator):
    losses = {
        "loss_fn": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        "valid_loss_fn": None,
    }
    losses[which] = reading(iterator)
    with pytest.raises(mf.errors.InvalidLoss, match=f"^{which} must not take anything out of an iterator"):
        trained(backbone(), losses["loss_fn"], True, valid_loss_fn=losses["valid_loss_fn"])


# --- generators and data ------------------------------------------------------------------------------------


class Augmenter:
    """An object with a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(4)

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.generator.random()


class Noisy(nn.Module):
    """A layer whose forward reads a generator of its module."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=RNG) if self.training else x


def helper(x: Tensor) -> Tensor:
    return x + torch.randn(x.shape, generator=RNG)


def loss_by_helper(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(helper(batch[0])), batch[1])


def loss_by_object(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(AUGMENTER(batch[0])), batch[1])


def plain_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("loss_fn", [loss_by_helper, loss_by_object, plain_loss], ids=lambda f: f.__name__)
def test_generators_of_the_users_module_are_left_as_they_were(loss_fn):
    def run(tuned: bool) -> list[Any]:
        global AUGMENTER
        AUGMENTER = Augmenter()
        RNG.manual_seed(3)
        model = nn.Sequential(Noisy(), backbone()) if loss_fn is plain_loss else backbone()
        ends = trained(model, loss_fn, tuned)
        return [*ends, RNG.get_state(), AUGMENTER.generator.bit_generator.state["state"]]

    assert same(run)


class Compose:
    """Transforms in a row, as torchvision has them."""

    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x


class Drawing:
    """A transform with a generator and a counter."""

    def __init__(self) -> None:
        self.generator, self.calls = random.Random(4), 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.generator.random() + 0.01 * self.calls


class Images(Dataset[Any]):
    """Rows that a transform changes."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform
        self.x, self.y = (torch.cat(parts) for parts in zip(*batches(), strict=True))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, n: int) -> Batch:
        return self.transform(self.x[n]), self.y[n]


def test_generators_and_counters_deep_in_a_dataset_are_left_as_they_were():
    def run(tuned: bool) -> list[Tensor]:
        images = Subset(Images(Compose([Compose([Drawing()])])), range(24))
        return trained(backbone(), plain_loss, tuned, loader=DataLoader(images, batch_size=8))

    assert same(run)


def test_a_large_dataset_costs_little_when_the_tuner_is_made():
    images = Images(Compose([Drawing()]))
    images.files = [f"{n}.png" for n in range(1_000_000)]
    images.labels = {n: [n, {"box": [n, n], "tags": ("a", "b")}] for n in range(400)}
    images.records = [[[n, m] for m in range(400)] for n in range(400)]
    images.split = {str(n): [{str(m): [m] for m in range(100)} for _ in range(100)] for n in range(30)}
    begin = time.process_time()  # of this process alone, on however busy a machine
    trained(backbone(), plain_loss, True, loader=DataLoader(images, batch_size=8), steps=0)
    assert time.process_time() - begin < 4


class Lines(IterableDataset[Any]):
    """Rows from a file that is opened once."""

    def __init__(self, path: Any) -> None:
        self.f = open(path)  # noqa: SIM115

    def __iter__(self) -> Iterator[Batch]:
        self.f.seek(0)
        for line in self.f:
            yield torch.full((4,), float(line)), torch.tensor(int(line) % 3)


class Ongoing(IterableDataset[Any]):
    """Rows from an iterator that goes on."""

    def __init__(self) -> None:
        self.rows = itertools.cycle(Images(nn.Identity()))

    def __iter__(self) -> Iterator[Batch]:
        yield from itertools.islice(self.rows, 24)


@pytest.mark.parametrize("wrap", [partial(DataLoader, batch_size=4), list], ids=["DataLoader", "wrapped"])
@pytest.mark.parametrize("kind", ["a file", "an iterator"])
def test_a_stream_that_shares_its_file_or_iterator_with_the_loop_is_refused(kind, wrap, tmp_path):
    class Wrapped:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __iter__(self) -> Iterator[Any]:
            yield from self.stream

    (tmp_path / "rows").write_text("\n".join(map(str, range(12))))
    stream = Lines(tmp_path / "rows") if kind == "a file" else Ongoing()
    try:
        with pytest.raises(mf.errors.UnusableLoader, match="train_loader must open its files"):
            trained(backbone(), plain_loss, True, loader=Wrapped(stream) if wrap is list else wrap(stream))
    finally:
        if kind == "a file":
            stream.f.close()


def test_a_dataset_that_seeks_each_row_in_its_file_works(tmp_path):
    class Seeking(Dataset[Any]):
        def __init__(self, path: Any) -> None:
            self.f = open(path, "rb")  # noqa: SIM115

        def __len__(self) -> int:
            return 20

        def __getitem__(self, n: int) -> Batch:
            self.f.seek(n)
            return torch.full((4,), float(self.f.read(1)[0])), torch.tensor(n % 3)

    (tmp_path / "rows").write_bytes(bytes(range(20)))
    rows = Seeking(tmp_path / "rows")
    assert same(lambda tuned: trained(backbone(), plain_loss, tuned, loader=DataLoader(rows, batch_size=4)))
    rows.f.close()


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("horizon", ["run", "step"])
def test_a_loss_may_take_its_labels_out_of_the_batch(nested, horizon):
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        parts = batch["parts"] if nested else batch
        y = parts.pop("labels")
        return F.cross_entropy(model(parts.pop("x")), y)

    def new() -> list[Any]:
        found = [{"x": x, "labels": y} for x, y in batches()]
        return [{"parts": parts} for parts in found] if nested else found

    class Anew:
        def __iter__(self) -> Iterator[Any]:
            return iter(new())

    assert same(
        lambda tuned: trained(backbone(), loss_fn, tuned, loader=Anew(), valid=new(), horizon=horizon)
    )


def test_a_loss_may_take_parts_out_of_a_list():
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        y = batch.pop()
        return F.cross_entropy(model(batch.pop()), y)

    class Anew:
        def __iter__(self) -> Iterator[Any]:
            return iter([list(batch) for batch in batches()])

    assert same(
        lambda tuned: trained(backbone(), loss_fn, tuned, loader=Anew(), valid=[list(b) for b in batches()])
    )


@pytest.mark.parametrize("of", [tuple, list, lambda pair: {0: pair[0], 1: pair[1]}])
@pytest.mark.parametrize("horizon", ["run", "step"])
def test_batches_made_in_inference_mode_give_what_the_same_numbers_give(horizon, of):
    def given(valid: list[Any]) -> list[Tensor]:
        torch.manual_seed(0)
        space = mf.Space(lr=mf.Float(1e-3, 1, log=True, init=0.1))
        model = backbone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tuner = mf.Tuner(
            model, optimizer, space, plain_loss, list(valid), valid,
            schedule=1, hyper_optimizer=Still, horizon=horizon,
        )  # fmt: skip
        for batch in batches():
            optimizer.zero_grad()
            plain_loss(model, batch).backward()
            optimizer.step()
        tuner.finish()
        return [g[0] for g in tuner.hyper_optimizer.given]

    with torch.inference_mode():
        inference = [of((x.clone(), y.clone())) for x, y in batches()]
    found, right = given(inference), given([of(pair) for pair in batches()])
    assert len(found) == 3
    assert all(map(torch.equal, found, right))


# --- the step, and the model that is validated --------------------------------------------------------------


def test_a_step_that_the_user_compiles_gives_what_a_plain_one_gives():
    def given(compiled: bool) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        space = mf.Space(lr=mf.Float(1e-3, 1, log=True, init=0.1))
        model = backbone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tuner = mf.Tuner(model, optimizer, space, plain_loss, batches(), batches(), schedule=2)
        step = torch.compile(lambda: optimizer.step(), backend="eager") if compiled else optimizer.step
        values = []
        for batch in batches() * 3:
            optimizer.zero_grad()
            plain_loss(model, batch).backward()
            step()
            values.append(float(space["lr"]))
        assert tuner.log()["hypersteps"] >= 4
        return [p.detach().clone() for p in model.parameters()], values

    (weights, values), (right, right_values) = given(True), given(False)
    assert len(set(right_values)) > 3
    assert values == right_values
    assert all(map(torch.equal, weights, right))


@pytest.mark.parametrize("horizon", ["run", "step"])
def test_a_validation_loss_of_another_model_is_refused(horizon):
    copy = backbone()
    with pytest.raises(mf.errors.InvalidLoss, match="must read the weights that the optimiser moves"):
        trained(
            backbone(), plain_loss, True, horizon=horizon,
            valid_loss_fn=lambda model, batch: plain_loss(copy, batch),
        )  # fmt: skip


def test_a_loop_that_scales_its_gradients_resumes_as_if_it_had_gone_on() -> None:
    """What was found out about the scale takes batches, which must not be read again."""

    def made() -> tuple[mf.Space, nn.Module, torch.optim.Optimizer, mf.Tuner]:
        torch.manual_seed(0)
        space = mf.Space(dropout=mf.Float(0.01, 0.8, logit=True, init=0.3))
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), mf.nn.Dropout(space["dropout"]), nn.Linear(6, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        t1, t2 = ([one for batch in batches(n) for one in zip(*batch, strict=True)] for n in (3, 2))
        loaders = DataLoader(t1, 4, shuffle=True), DataLoader(t2, 4)  # type: ignore[arg-type]
        tuner = mf.Tuner(model, optimizer, space, plain_loss, *loaders, total_steps=120, schedule=5)
        return space, model, optimizer, tuner

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for n in steps:
            optimizer.zero_grad()
            plain_loss(model, batches()[n % 3]).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad.mul_(0.5)
            optimizer.step()

    space, model, optimizer, _ = made()
    go(model, optimizer, range(120))
    _, first, first_optimizer, saved = made()
    go(first, first_optimizer, range(80))
    random_numbers = torch.get_rng_state()
    resumed, other, other_optimizer, tuner = made()
    other.load_state_dict(first.state_dict())
    other_optimizer.load_state_dict(first_optimizer.state_dict())
    tuner.load_state_dict(saved.state_dict())
    torch.set_rng_state(random_numbers)
    go(other, other_optimizer, range(80, 120))
    assert resumed.as_dict() == space.as_dict()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
