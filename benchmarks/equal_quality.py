"""Do the cheap settings end where the expensive one does?

    python benchmarks/equal_quality.py             all tasks; takes up where it stopped
    python benchmarks/equal_quality.py --table     from the stored rows alone
    python benchmarks/equal_quality.py --tasks mnist_55k --parts 32/32 16/16

The five tasks of any_start.py from three of its starts, with six seeds. The expensive setting is exact
`one_step` with foresight at each tenth call. Printed is the finished validation loss over that of the
expensive run of the same seed and start: geometric mean, and two standard errors (of the logarithm) over the
seeds, for starts of one seed share its first weights and batches; and the time over a fixed run, measured in
turns from one start. Budgets are kept by a clock that sees the other worker. "parts": batches of 64 for T2, 8
examples of a training batch for the mixed partial; "small parts": 24 and 8; --parts adds others. Rows:
docs/results/equal_quality.jsonl.
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
STARTS = [0, 5, 14]
SEEDS = [0, 1, 2, 5, 7, 21]
EXPENSIVE = "one_step, every=10"
SETTINGS: dict[str, dict[str, Any]] = {
    EXPENSIVE: {"estimator": "one_step", "every": 10},
    "default": {},
    "default, parts": {"parts": (64, 8)},
    "default, small parts": {"parts": (24, 8)},
    "budget=0.05": {"budget": 0.05},
    "budget=0.05, parts": {"budget": 0.05, "parts": (64, 8)},
}
MORE = "default, parts "


def options_of(setting: str) -> dict[str, Any]:
    if not setting.startswith(MORE):
        return SETTINGS[setting]
    return {"parts": pair(setting.removeprefix(MORE))}


def pair(text: str) -> tuple[int, int]:
    of_t2, of_batch = map(int, text.split("/"))
    return of_t2, of_batch


def train(job: tuple[str, str, int, int]) -> Row:
    task, setting, seed, index = job
    run = Training(task, any_start.point("tuned", index), seed)
    tuner = run.tune(**options_of(setting))
    for _ in range(run.steps):
        run.step(tuner)
    tuner.finish()
    loss = run.valid_loss()  # on all of T2, whatever the size of its batches
    return {"task": task, "arm": setting, "seed": seed, "index": index, "loss": loss, "end": run.point}


def measure_cost(task: str, setting: str) -> Row:
    run = Training(task, ((LOW[0] + HIGH[0]) / 2, (LOW[1] + HIGH[1]) / 2))
    ratio, _ = beside_a_fixed_one(run, run.tune(**options_of(setting)))
    return {"task": task, "arm": setting, "seed": 0, "index": "cost", "ratio": ratio}


def table(found: list[Row]) -> str:
    lines = ["| task | setting | loss over the expensive one's | time over fixed |", "|---|---|---|---|"]
    for task in TASKS:
        losses = {
            (r["arm"], r["seed"], r["index"]): r["loss"] for r in found if r["task"] == task and "loss" in r
        }
        costs = {r["arm"]: r["ratio"] for r in found if r["task"] == task and "ratio" in r}
        for setting in [*SETTINGS, *sorted({arm for arm, *_ in losses if arm.startswith(MORE)})]:
            if any((arm, s, i) not in losses for arm in (setting, EXPENSIVE) for s in SEEDS for i in STARTS):
                continue
            of_each = [
                fmean(math.log(losses[setting, s, i] / losses[EXPENSIVE, s, i]) for i in STARTS)
                for s in SEEDS
            ]
            error = 2 * stdev(of_each) / math.sqrt(len(SEEDS))
            ratio = math.exp(fmean(of_each))
            lines.append(f"| {task} | {setting} | {ratio:.3f} ± {error:.3f} | {costs.get(setting, '')} |")
    return "\n".join(lines)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--parts", nargs="+", type=pair, metavar="T2/BATCH", default=[], help="more, as examples of each"
    )
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--table", action="store_true", help="compute nothing")
    options = parser.parse_args()
    if not options.table:
        os.environ["OMP_NUM_THREADS"] = "1"
        done = {(r["task"], r["arm"], r["seed"], r["index"]) for r in rows(ROWS)}
        settings = [*SETTINGS, *(f"{MORE}{t2}/{few}" for t2, few in options.parts)]
        jobs = [(t, s, seed, i) for t in options.tasks for seed in SEEDS for s in settings for i in STARTS]
        compute(ROWS, [job for job in jobs if job not in done], train, options.workers)
        for task in options.tasks:
            for setting in settings:
                if (task, setting, 0, "cost") not in done:
                    append(ROWS, measure_cost(task, setting))
    print(table(rows(ROWS)))


if __name__ == "__main__":
    main()
