"""Tune lr, momentum and weight decay of SGD on five regression tables, from 20 random starts.

    python benchmarks/tables.py                          # all tables; resumes
    python benchmarks/tables.py --tables boston yacht    # some tables
    python benchmarks/tables.py --table                  # table of the stored rows
    python benchmarks/tables.py --figure                 # also the figure
    python benchmarks/tables.py --seed 1                 # other weights and starts

A network of 50 hidden units is trained for 4,000 full-batch steps. The start has lr 10^U(-6, -1),
weight decay 10^U(-7, -2) and momentum U(0, 1).

=========  ===================================================================================
arm        what it is
=========  ===================================================================================
constant   24 settings: lr 0.003 0.01 0.03 0.1, momentum 0 0.9 0.97, weight decay 1e-4 1e-2
untouched  the start, without a tuner
tuned      `mf.Tuner` with its defaults
one_step   the same with horizon="step"
unrolled   exact gradient of the validation loss through 5 real steps, once in 20; SignSteps moves the values
=========  ===================================================================================

Every arm ends with the best of its weights by validation: "tuned" by `finish`, the others by the least
validation loss at 27 moments and the end. Errors are mean squared ones of standardised targets. The test set
is read once, with those weights. The best constant setting is chosen by validation.

Data: the five UCI tables of the directory --data, see its README. Rows: docs/results/tables.jsonl.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tasks import RESULTS, Row, compute, finite, parser_of, rows
from torch import Tensor, nn
from torch.func import functional_call

import midflight as mf
from midflight.tuner.hyper_optimizer import Move
from midflight.tuner.step_options import stride

ROWS = RESULTS / "tables.jsonl"
DATA = Path(__file__).parents[2] / "shared/data/uci"
TABLES = ["boston", "concrete", "naval", "wine", "yacht"]
STARTS, STEPS, MOMENTS = 20, 4000, 27
CONSTANT = [
    {"lr": lr, "momentum": m, "weight_decay": d}
    for lr in (0.003, 0.01, 0.03, 0.1)
    for m in (0.0, 0.9, 0.97)
    for d in (1e-4, 1e-2)
]
ARMS = {
    "constant": len(CONSTANT),
    "untouched": STARTS,
    "tuned": STARTS,
    "one_step": STARTS,
    "unrolled": STARTS,
}
UNROLLED, EVERY = 5, 20
"""Steps through which `unrolled` differentiates, and steps from one hyper-step to the next."""
RANGES = {
    "lr": mf.Float(1e-7, 1.0, log=True),
    "momentum": mf.Float(0.0, 0.999),
    "weight_decay": mf.Float(1e-8, 1.0, log=True),
}
Parts = dict[str, tuple[Tensor, Tensor]]


@cache
def parts(data: Path, table: str) -> Parts:
    """Load "train", "valid" and "test" of a table, standardised by the first two."""
    file = np.load(data / f"{table}.npz")
    known = np.concatenate([file["train"], file["valid"]])
    columns = []
    for name in ("x", "y"):
        mean, std = file[name][known].mean(0), file[name][known].std(0)
        columns.append((file[name] - mean) / np.where(std > 0, std, 1))
    return {
        part: tuple(torch.tensor(c[file[part]], dtype=torch.float32) for c in columns)  # type: ignore[misc]
        for part in ("train", "valid", "test")
    }


def start(index: int, seed: int) -> dict[str, float]:
    draw = random.Random(f"{index} {seed}")
    return {
        "lr": 10 ** draw.uniform(-6, -1),
        "weight_decay": 10 ** draw.uniform(-7, -2),
        "momentum": min(draw.random(), RANGES["momentum"].high),
    }


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


class Training:
    """A training of one table, which remembers its best weights by validation."""

    def __init__(self, found: Parts, values: dict[str, float], seed: int) -> None:
        self.parts = found
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(found["train"][0].shape[1], 50), nn.ReLU(), nn.Linear(50, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), **values)
        self.space = mf.Space({name: replace(RANGES[name], init=v) for name, v in values.items()})
        self.best, self.best_loss = self._weights(), self.loss("valid")

    @torch.no_grad()
    def loss(self, part: str) -> float:
        return float(loss_of(self.model, self.parts[part]))

    def keep_best(self) -> None:
        """Remember the weights if they have the least C2 so far."""
        if (now := self.loss("valid")) < self.best_loss:
            self.best, self.best_loss = self._weights(), now

    def _weights(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in self.model.state_dict().items()}

    def steps(self) -> Iterator[int]:
        """Take the steps of an ordinary loop."""
        for n in range(1, STEPS + 1):
            self.optimizer.zero_grad()
            loss_of(self.model, self.parts["train"]).backward()
            self.optimizer.step()
            yield n

    def unrolled_steps(self) -> Iterator[int]:
        """Take the same steps; one in EVERY is followed by UNROLLED steps with a graph and a hyper-step."""
        n = 0
        move = Move(self.space.raws, mf.SignSteps, lambda: n / STEPS, self._stride)
        move.optimizer.move_by_agreement([self.space.raws["lr"], self.space.raws["momentum"]])
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
        while n < STEPS:
            hyper = n % EVERY == 0
            self.space.requires_grad_(hyper)
            for _ in range(UNROLLED):
                weights, momenta = self._functional_step(weights, momenta, graph=hyper)
                n += 1
            if hyper:
                loss = F.mse_loss(
                    functional_call(self.model, weights, self.parts["valid"][0]), self.parts["valid"][1]
                )
                raws = self.space.raws
                found = torch.autograd.grad(loss, list(raws.values()))
                self.space.requires_grad_(False)
                if all(bool(g.isfinite().all()) for g in found):
                    move(dict(zip(raws, found, strict=True)))
                weights, momenta = ({k: t.detach() for k, t in d.items()} for d in (weights, momenta))
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(weights[name])
            yield n

    def _functional_step(self, weights: Any, momenta: Any, graph: bool) -> tuple[Any, Any]:
        weights = {name: w if w.requires_grad else w.requires_grad_() for name, w in weights.items()}
        x, y = self.parts["train"]
        loss = F.mse_loss(functional_call(self.model, weights, x), y)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=graph)
        lr, momentum, decay = (self.space[n].value for n in ("lr", "momentum", "weight_decay"))
        moved, kept = {}, {}
        for (name, w), g in zip(weights.items(), grads, strict=True):
            kept[name] = momentum * momenta[name] + g + decay * w
            moved[name] = w - lr * kept[name]
        if graph:
            return moved, kept
        return {k: t.detach() for k, t in moved.items()}, {k: t.detach() for k, t in kept.items()}

    def _stride(self, name: str, raw: Tensor) -> float | Tensor:
        transform = self.space[name].transform
        return stride(name, transform, raw) if name in ("lr", "momentum") else transform.stride(raw)


def run(job: tuple[Path, str, str, int, int]) -> Row:
    """Run a job (directory, table, arm, index, seed); return its row."""
    data, table, arm, index, seed = job
    found = parts(data, table)
    values = dict(CONSTANT[index] if arm == "constant" else start(index, seed))
    training, tuner = Training(found, values, seed), None
    if arm in ("tuned", "one_step"):
        tuner = mf.Tuner(
            training.model, training.optimizer, training.space, loss_of, [found["train"]], [found["valid"]],
            total_steps=STEPS, horizon="run" if arm == "tuned" else "step",
        )  # fmt: skip
    else:
        training.space.requires_grad_(False)
    began = time.perf_counter()
    moments = {STEPS * (i + 1) // MOMENTS for i in range(MOMENTS)}
    for n in training.unrolled_steps() if arm == "unrolled" else training.steps():
        if arm != "tuned" and n in moments:
            training.keep_best()
    seconds, last = time.perf_counter() - began, training.loss("valid")
    weights_finite = all(bool(p.isfinite().all()) for p in training.model.parameters())
    if arm == "tuned":
        assert tuner is not None
        tuner.finish()
    else:
        training.keep_best()
        training.model.load_state_dict(training.best)
    return {
        "task": table, "arm": arm, "index": index, "seed": seed, "start": values,
        "end": training.space.as_dict(), "last_valid": last, "weights_finite": weights_finite,
        "valid": training.loss("valid"), "test": training.loss("test"), "seconds": round(seconds, 3),
        "restored": tuner.log()["restored"] if tuner else 0,
    }  # fmt: skip


def best_constant(found: list[Row]) -> Row | None:
    """Return the constant setting with the least C2."""
    return min((r for r in found if r["arm"] == "constant"), key=lambda r: r["valid"], default=None)


def summary(found: list[Row]) -> str:
    """Print per table and arm: test errors over that of the best constant setting, and cost."""
    lines = [
        "| table | method | runs | NaN weights | test error, median | worst "
        "| within 1.1 x | within 2 x | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for table in TABLES:
        here = [r for r in found if r["task"] == table]
        if (best := best_constant(here)) is None:
            continue
        lines.append(f"| {table} | best constant | {ARMS['constant']} | | {best['test']:.4g} | | | | |")
        plain = {r["index"]: r["seconds"] for r in here if r["arm"] == "untouched"}
        for arm in list(ARMS)[1:]:
            chosen = [r for r in here if r["arm"] == arm]
            if not chosen:
                continue
            ratios = sorted(finite(r["test"]) / best["test"] for r in chosen)
            costs = sorted(r["seconds"] / plain[r["index"]] for r in chosen if r["index"] in plain)
            lines.append(
                f"| {table} | {arm} | {len(chosen)} | {sum(not r['weights_finite'] for r in chosen)} | "
                f"{ratios[len(ratios) // 2]:.2f} x | {ratios[-1]:.3g} x | {sum(r <= 1.1 for r in ratios)} | "
                f"{sum(r <= 2 for r in ratios)} | {costs[len(costs) // 2] if costs else math.nan:.2f} |"
            )
    return "\n".join(lines)


def figure(found: list[Row], path: Path) -> None:
    """Draw per table the sorted test errors of each arm, over that of the best constant setting."""
    whole = [t for t in TABLES if {"constant", "tuned"} <= {r["arm"] for r in found if r["task"] == t}]
    if not whole:
        return
    fig = Figure(figsize=(2.6 * len(whole), 3.2), layout="constrained")
    colours = {"untouched": "0.6", "tuned": "tab:blue", "one_step": "tab:orange", "unrolled": "tab:green"}
    for i, table in enumerate(whole):
        ax = fig.add_subplot(1, len(whole), i + 1)
        here = [r for r in found if r["task"] == table]
        best = best_constant(here)
        assert best is not None
        for arm, colour in colours.items():
            ends = sorted(min(100.0, r["test"] / best["test"]) for r in here if r["arm"] == arm)
            if not ends:
                continue
            ax.plot(range(1, len(ends) + 1), ends, ".-", color=colour, markersize=4, linewidth=1, label=arm)
        ax.axhspan(0.5, 1.1, color="tab:green", alpha=0.2, label="best constant, + 10 %")
        ax.set_yscale("log")
        ax.set_title(table)
        ax.set_xlabel("starts, sorted")
        if i == 0:
            ax.set_ylabel("test error over the best constant")
            ax.legend(fontsize=7)
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = parser_of(__doc__, ROWS, figure=True)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="default: all")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and starts")
    parser.add_argument("--data", type=Path, default=DATA, help="directory of the tables")
    options = parser.parse_args()
    if not (options.table or options.figure):
        missing = [t for t in options.tables if not (options.data / f"{t}.npz").exists()]
        if missing:
            parser.error(f"--data must hold {missing[0]}.npz, but {options.data} does not")
        done = {(r["task"], r["arm"], r["index"], r["seed"]) for r in rows(options.rows)}
        jobs = [(t, a, i, options.seed) for t in options.tables for a in options.arms for i in range(ARMS[a])]
        jobs = [(options.data, *job) for job in jobs if job not in done]
        compute(options.rows, jobs, run, options.workers)
    found = [r for r in rows(options.rows) if r["seed"] == options.seed]
    print(summary(found))
    if not options.table:
        figure(found, options.rows.with_suffix(".png"))


if __name__ == "__main__":
    main()
