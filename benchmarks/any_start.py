"""Tune from 40 starts in a space much wider than the paper's, on five tasks, with default settings.

    python benchmarks/any_start.py                       # all tasks; resumes
    python benchmarks/any_start.py --tasks digits        # some tasks
    python benchmarks/any_start.py --figure              # table and figure of the stored rows
    python benchmarks/any_start.py --pair                # compare with the first edition, start by start
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
rows        docs/results/any_start_seam.jsonl         docs/results/any_start_seam_four.jsonl
==========  ========================================  ========================================================

Each start has a fixed run, a tuned run, and a tuned run with the horizon "step". All runs of a task share
seed, data and batches. A learning rate that is not tuned is constant. A tuned run ends with `tuner.finish`;
the table also shows its last weights. A finished fixed run is the best, by validation, of its last weights,
their average and 27 checkpoints. The best of the fixed runs is the minimum of 100 validation losses, hence
biased downwards. Test errors are only reported. Fixed runs use no tuner, so the rows of the first edition
(git tag first-edition) are reused: docs/results/any_start.jsonl.
"""

import argparse
import math
import multiprocessing
import time
from pathlib import Path

import torch
from lattice import CHECKPOINTS
from matplotlib.figure import Figure
from tasks import HIGH_OF_FOUR, LOW_OF_FOUR, RESULTS, TASKS, Point, Row, Training, compute, finite, rows

import midflight as mf
from midflight.tuner.live import weights_at
from midflight.tuner.optimizers import trained_parameters

FIRST, ROWS = RESULTS / "any_start.jsonl", RESULTS / "any_start_seam.jsonl"
"""Rows of the first edition and of the current version."""
ARMS = {"grid": 100, "fixed": 40, "tuned": 40, "one_step": 40}
UNTUNED = ("grid", "fixed")
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
    tuner = None if arm in UNTUNED else run.tune(horizon="run" if arm == "tuned" else "step")
    fixed = None if tuner else Candidates(run)
    began = time.perf_counter()
    path, caution = [], []
    for n in range(1, run.steps + 1):
        run.step()
        if fixed:
            fixed.follow(n)
        if n % (run.steps // run.task.epochs) == 0:
            path.append(run.point)
            if arm == "tuned":
                caution.append(round(tuner.horizon.extrapolation, 3))
    seconds = time.perf_counter() - began
    valid, test = run.losses()
    if fixed:
        finish = min(fixed.losses())
    else:
        tuner.finish()
        finish = run.losses()
    return {
        "task": name, "arm": arm, "index": index, "start": start, "end": path[-1], "valid_loss": valid,
        "test_error": test, "finish": finish, "seconds": round(seconds, 2), "path": _few(path),
        "caution": caution,
    }  # fmt: skip


def _few(path: list[list[float]]) -> list[list[float]]:
    """Return up to 20 points of a path, at equal distances, with four digits."""
    return [[float(f"{x:.4g}") for x in point] for point in path[:: -(-len(path) // 20)]]


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


def files(seed: int, four: bool, device: str = "cpu") -> tuple[Path, Path]:
    """Return the files with the rows of the first edition and of the current version."""
    suffix = "_four" * four + f"_seed{seed}" * bool(seed) + f"_{device}" * (device != "cpu")
    return FIRST.with_stem(FIRST.stem + suffix), ROWS.with_stem(ROWS.stem + suffix)


def stored(first: Path, ours: Path) -> list[Row]:
    """Return the current rows and the first edition's rows of fixed runs."""
    return [row for row in rows(first) if row["arm"] in UNTUNED] + rows(ours)


def losses(found: list[Row], task: str, arm: str, finished: bool = False) -> list[float]:
    """Return index -> validation loss of the last or the finished weights; infinite if the run diverged."""
    chosen = sorted((r for r in found if (r["task"], r["arm"]) == (task, arm)), key=lambda r: r["index"])
    return [finite(r["finish"][0] if finished else r["valid_loss"]) for r in chosen]


COMPARED = {
    "fixed": ("fixed", False, False),
    "one_step, last weights": ("one_step", False, False),
    "tuned, last weights": ("tuned", False, False),
    "tuned, finished": ("tuned", True, False),
    "all finished": ("tuned", True, True),
}
"""Comparison -> kind of run, whether it is finished, whether its fixed runs are finished."""


def table(found: list[Row]) -> str:
    """Print per task how close the runs end to the best fixed run, and how many are worse than fixed."""
    lines = [
        "| task | compared | best of 100 fixed | median | worst | within 10 % | within 25 % | "
        "worse than fixed | by over 5 % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for name, (arm, finished, fixed_too) in COMPARED.items():
            grid, fixed = (losses(found, task, a, fixed_too) for a in ("grid", "fixed"))
            ends = losses(found, task, arm, finished)
            if len(grid) < ARMS["grid"] or len(ends) < ARMS[arm] or len(fixed) < ARMS["fixed"]:
                continue
            best, n = min(grid), len(ends)
            near, nearer = (sum(e <= f * best for e in ends) for f in (1.25, 1.1))
            worse, much = (sum(e > f * b for e, b in zip(ends, fixed, strict=True)) for f in (1.0, 1.05))
            lines.append(
                f"| {task} | {name} | {best:.4f} | {sorted(ends)[n // 2]:.4f} | {max(ends):.4f} | "
                f"{nearer}/{n} | {near}/{n} | {worse}/{n} | {much}/{n} |"
            )
    return "\n".join(lines)


def pairs(first: list[Row], ours: list[Row]) -> str:
    """Print per task the ratio of the finished loss to the first edition's, start by start."""
    lines = [
        "| task | starts | new over first, geometric mean | within 10 % of best of 100: new | first |",
        "|---|---|---|---|---|",
    ]
    for task in TASKS:
        new, old = (
            {r["index"]: finite(r["finish"][0]) for r in found if (r["task"], r["arm"]) == (task, "tuned")}
            for found in (ours, first)
        )
        both = sorted(new.keys() & old.keys())
        grid = losses(first, task, "grid") or losses(ours, task, "grid")
        if len(both) < 2 or len(grid) < ARMS["grid"]:
            continue
        near, near_first = (sum(ends[i] <= 1.1 * min(grid) for i in both) for ends in (new, old))
        ratio = ratio_of([math.log(new[i] / old[i]) for i in both])
        lines.append(f"| {task} | {len(both)} | {ratio} | {near}/{len(both)} | {near_first}/{len(both)} |")
    return "\n".join(lines)


def ratio_of(logs: list[float]) -> str:
    """Return the geometric mean of ratios, ± two standard errors of the mean logarithm."""
    found = torch.tensor(logs, dtype=torch.float64)
    return f"{found.mean().exp():.3f} ± {2 * found.std() / len(found) ** 0.5:.3f}"


def figure(found: list[Row], path: Path) -> None:
    """Draw the sorted validation losses of the 40 starts, for each complete task and kind of run."""
    whole = [t for t in TASKS if all(len(losses(found, t, a)) == n for a, n in ARMS.items())]
    if not whole:
        return
    fig = Figure(figsize=(3.1 * len(whole), 3.4), layout="constrained")
    for i, task in enumerate(whole):
        ax = fig.add_subplot(1, len(whole), i + 1)
        best = min(losses(found, task, "grid"))
        for arm, finished, colour, label in (
            ("fixed", False, "0.6", "fixed at the start"),
            ("one_step", False, "tab:orange", "one_step"),
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
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="tasks to run; default: all")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--figure", action="store_true", help="run nothing; table and figure of stored rows")
    parser.add_argument("--pair", action="store_true", help="run nothing; compare with the first edition")
    parser.add_argument("--four", action="store_true", help="also tune dropout and learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    first, ours = files(options.seed, options.four, options.device)
    if options.pair:
        print(pairs(rows(first), rows(ours)))
        return
    tasks = options.tasks or (TASKS_OF_FOUR if options.four else list(TASKS))
    if not options.figure:
        done = {(row["task"], row["arm"], row["index"]) for row in stored(first, ours)}
        jobs = [(t, a, i) for t in tasks for a in options.arms for i in range(ARMS[a])]
        jobs = [(*job, options.seed, options.four, options.device) for job in jobs if job not in done]
        compute(ours, jobs, train, options.workers)
    found = stored(first, ours)
    print(table(found))
    figure(found, ours.with_suffix(".png"))


if __name__ == "__main__":
    main()
