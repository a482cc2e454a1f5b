"""Compare the final losses of cheap settings with those of an expensive one.

    python benchmarks/equal_quality.py                   # all tasks; resumes
    python benchmarks/equal_quality.py --tasks digits    # some tasks
    python benchmarks/equal_quality.py --table           # table of the stored rows

Runs: the five tasks of any_start.py, three of its starts, three seeds on which no constant was chosen. The
expensive setting has a hyperparameter step every tenth optimiser step. The table shows two ratios:

    loss    finished validation loss over that of the expensive run of the same seed and start: geometric
            mean, and two standard errors of the logarithm over seeds, because starts of a seed share initial
            weights and batches
    time    time over that of a fixed run, with alternating turns from one start

A time budget depends on the load of the machine. Rows: docs/results/equal_quality.jsonl.
"""

import math
import os
from collections.abc import Callable
from statistics import fmean
from typing import Any

import any_start
from equal_compute import beside_a_fixed_one
from tasks import (
    HIGH,
    LOW,
    RESULTS,
    TASKS,
    Row,
    Training,
    append,
    compute,
    markdown,
    parser_of,
    ratio_of,
    rows,
)

import midflight as mf

ROWS = RESULTS / "equal_quality.jsonl"
STARTS = [0, 5, 14]
SEEDS = [31, 32, 33]
"""No constant was chosen on these."""
EXPENSIVE = "one_step, every=10"
SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    EXPENSIVE: lambda: {"schedule": 10},
    "default": dict,
    "budget=0.05": lambda: {"schedule": mf.TimeBudget(0.05)},
}


def train(job: tuple[str, str, int, int]) -> Row:
    task, setting, seed, index = job
    run = Training(task, any_start.point("tuned", index), seed)
    tuner = run.tune(**SETTINGS[setting]())
    for _ in range(run.steps):
        run.step()
    tuner.finish()
    return {
        "task": task, "arm": setting, "seed": seed, "index": index, "loss": run.valid_loss(),
        "end": run.point,
    }  # fmt: skip


def measure_cost(task: str, setting: str) -> Row:
    run = Training(task, ((LOW[0] + HIGH[0]) / 2, (LOW[1] + HIGH[1]) / 2))
    ratio, _ = beside_a_fixed_one(run, run.tune(**SETTINGS[setting]()))
    return {"task": task, "arm": setting, "seed": 0, "index": "cost", "ratio": ratio}


def table(found: list[Row]) -> str:
    cells = []
    for task in TASKS:
        losses = {
            (r["arm"], r["seed"], r["index"]): r["loss"] for r in found if r["task"] == task and "loss" in r
        }
        costs = {r["arm"]: r["ratio"] for r in found if r["task"] == task and "ratio" in r}
        for setting in SETTINGS:
            if all((arm, s, i) in losses for arm in (setting, EXPENSIVE) for s in SEEDS for i in STARTS):
                logs = [
                    fmean(math.log(losses[setting, s, i] / losses[EXPENSIVE, s, i]) for i in STARTS)
                    for s in SEEDS
                ]
                ratio = ratio_of(logs)
                cells.append((task, setting, ratio, costs.get(setting, "")))
    return markdown(("task", "setting", "loss over the expensive one's", "time over fixed"), cells)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options = parser.parse_args()
    if not options.table:
        os.environ["OMP_NUM_THREADS"] = "1"
        done = {(r["task"], r["arm"], r["seed"], r["index"]) for r in rows(ROWS)}
        pairs = [(task, setting) for task in options.tasks for setting in options.settings]
        jobs = [(*pair, seed, i) for seed in options.seeds for pair in pairs for i in STARTS]
        compute(ROWS, [job for job in jobs if job not in done], train, options.workers)
        for pair in pairs:
            if (*pair, 0, "cost") not in done:
                append(ROWS, measure_cost(*pair))
    print(table(rows(ROWS)))


if __name__ == "__main__":
    main()
