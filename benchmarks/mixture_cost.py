"""Measure what tuning a mixture costs at defaults, over the same training with fixed weights.

    python benchmarks/mixture_cost.py                        # everything; resumes
    python benchmarks/mixture_cost.py --sources 8 --by sampling --steps 250 1000
    python benchmarks/mixture_cost.py --table                # run nothing; print the table

A hyper-step is a step at which the tuner also moves the weights of the sources.

Both trainings draw batches of 16 windows of 64 bytes from a loader of `mf.Mixture`, for a Transformer of
texts.py under fused AdamW and clipping. The text is random, which changes no time. One thread.

model            weights
blocks           1.26 million, of which 0.1 million are embeddings
hashed           1.19 million, of which 1.07 million are embeddings, as in mixture.py; a plain step does
                 little with most of them

The two trainings take turns, step by step, in one process. Each step of the tuned one is divided by the plain
step beside it.

column              meaning
time over plain     of the whole run: (steps without a hyper-step x their median, plus the first hyper-step,
                    plus the other hyper-steps x their median) / steps
by sums             the same as a ratio of summed times, which has the noise of the machine in it
first hyper-step    what it adds, in plain steps
later ones          the median of what the later hyper-steps add, in plain steps
loader              time in the loader of one step, in plain steps

Rows: docs/results/mixture_cost.jsonl.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixture import loss_of
from tasks import RESULTS, Row, append, rows
from texts import SMALL, Size, Transformer, Windows, losses_of
from torch import nn
from torch.utils.data import DataLoader

import midflight as mf
from midflight._reporting.machine import machine

ROWS = RESULTS / "mixture_cost.jsonl"
SOURCES = [2, 8, 64, 1000]
BYTES = 10_000
"""Of a source."""
MODELS = {"blocks": Size(width=128, layers=6, hashed=256), "hashed": SMALL}
KEYS = "model", "sources", "by", "steps", "index"


class Training:
    """A training on random text; `step` takes one step and returns its seconds and those of the loader."""

    def __init__(self, size: Size, sources: int, by: Any, steps: int, seed: int, tuned: bool) -> None:
        draws = torch.Generator().manual_seed(seed)
        random = [torch.randint(0, 256, (BYTES,), generator=draws) for _ in range(sources)]
        data = [Windows([text], size.context) for text in random]
        torch.manual_seed(seed)
        self.model = Transformer(size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=size.lr, fused=True)
        self.mixture = mf.Mixture(sources)
        space = mf.Space(mixture=self.mixture)
        loader = self.mixture.loader(data, size.batch, by=by)
        self.batches = _endless(loader)
        self.hypersteps = 0
        if tuned:
            mf.Tuner(
                self.model, self.optimizer, space, self.loss, loader,
                DataLoader(data[0], size.batch, shuffle=True), valid_loss_fn=loss_of, total_steps=steps,
                on_hyperstep=self._count,
            )  # fmt: skip

    def _count(self, steps: int, numbers: Any) -> None:
        self.hypersteps += 1

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        windows, drawn = batch
        return self.mixture.loss(losses_of(model, windows), drawn)

    def step(self) -> tuple[float, float]:
        began = time.perf_counter()
        batch = next(self.batches)
        loaded = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(self.model, batch).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return time.perf_counter() - began, loaded - began


def _endless(loader: "DataLoader[Any]") -> Iterator[Any]:
    while True:
        yield from loader


def measure(model: str, sources: int, by: str, steps: int, seed: int) -> Row:
    """Return the row of two trainings side by side."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    plain, tuned = (Training(MODELS[model], sources, by, steps, seed, tuned) for tuned in (False, True))
    times, loading, hyper = [], [], []
    for n in range(steps):
        order: list[Callable[[], tuple[float, float]]] = [plain.step, tuned.step]
        before = tuned.hypersteps
        found = [step() for step in order[:: 1 if n % 2 else -1]][:: 1 if n % 2 else -1]
        times.append([seconds for seconds, _ in found])
        loading.append(found[0][1])
        hyper.append(tuned.hypersteps > before)
    pairs, with_hyper = np.array(times), np.array(hyper)
    ratios = pairs[:, 1] / pairs[:, 0]
    usual = float(np.median(ratios[~with_hyper]))
    first, *others = ratios[with_hyper]
    later = float(np.median(others))
    whole = (usual * int((~with_hyper).sum()) + first + later * len(others)) / steps
    plain_step = float(np.median(pairs[:, 0]))
    return {
        "task": "cost", "model": model, "sources": sources, "by": by, "steps": steps, "index": seed,
        "ratio": round(float(whole), 3),
        "sum": round(float(pairs[:, 1].sum() / pairs[:, 0].sum()), 3), "hypersteps": int(with_hyper.sum()),
        "usual": round(usual, 3), "first": round(float(first) - 1, 2), "later": round(later - 1, 2),
        "step_ms": round(1000 * plain_step, 2), "loader": round(float(np.median(loading)) / plain_step, 4),
    }  # fmt: skip


def table(found: list[Row]) -> str:
    lines = [
        "| model | sources | weights act by | steps | seed | hyper-steps | time over plain | by sums "
        "| first hyper-step | later ones | plain step, ms | loader |",
        "|---" * 12 + "|",
    ]
    for r in sorted(
        (r for r in found if "ratio" in r), key=lambda r: (r["model"], r["sources"], r["by"], r["steps"])
    ):
        cells = (
            r[key] for key in (*KEYS, "hypersteps", "ratio", "sum", "first", "later", "step_ms", "loader")
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--sources", type=int, nargs="+", default=SOURCES)
    parser.add_argument("--by", nargs="+", choices=["sampling", "loss"], default=["sampling", "loss"])
    parser.add_argument("--steps", type=int, nargs="+", default=[250])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true", help="run nothing; print the table")
    options = parser.parse_args()
    if not options.table:
        done = {tuple(r[key] for key in KEYS) for r in rows(options.rows) if "ratio" in r}
        if not options.rows.exists():
            append(options.rows, {"machine": machine()})
        jobs = [(m, k, b, n, s) for m in options.models for s in options.seeds for n in options.steps
                for k in options.sources for b in options.by]  # fmt: skip
        for job in jobs:
            if job not in done:
                row = measure(*job)
                append(options.rows, row)
                print(row, flush=True)
    print(table(rows(options.rows)))


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
