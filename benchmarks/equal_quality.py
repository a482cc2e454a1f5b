"""Compare the final losses of cheap settings with those of an expensive one.

    python benchmarks/equal_quality.py             # all tasks; resumes
    python benchmarks/equal_quality.py --table     # table of the stored rows
    python benchmarks/equal_quality.py --pair      # compare the default with the first edition
    python benchmarks/equal_quality.py --tasks mnist_55k --examples 8 16 64
    python benchmarks/equal_quality.py --tasks digits mnist_5k --settings default --seeds 51 52 53 54
    python benchmarks/equal_quality.py --tasks mnist_55k --settings default --seeds 51 --device cuda

Runs: the five tasks of any_start.py, three of its starts, six seeds. The expensive setting has a
hyperparameter step every tenth optimiser step. The table shows two ratios:

    loss    finished validation loss over that of the expensive run of the same seed and start: geometric
            mean, and two standard errors of the logarithm over seeds, because starts of a seed share initial
            weights and batches
    time    time over that of a fixed run, with alternating turns from one start

Time budgets are measured beside another worker. --examples adds the default with other numbers of examples
for the mixed partial derivative. Constants were chosen on some of the six seeds, and none on seeds 31 to
38 and from 51 on. Rows: docs/results/equal_quality_seam.jsonl; of the first edition (git tag first-edition,
its own `train`): docs/results/equal_quality.jsonl. A row of a GPU names it, and so does its pair.
"""

import math
import os
from collections.abc import Callable
from statistics import fmean
from typing import Any

import any_start
from equal_compute import beside_a_fixed_one
from tasks import HIGH, LOW, RESULTS, TASKS, Row, Training, append, compute, parser_of, rows

import midflight as mf

FIRST, ROWS = RESULTS / "equal_quality.jsonl", RESULTS / "equal_quality_seam.jsonl"
"""Rows of the first edition and of the current version."""
STARTS = [0, 5, 14]
SEEDS = [0, 1, 2, 5, 7, 21]
EXPENSIVE = "one_step, every=10"
DEFAULT = "default"
SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    EXPENSIVE: lambda: {"schedule": 10},
    DEFAULT: dict,
    "budget=0.05": lambda: {"schedule": mf.TimeBudget(0.05)},
}
MORE = "default, examples "


def options_of(setting: str) -> dict[str, Any]:
    if setting.startswith(MORE):
        return {"examples": int(setting.removeprefix(MORE))}
    return SETTINGS[setting]()


def train(job: tuple[str, str, int, int, str]) -> Row:
    task, setting, seed, index, device = job
    run = Training(task, any_start.point("tuned", index), seed, device=device)
    tuner = run.tune(**options_of(setting))
    for _ in range(run.steps):
        run.step()
    tuner.finish()
    return {
        "task": task, "arm": setting, "seed": seed, "index": index, "loss": run.valid_loss(),
        "end": run.point, **({} if device == "cpu" else {"device": device}),
    }  # fmt: skip


def measure_cost(task: str, setting: str) -> Row:
    run = Training(task, ((LOW[0] + HIGH[0]) / 2, (LOW[1] + HIGH[1]) / 2))
    ratio, _ = beside_a_fixed_one(run, run.tune(**options_of(setting)))
    return {"task": task, "arm": setting, "seed": 0, "index": "cost", "ratio": ratio}


def table(found: list[Row]) -> str:
    lines = ["| task | setting | loss over the expensive one's | time over fixed |", "|---|---|---|---|"]
    for task in TASKS:
        losses = losses_of(found, task)
        costs = {r["arm"]: r["ratio"] for r in found if r["task"] == task and "ratio" in r}
        for setting in [*SETTINGS, *sorted({arm for arm, *_ in losses if arm.startswith(MORE)})]:
            if any((arm, s, i) not in losses for arm in (setting, EXPENSIVE) for s in SEEDS for i in STARTS):
                continue
            ratio = ratio_of(losses, losses, (setting, EXPENSIVE), SEEDS)
            lines.append(f"| {task} | {setting} | {ratio} | {costs.get(setting, '')} |")
    return "\n".join(lines)


Losses = dict[tuple[str, int, int], float]
"""Setting, seed, start -> finished validation loss."""


def losses_of(found: list[Row], task: str) -> Losses:
    return {(r["arm"], r["seed"], r["index"]): r["loss"] for r in found if r["task"] == task and "loss" in r}


def ratio_of(above: Losses, below: Losses, settings: tuple[str, str], seeds: list[int]) -> str:
    """Return the geometric mean of loss ratios of two settings, ± two standard errors over seeds."""
    a, b = settings
    return any_start.ratio_of(
        [fmean(math.log(above[a, s, i] / below[b, s, i]) for i in STARTS) for s in seeds]
    )


def pairs(first: list[Row], ours: list[Row]) -> str:
    """Print per task the ratio of the default's loss to the first edition's, on seeds that both completed."""
    lines = ["| task | seeds | new over first, geometric mean |", "|---|---|---|"]
    for task in TASKS:
        new, old = losses_of(ours, task), losses_of(first, task)
        others = {seed for _, seed, _ in new} - set(SEEDS)
        for seeds in (SEEDS, sorted(others)):
            whole = [
                s for s in seeds if all((DEFAULT, s, i) in found for found in (new, old) for i in STARTS)
            ]
            if len(whole) > 1:
                ratio = ratio_of(new, old, (DEFAULT, DEFAULT), whole)
                lines.append(f"| {task} | {', '.join(map(str, whole))} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--examples", nargs="+", type=int, default=[], help="also run the default with these")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--device", default="cpu", help="of model and data")
    parser.add_argument("--pair", action="store_true", help="run nothing; compare with the first edition")
    options = parser.parse_args()
    if options.pair:
        print(pairs(rows(FIRST), rows(ROWS)))
        return
    if not options.table:
        os.environ["OMP_NUM_THREADS"] = "1"
        done = {(r["task"], r["arm"], r["seed"], r["index"]) for r in rows(ROWS)}
        settings = [*options.settings, *(f"{MORE}{n}" for n in options.examples)]
        jobs = [
            (t, s, seed, i) for t in options.tasks for seed in options.seeds for s in settings for i in STARTS
        ]
        left = [(*job, options.device) for job in jobs if job not in done]
        compute(ROWS, left, train, options.workers)
        for task in options.tasks:
            for setting in settings:
                if options.seeds == SEEDS and (task, setting, 0, "cost") not in done:
                    append(ROWS, measure_cost(task, setting))
    print(table(rows(ROWS)))


if __name__ == "__main__":
    main()
