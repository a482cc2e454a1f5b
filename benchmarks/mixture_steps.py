"""Compare steps of a mixture by the sizes of its hypergradients, the default, with steps by their signs.

    python benchmarks/mixture_steps.py                    # everything; resumes
    python benchmarks/mixture_steps.py --arms default --sources 8 --seeds 0 1
    python benchmarks/mixture_steps.py --table            # run nothing; print the table

A mixture has a weight for each source of data. Its hypergradient says how the loss on T2, the validation
data, changes with each weight.

problem    sources                                                                   right weights
single     each labels by a network of its own; T2 is like the first                 the first alone
blend      as single, each in a place of its own; T2 is like the first two           the first two
noise      the second half has random labels                                         the first half

A perceptron trains 300 steps of AdamW on batches of 32; a source has 1,000 examples, T2 has 256. The score is
(test loss - that of the right weights) / (that of equal weights - that of the right weights): 0 is as good as
the right weights, 1 as equal ones. Arms: "default" and "sign", steps by signs at one per 20 optimiser steps.
Constants were chosen on seeds 100 to 105. Rows: docs/results/mixture_steps.jsonl.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tasks import RESULTS, Row, append, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf
from midflight._reporting.machine import machine
from midflight.tuner.hyper_optimizer import SignSteps

ROWS = RESULTS / "mixture_steps.jsonl"
PROBLEMS = ["single", "blend", "noise"]
INPUTS, CLASSES, STEPS, BATCH = 20, 5, 300, 32


def sign() -> dict[str, Any]:
    return {"hyper_optimizer": partial(SignSteps, agreement=0.75), "schedule": mf.FrontLoaded(20)}


ARMS: dict[str, Any] = {"default": dict, "sign": sign}


class Problem:
    """Sources, T2, test set and right weights."""

    def __init__(self, kind: str, k: int, seed: int) -> None:
        self.kind, self.k = kind, k
        self.draws = torch.Generator().manual_seed(10_000 + seed)
        self.teachers = self._normal(k, INPUTS, CLASSES)
        self.places = 4 * self._normal(k, INPUTS) / math.sqrt(INPUTS)
        right = {"single": 1, "blend": 2, "noise": k // 2}[kind]
        self.right = (torch.arange(k) < right) / right
        self.sources = [TensorDataset(*self._draw(s, 1000)) for s in range(k)]
        self.valid, self.test = (self._like(right, n) for n in (256, 4096))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draws)

    def _draw(self, s: int, n: int) -> tuple[Tensor, Tensor]:
        x = self._normal(n, INPUTS) + (self.places[s] if self.kind == "blend" else 0)
        if self.kind == "noise" and s >= self.k // 2:
            return x, torch.randint(0, CLASSES, (n,), generator=self.draws)
        return x, (x @ self.teachers[0 if self.kind == "noise" else s]).argmax(1)

    def _like(self, right: int, n: int) -> TensorDataset:
        parts = [self._draw(s, n // right) for s in range(right)]
        return TensorDataset(*map(torch.cat, zip(*parts, strict=True)))


def train(problem: Problem, seed: int, weights: Tensor | None = None, **options: Any) -> float:
    """Return the test loss of a training with these weights; without them, of a tuned one."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mixture = mf.Mixture(problem.k) if weights is None else mf.Mixture(problem.k, ratio=1e6, floor=0.0)
    space = mf.Space(mixture=mixture)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return mixture.loss(losses(model, batch), batch[2])

    loader = mixture.loader(problem.sources, BATCH)
    if weights is None:
        mf.Tuner(
            model, optimizer, space, loss, loader, DataLoader(problem.valid, 64, shuffle=True),
            valid_loss_fn=lambda model, batch: losses(model, batch).mean(), total_steps=STEPS,
            max_grad_norm=math.inf, **options,
        )  # fmt: skip
    else:
        mixture.set(weights.clamp(min=1.01e-6 * float(weights.max())))
    step = 0
    while step < STEPS:
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            if step == STEPS:
                break
    with torch.no_grad():
        return float(losses(model, problem.test.tensors).mean())


def score(kind: str, k: int, seed: int, arm: str) -> Row:
    torch.set_num_threads(1)
    problem = Problem(kind, k, seed)
    equal, right = train(problem, seed, torch.ones(k)), train(problem, seed, problem.right)
    tuned = train(problem, seed, **ARMS[arm]())
    return {
        "task": kind, "sources": k, "index": seed, "arm": arm, "equal": equal, "right": right,
        "tuned": tuned, "score": round((tuned - right) / (equal - right), 3),
    }  # fmt: skip


def table(found: list[Row]) -> str:
    """Print the mean score, and its standard error over the seeds."""
    lines = ["| problem | sources | " + " | ".join(ARMS) + " |", "|---" * (len(ARMS) + 2) + "|"]
    for kind, k in dict.fromkeys((r["task"], r["sources"]) for r in found):
        cells = []
        for arm in ARMS:
            scores = [r["score"] for r in found if (r["task"], r["sources"], r["arm"]) == (kind, k, arm)]
            error = np.std(scores, ddof=1) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
            cells.append(f"{np.mean(scores):.2f} ± {error:.2f}" if scores else "-")
        lines.append(f"| {kind} | {k} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--sources", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true", help="run nothing; print the table")
    options = parser.parse_args()
    if not options.table:
        done = {(r["task"], r["sources"], r["index"], r["arm"]) for r in rows(options.rows)}
        if not options.rows.exists():
            append(options.rows, {"machine": machine()})
        jobs = [(p, k, s, a) for k in options.sources for p in options.problems for s in options.seeds
                for a in options.arms]  # fmt: skip
        for job in jobs:
            if job not in done:
                append(options.rows, score(*job))
    print(table(rows(options.rows)))


if __name__ == "__main__":
    main()
