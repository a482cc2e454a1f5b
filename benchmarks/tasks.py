"""Define five tasks, from long training on few data to short training on many, and store rows.

The hyperparameters are log10 L2 in [-7, -0.5] and input noise in [0, 1.2]; in a second variant also dropout
after each ReLU in [0, 0.8] and log10 of the learning rate in [-5, -1]. All runs of a task share seed, data
and batches. A learning rate that is not tuned is constant. Test errors are only reported.
"""

import argparse
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import midflight as mf
from midflight._reporting.machine import machine
from midflight.datasets import Shuffled, Split, load
from midflight.nn.magnitude import default_floor
from midflight.study.arm import mlp
from midflight.tuner.live import evaluating

RESULTS = Path(__file__).parent.parent / "docs/results"
LOW, HIGH = (-7.0, 0.0), (-0.5, 1.2)
LOW_OF_FOUR, HIGH_OF_FOUR = (*LOW, 0.0, -5.0), (*HIGH, 0.8, -1.0)
NAMES, LOG = ("weight_decay", "noise", "dropout", "lr"), ("weight_decay", "lr")
Point = tuple[float, ...]
"""(log10 L2, noise) or (log10 L2, noise, dropout, log10 learning rate)"""
Splits = tuple[Split, Split, Split]
Batch = tuple[Tensor, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task: data (T1, T2, test), network, training length, and the tuner's validation batches."""

    data: Callable[[], Splits]
    network: Callable[[], nn.Sequential]
    epochs: int
    batch: int
    valid_batch: int
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return self.loss(model(x), y)


def images(name: str, train: int, valid: int) -> Splits:
    a = load(name)
    order = torch.randperm(len(a.train_y), generator=torch.Generator().manual_seed(7))
    images = Split(torch.from_numpy(a.train_x), torch.from_numpy(a.train_y))
    test = Split(torch.from_numpy(a.test_x), torch.from_numpy(a.test_y))
    return images[order[:train]], images[order[train : train + valid]], test


def diabetes() -> Splits:
    """Load scikit-learn's diabetes table: 200 training rows, 121 each for T2 and test; standardised."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(7))
    x, y = x[order], y[order, None]
    x, y = (x - x[:200].mean(0)) / x[:200].std(0), (y - y[:200].mean()) / y[:200].std()
    patients = Split(x, y)
    return patients[:200], patients[200:321], patients[321:]


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def with_dropout(network: nn.Sequential, rate: mf.Hyperparameter) -> nn.Sequential:
    """Return the network with dropout after each ReLU."""
    layers = ([m, mf.nn.Dropout(rate)] if isinstance(m, nn.ReLU) else [m] for m in network)
    return nn.Sequential(*(m for pair in layers for m in pair))


TASKS = {
    "mnist_5k": Task(lambda: images("mnist", 5000, 2000), lambda: mlp(784, [200, 200], 10), 40, 128, 128),
    "mnist_55k": Task(lambda: images("mnist", 55000, 5000), lambda: mlp(784, [200, 200], 10), 5, 128, 128),
    "fashion_cnn": Task(lambda: images("fashion_mnist", 20000, 5000), cnn, 5, 128, 128),
    "tabular": Task(diabetes, lambda: mlp(10, [64, 64], 1), 200, 20, 121, F.mse_loss),
    "digits": Task(lambda: images("digits", 1000, 437), lambda: mlp(64, [100, 100], 10), 60, 50, 437),
}


@cache
def splits(name: str, device: str = "cpu") -> Splits:
    """Load the data of a task, once per process."""
    t1, t2, test = (Split(part.x.to(device), part.y.to(device)) for part in TASKS[name].data())
    return t1, t2, test


class Training:
    """A training of a task from a point, step by step, on T1 or on T1 and T2.

    Attributes:
        space: the hyperparameters of the point.
        steps: number of steps of the whole training.
    """

    def __init__(
        self, name: str, start: Point, seed: int = 0, with_t2: bool = False, device: str = "cpu"
    ) -> None:
        self.name, self.task = name, TASKS[name]
        self.t1, self.t2, self.test = splits(name, device)
        if with_t2:
            both = zip((self.t1.x, self.t1.y), (self.t2.x, self.t2.y), strict=True)
            self.t1 = Split(*map(torch.cat, both))
        torch.manual_seed(seed)
        names = NAMES[: len(start)]
        self.space = mf.Space(
            {
                name: mf.Float(
                    _natural(name, low), _natural(name, high), log=name in LOG, init=_natural(name, init)
                )
                for name, low, high, init in zip(NAMES, LOW_OF_FOUR, HIGH_OF_FOUR, start, strict=False)
            }
        )
        self.space.requires_grad_(False)  # a fixed run needs no hypergradients
        network = self.task.network()
        if "dropout" in names:
            network = with_dropout(network, self.space["dropout"])
        self.noise = mf.nn.GaussianNoise(self.space["noise"], floor=0.0)
        self.model = nn.Sequential(self.noise, network).to(device)
        options = {name: float(self.space[name]) for name in names if name in LOG}
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True, **options)
        self.seed = seed
        self.batches = endless(Shuffled(self.t1, self.task.batch, seed=seed + 1))
        self.steps = self.task.epochs * (len(self.t1) // self.task.batch)

    def tune(self, **options: Any) -> mf.Tuner:
        """Attach a tuner with these options, others default; then `step` also tunes."""
        self.noise.floor = default_floor(self.space["noise"])
        size = self.task.valid_batch
        return mf.Tuner(
            self.model, self.optimizer, self.space, self.task.loss_of,
            Shuffled(self.t1, min(size, len(self.t1)), seed=self.seed + 3),
            Shuffled(self.t2, size, seed=self.seed + 2), total_steps=self.steps, **options,
        )  # fmt: skip

    def step(self) -> None:
        batch = next(self.batches)
        self.optimizer.zero_grad()
        self.task.loss_of(self.model, batch).backward()
        self.optimizer.step()

    def state_dict(self) -> Row:
        """Return the state of weights and optimiser, without hyperparameters and data position."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Row) -> None:
        decay = self.optimizer.param_groups[0]["weight_decay"]
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["weight_decay"] = decay

    @property
    def point(self) -> list[float]:
        """Return the current values in the coordinates of `Point`."""
        values = self.space.as_dict()
        return [math.log10(v) if name in LOG else v for name, v in values.items()]

    def losses(self) -> tuple[float, float]:
        """Return (validation loss, test error)."""
        return self.valid_loss(), self.test_error()

    @torch.no_grad()
    def valid_loss(self) -> float:
        with evaluating(self.model):
            return float(self.task.loss_of(self.model, (self.t2.x, self.t2.y)))

    @torch.no_grad()
    def test_error(self) -> float:
        """Return the share of misclassified examples, or the mean squared error."""
        with evaluating(self.model):
            outputs = self.model(self.test.x)
        if self.task.loss is F.mse_loss:
            return float(F.mse_loss(outputs, self.test.y))
        return float((outputs.argmax(1) != self.test.y).float().mean())


def endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of endless passes."""
    while True:
        yield from batches


def _natural(name: str, value: float) -> float:
    return 10**value if name in LOG else value


def rows(path: Path) -> list[Row]:
    """Return the stored rows; skip a line that a crash left incomplete."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in found if "task" in row]


def markdown(head: Sequence[str], cells: Iterable[Sequence[object]]) -> str:
    """Return a markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *cells))


def captioned(tables: Mapping[str, str]) -> str:
    """Return tables below their captions."""
    return "\n\n".join(f"{caption}\n\n{table}" for caption, table in tables.items())


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, and the ends of its 95 % bootstrap interval."""
    found = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(found), size=(10_000, len(found)))
    low, high = np.quantile(found[drawn].mean(1), [0.025, 0.975])
    return float(found.mean()), float(low), float(high)


def ratio_of(logs: Sequence[float]) -> str:
    """Return the geometric mean of ratios, ± two standard errors of the mean logarithm."""
    return f"{np.exp(np.mean(logs)):.3f} ± {2 * np.std(logs, ddof=1) / len(logs) ** 0.5:.3f}"


def finite(loss: float | None) -> float:
    """Return a loss; infinity if there is none, or if it is NaN."""
    return math.inf if loss is None or loss != loss else loss


def parser_of(
    about: str | None, rows: Path | None = None, workers: bool = True, figure: bool = False
) -> argparse.ArgumentParser:
    """Return a parser for a benchmark that stores rows, with the options that these have in common.

    Args:
        about: the benchmark's docstring.
        rows: the default of --rows; None: the file cannot be chosen.
        workers: whether the benchmark can use several processes.
        figure: whether it has a figure.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if workers:
        parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--table", action="store_true", help="run nothing; show the stored rows")
    if figure:
        parser.add_argument("--figure", action="store_true", help="run nothing; also draw the figure")
    if rows:
        parser.add_argument("--rows", type=Path, default=rows, help="file of the rows")
    return parser


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def compute(path: Path, jobs: Sequence[Any], work: Callable[[Any], Row], workers: int) -> None:
    """Append the machine, then `work(job)` for each job, in processes of one thread."""
    if not jobs:
        return
    append(path, {"machine": machine()})
    with multiprocessing.get_context("spawn").Pool(workers, one_thread) as pool:
        for n, row in enumerate(pool.imap_unordered(work, jobs), 1):
            append(path, row)
            print(f"{n}/{len(jobs)} {row['task']} {row.get('arm', '')} {row['index']}", flush=True)


def one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
