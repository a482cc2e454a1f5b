"""Compare test errors of midflight and search engines at equal compute, from 1 to 32 trainings.

    python benchmarks/equal_compute.py                    # all engines and tasks; resumes
    python benchmarks/equal_compute.py --engines random TPE --tasks digits
    python benchmarks/equal_compute.py --table            # table of the stored rows
    python benchmarks/equal_compute.py --figure           # also the figure

Engines (10 seeds each) search the table of benchmarks/lattice.py and report the best model at any of 27
checkpoints. Only Ray's population-based training really trains. midflight reports the model of
`tuner.finish`: from 20 starts with `TimeBudget(0.08)`, which costs at most 1.1 trainings; and from the 40
starts of any_start.py without a budget, as single runs and as the best of n.

A run of midflight costs its time over that of a fixed run, measured here with alternating turns on one
thread. Validation passes that choose the model are free: 27 per training of an engine, 3 in `finish`, whose
share is stored. The last row of a task is the best of the 100 finished fixed runs of any_start.py; it shows
what averaging and checkpoints alone give. Needs midflight[bench]. Rows: docs/results/equal_compute.jsonl.
"""

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import any_start
import numpy as np
from engines import ENGINES, search
from matplotlib.figure import Figure
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
    one_thread,
    parser_of,
    rows,
)

import midflight as mf

ROWS = RESULTS / "equal_compute.jsonl"
BUDGETS = [1, 2, 4, 8, 16, 32]
SEEDS = 10
PBT = "Ray PBT"
POPULATIONS = [4, 8, 16]
LABEL = "midflight"
BUDGET, STARTS = 0.08, 20
"""Budget of a single run of midflight, and its number of starts."""
ALIKE = "100 fixed, finished alike"
COST = "cost of tuning"


def searched(job: tuple[str, str, int]) -> Row:
    task, engine, seed = job
    return {"task": task, "arm": engine, "index": seed, "best": search(engine, task, seed, BUDGETS)}


def compute_pbt(tasks: list[str], done: set[Any], workers: int) -> None:
    from pbt import pbt

    for task in tasks:
        for seed in range(SEEDS):
            if (task, PBT, seed) not in done:
                best = [pbt(task, seed, population, workers) for population in POPULATIONS]
                append(ROWS, {"task": task, "arm": PBT, "index": seed, "best": best})
                print(f"{task} {PBT} {seed}", flush=True)


def compute_cost(task: str) -> None:
    """Measure the cost of a tuned training from the middle of the space."""
    run = Training(task, ((LOW[0] + HIGH[0]) / 2, (LOW[1] + HIGH[1]) / 2))
    ratio, finish = beside_a_fixed_one(run, run.tune())
    append(ROWS, {"task": task, "arm": COST, "index": 0, "ratio": ratio, "finish": finish})


def beside_a_fixed_one(run: Training, tuner: mf.Tuner) -> tuple[float, float]:
    """Return the times of training and `finish` over that of a fixed training, alternating every 10 steps."""
    one_thread()
    fixed = Training(run.name, run.point)
    tuned_seconds = fixed_seconds = 0.0
    for n in range(0, run.steps, 10):
        steps = min(10, run.steps - n)
        tuned_seconds += seconds(lambda steps=steps: [run.step() for _ in range(steps)])
        fixed_seconds += seconds(lambda steps=steps: [fixed.step() for _ in range(steps)])
    return round(tuned_seconds / fixed_seconds, 3), round(seconds(tuner.finish) / fixed_seconds, 3)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def within_a_budget(job: tuple[str, int]) -> Row:
    """Run with a time budget; return the row."""
    task, index = job
    run = Training(task, any_start.point("tuned", index))
    ratio, _ = beside_a_fixed_one(run, run.tune(schedule=mf.TimeBudget(BUDGET)))
    return {"task": task, "arm": LABEL, "index": index, "best": [[ratio, *run.losses()]]}


@cache
def stored(task: str, arm: str) -> list[tuple[float, float]]:
    """Return (validation loss, test error) of the finished runs of any_start.py."""
    return [tuple(r["finish"]) for r in rows(any_start.ROWS) if (r["task"], r["arm"]) == (task, arm)]


def best_of(task: str, budget: float, cost: float, draws: int = 200) -> tuple[float, list[float]]:
    """Return the compute spent and the test errors of the best run, by validation, of as many starts as fit.

    Args:
        cost: cost of a tuned run, in trainings.
    """
    runs = stored(task, "tuned")
    n = max(1, int(budget / cost))
    rng = np.random.default_rng(0)
    groups = [[r] for r in runs] if n == 1 else [[runs[i] for i in rng.choice(len(runs), n, replace=False)]
                                                 for _ in range(draws)]  # fmt: skip
    return n * cost, [min(group)[1] for group in groups if group]


def errors(found: list[Row], task: str, arm: str, budget: int) -> tuple[float, list[float]]:
    """Return the median compute spent and the test errors by seed; [] if the budget has no rows."""
    if arm == ALIKE:
        return 100, [min(stored(task, "grid"))[1]] if budget == max(BUDGETS) else []
    if arm == LABEL and budget > 1:
        costs = [r["ratio"] for r in found if (r["task"], r["arm"]) == (task, COST)]
        return best_of(task, budget, costs[-1]) if costs and stored(task, "tuned") else (budget, [])
    budgets = {PBT: POPULATIONS, LABEL: [1]}.get(arm, BUDGETS)
    if budget not in budgets:
        return budget, []
    best = [r["best"][budgets.index(budget)] for r in found if (r["task"], r["arm"]) == (task, arm)]
    return float(np.median([b[0] for b in best])) if best else budget, [b[2] for b in best]


def table(found: list[Row]) -> str:
    """Print the median test error [quartiles] per task, engine and budget."""
    lines = []
    for task in TASKS:
        for arm in (LABEL, *ENGINES, PBT, ALIKE):
            cells = []
            for budget in BUDGETS:
                paid, e = errors(found, task, arm, budget)
                low, mid, high = np.quantile(e, (0.25, 0.5, 0.75)) if e else (0, 0, 0)
                at = f" @{paid:.1f}" if arm in (LABEL, PBT, ALIKE) else ""
                cells.append(f"{mid:.4f} [{low:.4f}, {high:.4f}]{at}" if e else "")
            if any(cells):
                lines.append([task, arm, *cells])
    return markdown(["task", "engine", *(f"{b} training{'s' * (b > 1)}" for b in BUDGETS)], lines)


def figure(found: list[Row]) -> None:
    fig = Figure(figsize=(3.1 * len(TASKS), 3.6), layout="constrained")
    for i, task in enumerate(TASKS):
        ax = fig.add_subplot(1, len(TASKS), i + 1)
        for k, arm in enumerate((*ENGINES, PBT, LABEL)):
            drawn = [(paid, e) for paid, e in (errors(found, task, arm, b) for b in BUDGETS) if e]
            if not drawn:
                continue
            x = [paid for paid, _ in drawn]
            low, mid, high = np.array([np.quantile(e, (0.25, 0.5, 0.75)) for _, e in drawn]).T
            ours = arm == LABEL
            colour = "tab:blue" if ours else f"C{k + 1}"
            ax.plot(x, mid, "o-" if ours else ".-", color=colour, label=arm, linewidth=2 if ours else 1,
                    zorder=3 if ours else 2)  # fmt: skip
            ax.fill_between(x, low, high, color=colour, alpha=0.3 if ours else 0.1, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(BUDGETS, [str(b) for b in BUDGETS])
        ax.set_yscale("log")
        ax.set_title(task.replace("_", " "))
        ax.set_xlabel("compute, in trainings")
        if i == 0:
            ax.set_ylabel("test error of the model chosen by validation")
    handles = {label: h for ax in fig.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    fig.savefig(ROWS.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = parser_of(__doc__, figure=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES, PBT], default=[*ENGINES, PBT])
    parser.add_argument("--cost", action="store_true", help="only measure the cost of tuning again")
    options = parser.parse_args()
    if not (options.table or options.figure):
        measure(options.tasks, options.engines, options.workers, options.cost)
    print(table(rows(ROWS)))
    if not options.table:
        figure(rows(ROWS))


def measure(tasks: list[str], engines: list[str], workers: int, cost: bool) -> None:
    """Compute and store what is missing.

    Args:
        cost: measure only the cost of tuning, again and of all tasks.
    """
    done = {(row["task"], row["arm"], row["index"]) for row in rows(ROWS)}
    for task in TASKS if cost else [t for t in tasks if (t, COST, 0) not in done]:
        compute_cost(task)
    if cost:
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(t, e, s) for e in engines if e != PBT for t in tasks for s in range(SEEDS)]
    compute(ROWS, [job for job in jobs if job not in done], searched, workers)
    starts = [(t, i) for t in tasks for i in range(STARTS) if (t, LABEL, i) not in done]
    compute(ROWS, starts, within_a_budget, 1)
    if PBT in engines:
        compute_pbt(tasks, done, workers)


if __name__ == "__main__":
    main()
