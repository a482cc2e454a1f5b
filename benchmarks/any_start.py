"""Tune from 40 starts in a space much wider than the paper's, on five tasks, with default settings.

    python benchmarks/any_start.py                       # all tasks; resumes
    python benchmarks/any_start.py --tasks digits        # some tasks
    python benchmarks/any_start.py --table               # table of the stored rows
    python benchmarks/any_start.py --figure              # also the figure
    python benchmarks/any_start.py --four                # also tune dropout and learning rate; three tasks
    python benchmarks/any_start.py --seed 21             # a seed on which no constant was chosen
    python benchmarks/any_start.py --seed 41 --device cuda --workers 8

==========  ========================================  ========================================================
            default                                   --four
==========  ========================================  ========================================================
tuned       log10 L2 in [-7, -0.5],                   also dropout in [0, 0.8],
            input noise in [0, 1.2]                   log10 learning rate in [-5, -1]
fixed runs  a 10 x 10 grid                            100 Sobol points
starts      4 corners, 36 Sobol points                16 corners, 24 Sobol points
rows        docs/results/any_start.jsonl              docs/results/any_start_four.jsonl
==========  ========================================  ========================================================

Each start has a fixed run and a tuned run. All runs of a task share seed, data and batches. A learning rate
that is not tuned is constant. A tuned run ends with `tuner.finish`. It is compared with the last weights of
the fixed runs; in the column "all finished", with the best, by validation, of their last weights, their
average and 27 checkpoints. The best of the fixed runs is the minimum of 100 validation losses, hence biased
downwards. Test errors are only reported.
"""

import time
from pathlib import Path

import torch
from lattice import CHECKPOINTS
from matplotlib.figure import Figure
from tasks import (
    HIGH_OF_FOUR,
    LOW_OF_FOUR,
    RESULTS,
    TASKS,
    Point,
    Row,
    Training,
    compute,
    finite,
    markdown,
    parser_of,
    rows,
)

import midflight as mf
from midflight.tuner.live import weights_at
from midflight.tuner.optimizers import trained_parameters

ROWS = RESULTS / "any_start.jsonl"
ARMS = {"grid": 100, "fixed": 40, "tuned": 40}
TASKS_OF_FOUR = ["digits", "tabular", "mnist_5k"]


def point(arm: str, index: int) -> Point:
    """Return the initial point of a run."""
    if arm == "grid":
        return scaled([index // 10 / 9, index % 10 / 9])
    return scaled(start(index, 2))


def point_of_four(arm: str, index: int) -> Point:
    """Return the initial point of a run of --four."""
    if arm == "grid":
        return scaled(sobol(4, seed=2)[index])
    return scaled(start(index, 4))


def start(index: int, dimensions: int) -> list[float]:
    """Return a start in the unit cube: the corners, then Sobol points."""
    if index < 2**dimensions:
        return [float(index >> d & 1) for d in reversed(range(dimensions))]
    return sobol(dimensions, seed=1)[index - 2**dimensions]


def sobol(dimensions: int, seed: int) -> list[list[float]]:
    return torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed).draw(100).tolist()


def scaled(unit: list[float]) -> Point:
    bounds = zip(unit, LOW_OF_FOUR, HIGH_OF_FOUR, strict=False)
    return tuple(low + u * (high - low) for u, low, high in bounds)


def train(job: tuple[str, str, int, int, bool, str]) -> Row:
    """Run a job (task, kind of run, index, seed, whether --four, device); return its row."""
    name, arm, index, seed, four, device = job
    start = (point_of_four if four else point)(arm, index)
    run = Training(name, start, seed, device=device)
    tuner = run.tune() if arm == "tuned" else None
    fixed = None if tuner else Candidates(run)
    began = time.perf_counter()
    for n in range(1, run.steps + 1):
        run.step()
        if fixed:
            fixed.follow(n)
    seconds, end = time.perf_counter() - began, run.point
    valid, test = run.losses()
    if fixed:
        finish = min(fixed.losses())
    else:
        tuner.finish()
        finish = run.losses()
    return {
        "task": name, "arm": arm, "index": index, "start": start, "end": end, "valid_loss": valid,
        "test_error": test, "finish": finish, "seconds": round(seconds, 2),
    }  # fmt: skip


class Candidates:
    """Weights that a finished fixed run chooses from: the last, their average, and 27 checkpoints."""

    def __init__(self, run: Training) -> None:
        self.run, self.average = run, mf.Averaged()
        self.params = trained_parameters(run.model, run.optimizer)
        self.checkpoints = {run.steps * (i + 1) // CHECKPOINTS for i in range(CHECKPOINTS)}
        self.found: list[tuple[float, float]] = []

    def follow(self, steps: int) -> None:
        """Update the average and the checkpoints; call after each step."""
        self.average.follow(self.params, steps, steps / self.run.steps)
        if steps in self.checkpoints:
            self.found.append(self.run.losses())

    def losses(self) -> list[tuple[float, float]]:
        """Return (validation loss, test error) of each candidate; infinite if it diverged."""
        with weights_at(self.params, self.average.average()):
            found = [*self.found, self.run.losses()]
        return [(valid if valid == valid else float("inf"), test) for valid, test in found]


def file(seed: int, four: bool, device: str) -> Path:
    """Return the file of the rows."""
    suffix = "_four" * four + f"_seed{seed}" * bool(seed) + f"_{device}" * (device != "cpu")
    return ROWS.with_stem(ROWS.stem + suffix)


def losses(found: list[Row], task: str, arm: str, finished: bool = False) -> list[float]:
    """Return index -> validation loss of the last or the finished weights; infinite if the run diverged."""
    chosen = sorted((r for r in found if (r["task"], r["arm"]) == (task, arm)), key=lambda r: r["index"])
    return [finite(r["finish"][0] if finished else r["valid_loss"]) for r in chosen]


HEAD = [
    "task", "best of 100 fixed", "fixed, median", "tuned, median", "tuned, worst", "within 10 %",
    "within 25 %", "all finished, within 10 %",
]  # fmt: skip


def table(found: list[Row]) -> str:
    """Print per task how close the finished tuned runs end to the best fixed run, plain and finished."""
    cells = []
    for task in whole(found):
        ends = losses(found, task, "tuned", finished=True)
        fixed = losses(found, task, "fixed")
        best, best_finished = (min(losses(found, task, "grid", finished)) for finished in (False, True))
        numbers = (best, median(fixed), median(ends), max(ends))
        within = (1.1 * best, 1.25 * best, 1.1 * best_finished)
        near = (f"{sum(end <= limit for end in ends)}/{len(ends)}" for limit in within)
        cells.append([task, *(f"{x:.4f}" for x in numbers), *near])
    return markdown(HEAD, cells)


def whole(found: list[Row]) -> list[str]:
    """Return the tasks of which all runs are stored."""
    return [t for t in TASKS if all(len(losses(found, t, a)) == n for a, n in ARMS.items())]


def median(losses: list[float]) -> float:
    """Return the upper median."""
    return sorted(losses)[len(losses) // 2]


def figure(found: list[Row], path: Path) -> None:
    """Draw the sorted validation losses of the 40 starts, for each complete task and kind of run."""
    tasks = whole(found)
    fig = Figure(figsize=(3.1 * len(tasks), 3.4), layout="constrained")
    for i, task in enumerate(tasks):
        ax = fig.add_subplot(1, len(tasks), i + 1)
        best = min(losses(found, task, "grid"))
        for arm, finished, colour, label in (
            ("fixed", False, "0.6", "fixed at the start"),
            ("tuned", False, "tab:cyan", "tuned, last weights"),
            ("tuned", True, "tab:blue", "tuned, finished"),
        ):
            ends = sorted(losses(found, task, arm, finished))
            ax.plot(range(1, len(ends) + 1), ends, ".-", color=colour, markersize=4, linewidth=1, label=label)
        ax.axhspan(best, 1.1 * best, color="tab:green", alpha=0.2, label="best of 100 fixed, + 10 %")
        ax.set_yscale("log")
        ax.set_title(task.replace("_", " "))
        ax.set_xlabel("starts, sorted")
        if i == 0:
            ax.set_ylabel("validation loss at the end")
            ax.legend(fontsize=7)
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = parser_of(__doc__, figure=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="tasks to run; default: all")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--four", action="store_true", help="also tune dropout and learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    path = file(options.seed, options.four, options.device)
    if not (options.table or options.figure):
        done = {(row["task"], row["arm"], row["index"]) for row in rows(path)}
        tasks = options.tasks or (TASKS_OF_FOUR if options.four else list(TASKS))
        jobs = [(t, a, i) for t in tasks for a in options.arms for i in range(ARMS[a])]
        jobs = [(*job, options.seed, options.four, options.device) for job in jobs if job not in done]
        compute(path, jobs, train, options.workers)
    print(table(rows(path)))
    if not options.table:
        figure(rows(path), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
