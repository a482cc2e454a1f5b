"""Do the cheap settings end where the expensive one does?

    python benchmarks/equal_quality.py             all tasks; takes up where it stopped
    python benchmarks/equal_quality.py --table     from the stored rows alone

The five tasks of any_start.py from ten of its starts. The expensive setting is exact `one_step` with
foresight at each tenth call. Printed is the finished validation loss over that of the expensive run from the
same start: geometric mean, and two standard errors over the starts; and the time over a fixed run, measured
in turns from one start. Rows: docs/results/equal_quality.jsonl.
"""

import argparse
import math
import multiprocessing
import os
from statistics import fmean, stdev
from typing import Any

import any_start
from equal_compute import beside_a_fixed_one
from tasks import HIGH, LOW, RESULTS, TASKS, Row, Training, append, compute, rows

ROWS = RESULTS / "equal_quality.jsonl"
STARTS = [0, 1, 2, 3, 5, 9, 14, 20, 25, 30]
EXPENSIVE = "one_step, every=10"
SETTINGS: dict[str, dict[str, Any]] = {
    EXPENSIVE: {"estimator": "one_step", "every": 10},
    "default": {},
    "default, parts of 32": {"part": 32},
    "budget=0.05": {"budget": 0.05},
    "budget=0.05, parts of 32": {"budget": 0.05, "part": 32},
}


def train(job: tuple[str, str, int]) -> Row:
    task, setting, index = job
    run, options = Training(task, any_start.point("tuned", index)), SETTINGS[setting]
    tuner = run.tune(**options)
    for _ in range(run.steps):
        run.step(tuner, options.get("part"))
    return {"task": task, "arm": setting, "index": index, "loss": min(tuner.finish().values())}


def measure_cost(task: str, setting: str) -> Row:
    run = Training(task, ((LOW[0] + HIGH[0]) / 2, (LOW[1] + HIGH[1]) / 2))
    options = SETTINGS[setting]
    ratio, _ = beside_a_fixed_one(run, run.tune(**options), options.get("part"))
    return {"task": task, "arm": setting, "index": "cost", "ratio": ratio}


def table(found: list[Row]) -> str:
    lines = ["| task | setting | loss over the expensive one's | time over fixed |", "|---|---|---|---|"]
    for task in TASKS:
        losses = {(r["arm"], r["index"]): r["loss"] for r in found if r["task"] == task and "loss" in r}
        costs = {r["arm"]: r["ratio"] for r in found if r["task"] == task and "ratio" in r}
        for setting in SETTINGS:
            pairs = [(losses.get((setting, i)), losses.get((EXPENSIVE, i))) for i in STARTS]
            logs = [math.log(a / b) for a, b in pairs if a and b]
            if len(logs) < len(STARTS):
                continue
            error = 2 * stdev(logs) / math.sqrt(len(logs))
            ratio = math.exp(fmean(logs))
            lines.append(f"| {task} | {setting} | {ratio:.3f} ± {error:.3f} | {costs.get(setting, '')} |")
    return "\n".join(lines)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--table", action="store_true", help="compute nothing")
    options = parser.parse_args()
    if not options.table:
        os.environ["OMP_NUM_THREADS"] = "1"
        done = {(r["task"], r["arm"], r["index"]) for r in rows(ROWS)}
        jobs = [(t, s, i) for t in options.tasks for s in SETTINGS for i in STARTS]
        compute(ROWS, [job for job in jobs if job not in done], train, options.workers)
        for task in options.tasks:
            for setting in SETTINGS:
                if (task, setting, "cost") not in done:
                    append(ROWS, measure_cost(task, setting))
    print(table(rows(ROWS)))


if __name__ == "__main__":
    main()
