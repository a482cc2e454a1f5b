"""Compare the default schedule with one hyperparameter step per 20, in runs eight times as long as usual.

    python benchmarks/long_runs.py            # three tasks; resumes
    python benchmarks/long_runs.py --table    # table of the stored rows

The tasks are those of any_start.py. Beyond 3,000 optimiser steps, the default takes
150 sqrt(steps / 3,000) hyperparameter steps; 150 and 3,000 were fixed before the first of these runs.
Each seed has three starts. Rows: docs/results/long_runs.jsonl. The table shows two ratios of the
default's finished validation loss, as geometric mean and two standard errors of the logarithm over the
seeds:

    over one for 20    the finished loss with `FrontLoaded(20)`
    over fixed         the last loss of the same run without a tuner
"""

import math
import os
from dataclasses import replace
from statistics import fmean

from any_start import point
from equal_quality import STARTS
from tasks import RESULTS, TASKS, Row, Training, compute, parser_of, ratio_of, rows

import midflight as mf

ROWS = RESULTS / "long_runs.jsonl"
TIMES = 8
LONGER = {
    name: replace(TASKS[name], epochs=TIMES * TASKS[name].epochs)
    for name in ("digits", "tabular", "mnist_5k")
}
SEEDS = {"digits": [95, 96, 97], "tabular": [95, 96, 97], "mnist_5k": [91, 92]}
ARMS = {"default": None, "one for 20": 20, "fixed": None}
"""Name -> optimiser steps per hyperparameter step; "fixed" has no tuner."""


def train(job: tuple[str, str, int, int]) -> Row:
    task, arm, seed, index = job
    TASKS.update(LONGER)  # in this worker
    run = Training(task, point("tuned", index), seed)
    per = ARMS[arm]
    tuner = None if arm == "fixed" else run.tune(schedule=mf.FrontLoaded(per))
    for _ in range(run.steps):
        run.step()
    if tuner is not None:
        tuner.finish()
    taken = 0 if tuner is None else int(tuner.log()["hypersteps"])
    return {
        "task": task, "arm": arm, "seed": seed, "index": index, "loss": run.valid_loss(), "end": run.point,
        "steps": run.steps, "hypersteps": taken,
    }  # fmt: skip


def table(found: list[Row]) -> str:
    losses = {(r["task"], r["arm"], r["seed"], r["index"]): r["loss"] for r in found}
    steps = {r["task"]: r["steps"] for r in found}
    lines = [
        "| task | steps | seeds | default over one for 20 | default over fixed |",
        "|---|---|---|---|---|",
    ]
    for task, seeds in SEEDS.items():
        if any((task, arm, seed, i) not in losses for arm in ARMS for seed in seeds for i in STARTS):
            continue
        ratios = [
            ratio_of(
                [
                    fmean(math.log(losses[task, "default", s, i] / losses[task, arm, s, i]) for i in STARTS)
                    for s in seeds
                ]
            )
            for arm in ("one for 20", "fixed")
        ]
        lines.append(f"| {task} | {steps[task]:,} | {', '.join(map(str, seeds))} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def main() -> None:
    options = parser_of(__doc__).parse_args()
    if not options.table:
        os.environ["OMP_NUM_THREADS"] = "1"
        done = {(r["task"], r["arm"], r["seed"], r["index"]) for r in rows(ROWS)}
        jobs = [
            (task, arm, seed, i) for task in SEEDS for seed in SEEDS[task] for i in STARTS for arm in ARMS
        ]
        compute(ROWS, [job for job in jobs if job not in done], train, options.workers)
    print(table(rows(ROWS)))


if __name__ == "__main__":
    main()
