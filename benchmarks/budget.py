"""Measure whether a time budget is kept: a training with and without a tuner, alternating every 10 steps.

    python benchmarks/budget.py            # on an idle machine
    python benchmarks/budget.py --load     # beside two busy processes
    python benchmarks/budget.py --table    # the stored ratios

MLP 784-300-300-10, batch 128, Adam, 2,000 steps; L2 and input noise are tuned. Denormal floats are flushed,
because a strong tuned L2 would otherwise slow every step. Prints the time ratio of the tuned to the plain
training and stores it in docs/results/budget.json.
"""

import json
import multiprocessing
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tasks import markdown, parser_of
from torch import Tensor, nn

import midflight as mf
from midflight._reporting.machine import machine

OUT = Path(__file__).parent.parent / "docs/results/budget.json"
STEPS, TURN = 2000, 10
X, Y = torch.rand(4096, 784), torch.randint(0, 10, (4096,))


class Training:
    """A training; with a tuner unless `budget` is None."""

    def __init__(self, budget: float | None) -> None:
        torch.manual_seed(0)
        space = mf.Space(weight_decay=mf.Float(1e-7, 1e-2, log=True), noise=mf.Float(0.0, 0.8, init=0.2))
        layers = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10)
        self.model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), *layers)
        self.optimizer = torch.optim.Adam(self.model.parameters(), weight_decay=float(space["weight_decay"]))
        batches = list(zip(X.split(128), Y.split(128), strict=True))
        self.tuner = None if budget is None else mf.Tuner(
            self.model, self.optimizer, space, loss, batches, batches, total_steps=STEPS,
            schedule=mf.TimeBudget(budget),
        )  # fmt: skip
        space.requires_grad_(False)

    def run(self, steps: int) -> float:
        """Take some steps; return their seconds."""
        began = time.perf_counter()
        for _ in range(steps):
            rows = torch.randint(len(Y), (128,))
            self.optimizer.zero_grad()
            loss(self.model, (X[rows], Y[rows])).backward()
            self.optimizer.step()
        return time.perf_counter() - began


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def busy() -> None:
    while True:
        torch.rand(300, 300) @ torch.rand(300, 300)


def main() -> None:
    parser = parser_of(__doc__, workers=False)
    parser.add_argument("--load", action="store_true", help="run two busy processes in parallel")
    options = parser.parse_args()
    if not options.table:
        measure(options.load)
    found = json.loads(OUT.read_text())
    ratios = [(*name.split(), ratio) for name, ratio in found.items() if name != "machine"]
    print(markdown(["machine", "budget", "time over plain"], ratios))


def measure(load: bool) -> None:
    """Store the ratios of three budgets, on a quiet machine or with two busy processes."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    others = [multiprocessing.Process(target=busy, daemon=True) for _ in range(2 if load else 0)]
    for process in others:
        process.start()
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    found["machine"] = machine()
    for budget in (0.03, 0.05, 0.1):
        plain, tuned = Training(None), Training(budget)
        seconds = [0.0, 0.0]
        for _ in range(STEPS // TURN):
            seconds = [s + t.run(TURN) for s, t in zip(seconds, (plain, tuned), strict=True)]
        ratio = seconds[1] / seconds[0]
        assert tuned.tuner is not None
        counted = 1 + tuned.tuner.log()["cost"]
        print(f"budget {budget:.2f}: {ratio:.3f} of the plain time; the tuner counted {counted:.3f}")
        found[f"{'load' if load else 'quiet'} {budget}"] = round(ratio, 4)
    for process in others:
        process.terminate()
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
