"""Measure cost and error of each hypergradient estimator.

    python benchmarks/estimators.py            # table, and docs/results/estimators.json
    python benchmarks/estimators.py --json     # print the numbers, write nothing
    python benchmarks/estimators.py --table    # the stored numbers

Workload: MLP 784-1000-1000-1000-10 with tanh, batch 100, Adam; L2 in the optimiser, input noise in the
loss. One hyperparameter step has the horizon "step" and uses all examples of the batch for the mixed
partial derivative (the default uses fewer).

    passes   multiply-adds in units of one training step, counted by torch's FlopCounterMode
    time     median ratio to a plain training step, alternating, one thread
    memory   peak of a fresh process minus that of plain training, in units of the weights
    errors   relative to `one_step`, float32, at step 50
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tasks import markdown
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import midflight as mf
from midflight._reporting.machine import machine
from midflight.errors import MidflightError

HERE = Path(__file__).parent
OUT = HERE.parent / "docs/results/estimators.json"
WIDTH, BATCH, WARM_UP, ROUNDS = 1000, 100, 50, 7


class Work:
    """The paper's network with a smooth activation, during training."""

    def __init__(self, estimator: str | None) -> None:
        """Use `estimator` in a hyperparameter step after each training step; None: train only."""
        torch.manual_seed(0)
        space = mf.Space(
            weight_decay=mf.Float(10**-5.5, 10**-2.5, log=True, init=1e-4),
            noise=mf.Float(0.0, 0.8, init=0.3),
        )
        hidden = [(nn.Linear(n, WIDTH), nn.Tanh()) for n in (784, WIDTH, WIDTH)]
        self.model = nn.Sequential(
            mf.nn.GaussianNoise(space["noise"]),
            *(layer for pair in hidden for layer in pair),
            nn.Linear(WIDTH, 10),
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.t1, t2 = ((torch.rand(BATCH, 784), torch.randint(0, 10, (BATCH,))) for _ in range(2))
        self.seen: list[Tensor] = []
        space.requires_grad_(False)
        for _ in range(WARM_UP):
            self.step()
        if estimator:
            mf.Tuner(
                self.model, self.optimizer, space, loss, [self.t1], [t2], horizon="step", schedule=1,
                estimator=estimator, examples=BATCH, hyper_optimizer=lambda raws: Keep(raws, self.seen),
            )  # fmt: skip

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss(self.model, self.t1).backward()
        self.optimizer.step()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Keep(torch.optim.Optimizer):
    """An optimiser that stores the hypergradients and takes no step."""

    def __init__(self, raws: list[Tensor], seen: list[Tensor]) -> None:
        super().__init__(raws, {"lr": 1.0})
        self.seen = seen

    def step(self, closure: Any = None) -> None:
        self.seen.append(torch.stack([p.grad for p in self.param_groups[0]["params"]]))


def passes(estimator: str) -> float:
    """Return the multiply-adds of a training step with a hyperparameter step over those of a plain one."""
    tuned = Work(estimator)
    tuned.step()  # the first step also analyses the loss
    counts = []
    for work in (Work(None), tuned):
        with FlopCounterMode(display=False) as counter:
            work.step()
        counts.append(counter.get_total_flops())
    return counts[1] / counts[0]


def time_ratio(estimator: str) -> float:
    """Return the median ratio of the times of a tuned and a plain step, alternating."""
    plain, tuned = Work(None), Work(estimator)
    tuned.step()
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for work in (plain, tuned):
            began = time.perf_counter()
            work.step()
            times.append(time.perf_counter() - began)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


def hypergradient(estimator: str) -> Tensor:
    """Return the hypergradients of (weight_decay, noise), for equal state and random numbers."""
    work = Work(estimator)
    work.step()
    return work.seen[-1]


def peak(estimator: str) -> float:
    """Return the peak resident memory of a fresh process, in MB."""
    command = [sys.executable, __file__, "--alone", estimator]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def alone(estimator: str) -> None:
    """Print the peak resident memory of this process after a few steps."""
    work = Work(None if estimator == "plain" else estimator)
    for _ in range(3):
        work.step()
    status = Path("/proc/self/status").read_text()  # ru_maxrss would include the parent's memory at the fork
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def measure() -> dict[str, Any]:
    """Measure all estimators; include the machine."""
    weights = sum(p.numel() * 4 for p in Work(None).model.parameters()) / 2**20
    plain, exact = peak("plain"), hypergradient("one_step")
    rows: list[dict[str, Any]] = []
    for name in mf.hypergrad.ESTIMATORS:
        print(name, file=sys.stderr)
        try:
            errors = (hypergradient(name) / exact - 1).abs().tolist()
            rows.append(
                {
                    "estimator": name,
                    "passes": round(passes(name), 2),
                    "time_ratio": round(time_ratio(name), 2),
                    "memory_in_weights": round((peak(name) - plain) / weights, 1),
                    "error_weight_decay": errors[0],
                    "error_noise": errors[1],
                }
            )
        except (MidflightError, RuntimeError) as error:
            rows.append({"estimator": name, "error": str(error)})
    return {"machine": machine(), "weights_mb": round(weights, 1), "rows": rows}


def main() -> None:
    """Measure, print and store."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if "--alone" in sys.argv:
        alone(sys.argv[-1])
        return
    if "--table" not in sys.argv:
        found = measure()
        if "--json" in sys.argv:
            print(json.dumps(found, indent=2))
            return
        OUT.write_text(json.dumps(found, indent=2) + "\n")
    head = ["estimator", "passes", "time", "memory", "error of L2", "error of noise"]
    print(markdown(head, [_cells(row) for row in json.loads(OUT.read_text())["rows"]]))


def _cells(row: dict[str, Any]) -> list[object]:
    if "error" in row:
        return [row["estimator"], row["error"], "", "", "", ""]
    errors = (f"{row[name]:.2g}" for name in ("error_weight_decay", "error_noise"))
    return [row["estimator"], row["passes"], f"{row['time_ratio']:.1f}", row["memory_in_weights"], *errors]


if __name__ == "__main__":
    main()
