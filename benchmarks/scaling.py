"""Measure how the cost of tuning grows with weights, hyperparameters and members of a population.

    python benchmarks/scaling.py            # writes docs/results/scaling.json and .png
    python benchmarks/scaling.py --table    # only the table, of the stored numbers
    python benchmarks/scaling.py --figure   # also the figure

One thread, Adam, batches of 100 random images, horizon "step".

    weights          MLP with two equal hidden layers, 10^5 to 10^8 weights; L2 and input noise
    hyperparameters  one loss weight per training example, 2 to 10^6 examples; a network of 10^5 weights
    members          a `Population` of networks of 10^4 weights

A fresh process measures the median time of a plain step and of one with a hyperparameter step, and peak
memory.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from overhead import status
from tasks import markdown, parser_of
from torch import Tensor, nn

import midflight as mf
from midflight._reporting.machine import machine

OUT = Path(__file__).parent.parent / "docs/results/scaling.json"
BATCH = 100
SIZES = {
    "weights": [10**5, 10**6, 10**7, 10**8],
    "hyperparameters": [2, 10**2, 10**4, 10**6],
    "members": [1, 4, 16, 64, 256],
}
SERIES = {"plain_ms": "plain step", "hyper_ms": "step with a hyper-step"}


def images(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.rand(*shape, 784), torch.randint(0, 10, shape)


def mlp(weights: float) -> nn.Sequential:
    """Return a network 784-n-n-10 with about `weights` weights."""
    n = round((-794 + (794**2 + 4 * weights) ** 0.5) / 2)
    return nn.Sequential(
        nn.Linear(784, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 10)
    )  # fmt: skip


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def noisy() -> mf.Space:
    return mf.Space(weight_decay=mf.Float(1e-6, 1e-2, log=True), noise=mf.Float(0.0, 0.8, init=0.3))


def by_weights(n: int, every: int) -> Callable[[], None]:
    space = noisy()
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), mlp(n))
    optimizer = torch.optim.Adam(model.parameters())
    batches = [images(BATCH)]
    mf.Tuner(model, optimizer, space, loss, batches, list(batches), horizon="step", schedule=every)
    return stepper(optimizer, lambda: loss(model, batches[0]))


def by_hyperparameters(n: int, every: int) -> Callable[[], None]:
    space, model = mf.Space(weight=mf.Float(0.0, 2.0, shape=(n,))), mlp(1e5)
    optimizer = torch.optim.Adam(model.parameters())
    loader = Numbered(n)
    batches = iter(loader)

    def weighted(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, numbers = batch
        return (space["weight"][numbers] * F.cross_entropy(model(x), y, reduction="none")).mean()

    mf.Tuner(
        model, optimizer, space, weighted, loader, loader, valid_loss_fn=loss, horizon="step", schedule=every
    )
    return stepper(optimizer, lambda: weighted(model, next(batches)))


class Numbered:
    """Endless batches of the same images with new indices, as if drawn from n examples."""

    def __init__(self, n: int) -> None:
        self.n, self.images = n, images(BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return ((*self.images, torch.randint(self.n, (BATCH,))) for _ in itertools.count())


def stepper(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def by_members(n: int, every: int) -> Callable[[], object]:
    x, y = images(n, BATCH)
    population = mf.Population(
        n, lambda space: nn.Sequential(mf.nn.GaussianNoise(space["noise"]), mlp(1e4)), noisy(),
        torch.optim.Adam, loss_fn=loss, valid_loader=[(x, y)], schedule=every,
    )  # fmt: skip
    return lambda: population.step((x, y))


MAKE = {"weights": by_weights, "hyperparameters": by_hyperparameters, "members": by_members}


def measure(what: str, n: int) -> dict[str, Any]:
    """Measure in this process: milliseconds of both kinds of step, and MB above the start."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    row: dict[str, Any] = {"what": what, "n": n}
    for name, every in (("hyper_ms", 1), ("plain_ms", 10**9)):
        step = MAKE[what](n, every)
        start = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        times, until = [], time.perf_counter() + 3
        while len(times) < 4 or (time.perf_counter() < until and len(times) < 50):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        row[name] = round(1000 * float(np.median(times[2:])), 3)
        if name == "hyper_ms":
            row["mb"] = round(status("VmHWM") - start, 1)
    return row


def slope(rows: list[dict[str, Any]], key: str) -> float:
    """Return d log(key) / d log(n) by least squares over the larger half, where fixed costs are small."""
    upper = rows[len(rows) // 2 :] if len(rows) > 3 else rows
    return float(np.polyfit(np.log([r["n"] for r in upper]), np.log([r[key] for r in upper]), 1)[0])


def figure(found: list[dict[str, Any]]) -> None:
    fig = Figure(figsize=(11, 3.4), layout="constrained")
    for i, what in enumerate(SIZES):
        rows = [r for r in found if r["what"] == what]
        ax = fig.add_subplot(1, len(SIZES), i + 1)
        for key, label in SERIES.items():
            ax.loglog(
                [r["n"] for r in rows], [r[key] for r in rows], "o-",
                label=f"{label}, slope {slope(rows, key):.2f}",
            )  # fmt: skip
        ax.set_xlabel(what)
        ax.set_ylabel("ms" if what != "members" else "ms, all members together")
        ax.legend(fontsize=7, loc="upper left")
    fig.savefig(OUT.with_suffix(".png"), dpi=110)


def table(found: list[dict[str, Any]]) -> str:
    head = ["what grows", "number", "plain step, ms", "with a hyper-step, ms", "ratio", "peak, MB"]
    cells = [
        [
            r["what"],
            f"{r['n']:,}",
            r["plain_ms"],
            r["hyper_ms"],
            f"{r['hyper_ms'] / r['plain_ms']:.2f}",
            r["mb"],
        ]
        for r in found
    ]
    return markdown(head, cells)


def main() -> None:
    parser = parser_of(__doc__, workers=False, figure=True)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(options.alone[0], int(options.alone[1]))))
        return
    if options.table or options.figure:
        found = json.loads(OUT.read_text())["rows"]
    else:
        found = []
        for what, sizes in SIZES.items():
            for n in sizes:
                command = [sys.executable, __file__, "--alone", what, str(n)]
                found.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
                print(found[-1], file=sys.stderr, flush=True)
        OUT.write_text(json.dumps({"machine": machine(), "rows": found}, indent=1) + "\n")
    print(table(found))
    if not options.table:
        figure(found)


if __name__ == "__main__":
    main()
