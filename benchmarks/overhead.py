"""Measure time and memory of tuning over the same training without it, for midflight and other libraries.

    python benchmarks/overhead.py              # tables; stores docs/results/overhead.json part by part
    python benchmarks/overhead.py --table      # tables of the stored numbers
    python benchmarks/overhead.py --json       # print the numbers, write nothing
    python benchmarks/overhead.py --sizes 1000-1000-1000 --k 10    # replace these rows only
    python benchmarks/overhead.py --k 10 --no-memory --json --variants one_step "one_step, L2 alone"

The networks are the paper's. One thread; denormals are flushed. k is the number of optimiser steps per
hyperparameter step.

    k fixed   horizon "step", as in the other libraries
    k auto    midflight's default: horizon "run", one hyperparameter step per 20, evenly spaced; or a budget
    time      turns of 10 steps that alternate in one process; a variant's turn over the plain turn of the
              same round: median and quartiles; for a budget, the sum of all turns after 200 steps
    memory    peak resident memory of a fresh process minus that after loading data and network, median of 5;
              and its ratio to the plain training's

Both sides use the same Adam, default (foreach) or fused. `make peers` installs the other libraries.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import PEERS, Midflight, Training
from tasks import captioned, markdown, parser_of

import midflight as mf
from midflight._reporting.machine import machine

HERE = Path(__file__).parent
OUT = HERE.parent / "docs/results/overhead.json"
SIZES = ["1000-1000-1000", "2000-1000-1000-500", "4000-2000-1000-500-250"]
BUDGET = 0.03

Make = Callable[..., Training]
OURS: dict[str, Make] = {
    "one_step": partial(Midflight, horizon="step"),
    "one_step, L2 alone": partial(Midflight, horizon="step", noise=False),
    "t1t2": partial(Midflight, horizon="step", estimator="t1t2"),
    "paper": partial(Midflight, horizon="step", estimator="paper"),
}
DEFAULT = "default (horizon run, one for 20)"
LONGER = [3_000, 12_000, 20_000, 27_500]
"""Optimiser steps of runs; the last is the paper's."""
AUTO: dict[str, Make] = {
    DEFAULT: Midflight,
    "default, L2 alone": partial(Midflight, noise=False),
    f"default, budget {BUDGET}": partial(Midflight, budget=BUDGET),
}
ALL = {"plain": Training, **OURS, **AUTO, **PEERS}


def seconds(training: Training, steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        training.step()
    return time.perf_counter() - began


def timed(size: str, k: str, fused: bool, rounds: int, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the time rows of all or some variants for a size, k and kind of Adam."""
    widths, steps = [int(w) for w in size.split("-")], 10
    every = 0 if k == "auto" else int(k)
    made: dict[str, Training] = {}
    rows: list[dict[str, Any]] = []
    variants = AUTO if k == "auto" else {**OURS, **PEERS}
    chosen = {name: make for name, make in variants.items() if not only or name in only}
    for name, make in {"plain": Training, **chosen}.items():
        row = {"size": size, "k": k, "fused": fused, "variant": name}
        try:
            made[name] = make(widths, every, fused or None)
            seconds(made[name], 2 * steps)
        except Exception as error:  # a failure is a result, too
            made.pop(name, None)
            rows.append({**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"})
    times: dict[str, list[float]] = {name: [] for name in made}
    gc.collect()
    for _ in range(6 * rounds if k == "auto" else rounds):
        for name, training in made.items():
            times[name].append(seconds(training, steps))
    for name in made:
        ratios = np.divide(times[name], times["plain"])
        low, mid, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        if k == "auto":
            mid = sum(times[name][20:]) / sum(times["plain"][20:])
        row = {"size": size, "k": k, "fused": fused, "variant": name}
        rows.append({**row, "ratio": round(mid, 3), "quartiles": [round(float(q), 3) for q in (low, high)],
                     "step_ms": round(1000 * float(np.median(times[name])) / steps, 2)})  # fmt: skip
    return rows


def memory(size: str, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the peak memory of all or some variants, in MB and over the plain training's."""
    rows: list[dict[str, Any]] = []
    for name in [name for name in ALL if not only or name in ("plain", *only)]:
        command = [sys.executable, __file__, "--alone", name, "--sizes", size]
        runs = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(5)]
        if any(run.returncode for run in runs):
            continue  # the time rows hold its error
        mb = float(np.median([float(run.stdout) for run in runs]))
        plain = rows[0]["mb"] if rows else mb
        rows.append({"size": size, "variant": name, "mb": round(mb, 1), "ratio": round(mb / plain, 2)})
    return rows


def alone(name: str, widths: Sequence[int]) -> None:
    """Print the peak memory of three turns minus that at the start, in MB."""
    warm = torch.rand(100, 100, requires_grad=True)
    (warm @ warm).sum().backward()
    training = ALL[name](list(widths), 10)
    gc.collect()
    start = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    seconds(training, 30)
    print(status("VmHWM") - start)


def status(field: str) -> float:
    """Return a memory field of this process, in MB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def table(found: dict[str, Any]) -> str:
    """Print the ratios, default Adam and fused Adam, by variant and network; and those of longer runs."""
    times = {(r["size"], r["k"], r["variant"], r["fused"]): r for r in found["times"]}
    memory = {(r["size"], r["variant"]): f"{r['ratio']:.2f}" for r in found["memory"]}
    cells = []
    for k, variant in dict.fromkeys((k, variant) for _, k, variant, _ in times if variant != "plain"):
        pairs = [
            [times[s, k, variant, fused] for fused in (False, True) if (s, k, variant, fused) in times]
            for s in SIZES
        ]
        ratios = [", ".join(r.get("error") or f"{r['ratio']:.2f}" for r in pair) for pair in pairs]
        cells.append([k, variant, *ratios, memory.get((SIZES[0], variant), "")])
    head = ["k", "variant", *SIZES, "peak memory, first network"]
    default = [times[SIZES[0], "auto", DEFAULT, fused]["ratio"] for fused in (False, True)]
    longer = []
    for steps in LONGER:
        schedule = mf.FrontLoaded()
        schedule.begin(steps)
        n = schedule.planned(steps)
        over = ", ".join(f"{1 + 20 * (ratio - 1) * n / steps:.2f}" for ratio in default)
        longer.append([f"{steps:,}", n, over])
    longer_head = ["steps of the run", "hyper-steps", "time over plain"]
    return captioned(
        {
            "Time over plain, with default Adam, fused Adam": markdown(head, cells),
            "The default in longer runs, first network": markdown(longer_head, longer),
        }
    )


def main() -> None:
    parser = parser_of(__doc__, workers=False)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--k", nargs="+", choices=["1", "10", "auto"], default=["1", "10", "auto"])
    parser.add_argument(
        "--rounds", type=int, default=11, help="turns per variant; six times as many for auto"
    )
    parser.add_argument("--variants", nargs="+", choices=list(ALL), default=(), help="default: all")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the numbers; write nothing")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variants and not options.json:
        parser.error("--variants needs --json: without it a few variants would replace all of their part.")
    if options.table:
        print(table(json.loads(OUT.read_text())))
        return
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if options.alone:
        alone(options.alone, [int(w) for w in options.sizes[0].split("-")])
        return
    found: dict[str, Any] = {"machine": machine(), "times": [], "memory": []}
    if OUT.exists() and not options.json:
        found |= json.loads(OUT.read_text()) | {"machine": machine()}
    for size in options.sizes:
        for k in options.k:
            for fused in (False, True) if k != "1" else (False,):
                print(f"{size} k={k} {'fused' if fused else 'default'}", file=sys.stderr)
                rows = timed(size, k, fused, options.rounds, options.variants)
                put(found["times"], rows, {"size": size, "k": k, "fused": fused}, options.json)
                store(found, options.json)
    for size in [] if options.no_memory else options.sizes:  # last, because other processes do not affect it
        print(f"{size} memory", file=sys.stderr)
        put(found["memory"], memory(size, options.variants), {"size": size}, options.json)
        store(found, options.json)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(table(found))


def put(stored: list[dict[str, Any]], rows: list[dict[str, Any]], part: dict[str, Any], keep: bool) -> None:
    """Replace the stored rows of a part of the table, or add to them."""
    if not keep:
        stored[:] = [row for row in stored if any(row[key] != value for key, value in part.items())]
    stored += rows


def store(found: dict[str, Any], printed: bool) -> None:
    if not printed:
        OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
