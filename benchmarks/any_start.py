"""From any start: 40 starts in a space far wider than the paper's, five tasks, one default setting.

    python benchmarks/any_start.py                       all tasks; takes up where it stopped
    python benchmarks/any_start.py --tasks digits        some of them
    python benchmarks/any_start.py --figure              table and figure from the stored rows alone

log10 L2 in [-7, -0.5] and input noise in [0, 1.2] are tuned. Per task: a 10 x 10 grid of fixed runs; from
each start (the four corners and 36 Sobol points) a fixed run and a tuned one, and a tuned one without
foresight (plain `one_step`). All runs of a task share seed, data and batches; the learning rate is constant.
The best of the grid is the smallest of 100 validation losses, so it is a lucky one among equals. Test errors
are computed with the final weights and used for nothing. Rows: docs/results/any_start.jsonl.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import midflight as mf
from midflight.cli import machine
from midflight.study.arm import Shuffled, Split, mlp
from midflight.study.data import load

RESULTS = Path(__file__).parent.parent / "docs/results"
ROWS = RESULTS / "any_start.jsonl"
LOW, HIGH = (-7.0, 0.0), (-0.5, 1.2)
ARMS = {"grid": 100, "fixed": 40, "tuned": 40, "one_step": 40}
Point = tuple[float, float]
Splits = tuple[Split, Split, Split]


@dataclass(frozen=True)
class Task:
    """What is trained: T1, T2 and test, a network, and for how long."""

    data: Callable[[], Splits]
    network: Callable[[], nn.Module]
    epochs: int
    batch: int
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


def images(name: str, train: int, valid: int) -> Splits:
    a = load(name)
    order = torch.randperm(len(a.train_y), generator=torch.Generator().manual_seed(7))
    x, y = torch.from_numpy(a.train_x), torch.from_numpy(a.train_y)
    first, second = order[:train], order[train : train + valid]
    test = Split(torch.from_numpy(a.test_x), torch.from_numpy(a.test_y))
    return Split(x[first], y[first]), Split(x[second], y[second]), test


def diabetes() -> Splits:
    """scikit-learn's diabetes table: 200 rows to train on, 121 each for T2 and test; all standardised."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(7))
    x, y = x[order], y[order, None]
    x, y = (x - x[:200].mean(0)) / x[:200].std(0), (y - y[:200].mean()) / y[:200].std()
    return Split(x[:200], y[:200]), Split(x[200:321], y[200:321]), Split(x[321:], y[321:])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


TASKS = {
    "mnist_5k": Task(lambda: images("mnist", 5000, 2000), lambda: mlp(784, [200, 200], 10), 40, 128),
    "mnist_55k": Task(lambda: images("mnist", 55000, 5000), lambda: mlp(784, [200, 200], 10), 5, 128),
    "fashion_cnn": Task(lambda: images("fashion_mnist", 20000, 5000), cnn, 5, 128),
    "tabular": Task(diabetes, lambda: mlp(10, [64, 64], 1), 200, 20, F.mse_loss),
    "digits": Task(lambda: images("digits", 1000, 437), lambda: mlp(64, [100, 100], 10), 60, 50),
}


def point(arm: str, index: int) -> Point:
    """Where this run begins."""
    if arm == "grid":
        unit = [index // 10 / 9, index % 10 / 9]
    elif index < 4:
        unit = [float(index // 2), float(index % 2)]
    else:
        unit = torch.quasirandom.SobolEngine(2, scramble=True, seed=1).draw(36)[index - 4].tolist()
    l2, noise = (low + u * (high - low) for u, low, high in zip(unit, LOW, HIGH, strict=True))
    return l2, noise


@cache
def splits(name: str) -> Splits:
    """The data of a task, read once per process."""
    return TASKS[name].data()


def train(name: str, arm: str, index: int) -> dict[str, Any]:
    """One run, as a row."""
    task, start = TASKS[name], point(arm, index)
    t1, t2, test = splits(name)
    torch.manual_seed(0)
    space = mf.Space(
        weight_decay=mf.Float(10 ** LOW[0], 10 ** HIGH[0], log=True, init=10 ** start[0]),
        noise=mf.Float(LOW[1], HIGH[1], init=start[1]),
    )
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), task.network())
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=float(space["weight_decay"]), fused=True)
    batches = Shuffled(t1, task.batch, seed=1)

    def validate(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return task.loss(model(batch[0]), batch[1])

    tuner = None
    if arm in ("tuned", "one_step"):
        size = min(256, len(t2))
        tuner = mf.Tuner(
            model, optimizer, space, validate=validate, valid_loader=Shuffled(t2, size, seed=2),
            train_loader=Shuffled(t1, min(256, len(t1)), seed=3) if arm == "tuned" else None,
            bind=["weight_decay"], total_steps=task.epochs * (len(t1) // task.batch),
        )  # fmt: skip
    began = time.perf_counter()
    path, caution = [], []
    for _ in range(task.epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss = task.loss(model(x), y)
            tuner.backward(loss) if tuner else loss.backward()
            optimizer.step()
        path.append([float(space["weight_decay"].value.detach().log10()), float(space["noise"])])
        if tuner and tuner.foresight:
            caution.append(round(tuner.foresight.caution, 3))
    seconds = time.perf_counter() - began

    model.eval()
    with torch.no_grad():
        valid_loss = float(task.loss(model(t2.x), t2.y))
        outputs = model(test.x)
    wrong = (
        task.loss(outputs, test.y)
        if task.loss is F.mse_loss
        else (outputs.argmax(1) != test.y).float().mean()
    )
    return {
        "task": name, "arm": arm, "index": index, "start": start, "end": path[-1], "valid_loss": valid_loss,
        "test_error": float(wrong), "seconds": round(seconds, 2), "path": path, "caution": caution,
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """The stored rows; a line cut off by a crash is left out."""
    found = []
    for line in ROWS.read_text().splitlines() if ROWS.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in found if "task" in row]


def compute(tasks: list[str], workers: int) -> None:
    done = {(row["task"], row["arm"], row["index"]) for row in rows()}
    jobs = [(t, a, i) for t in tasks for a, n in ARMS.items() for i in range(n) if (t, a, i) not in done]
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a") as file, multiprocessing.get_context("spawn").Pool(workers, _one_thread) as pool:
        file.write(json.dumps({"machine": machine()}) + "\n")
        for n, row in enumerate(pool.imap_unordered(_train, jobs), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(
                f"{n}/{len(jobs)} {row['task']} {row['arm']} {row['index']}: {row['valid_loss']:.4f}",
                flush=True,
            )


def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _train(job: tuple[str, str, int]) -> dict[str, Any]:
    return train(*job)


def losses(found: list[dict[str, Any]], task: str, arm: str) -> list[float]:
    """Validation losses by index; a run that diverged counts as infinite."""
    chosen = sorted((r for r in found if (r["task"], r["arm"]) == (task, arm)), key=lambda r: r["index"])
    return [r["valid_loss"] if r["valid_loss"] == r["valid_loss"] else float("inf") for r in chosen]


def table(found: list[dict[str, Any]]) -> str:
    """Per task and arm: how near the starts end to the best of the grid, and how many got worse."""
    lines = [
        "| task | best of 100 fixed | arm | median | worst | within 10 % | within 25 % | "
        "worse than fixed | by over 5 % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        grid, fixed = losses(found, task, "grid"), losses(found, task, "fixed")
        for arm in ("fixed", "one_step", "tuned"):
            ends = losses(found, task, arm)
            if len(grid) < ARMS["grid"] or len(ends) < ARMS[arm] or len(fixed) < ARMS["fixed"]:
                continue
            best, n = min(grid), len(ends)
            near, nearer = (sum(e <= f * best for e in ends) for f in (1.25, 1.1))
            worse, much = (sum(e > f * b for e, b in zip(ends, fixed, strict=True)) for f in (1.0, 1.05))
            lines.append(
                f"| {task} | {best:.4f} | {arm} | {sorted(ends)[n // 2]:.4f} | {max(ends):.4f} | "
                f"{nearer}/{n} | {near}/{n} | {worse}/{n} | {much}/{n} |"
            )
    return "\n".join(lines)


def figure(found: list[dict[str, Any]]) -> None:
    """Per whole task: validation loss of the 40 starts, sorted; fixed, plain one step, tuned."""
    whole = [t for t in TASKS if all(len(losses(found, t, a)) == n for a, n in ARMS.items())]
    if not whole:
        return
    fig = Figure(figsize=(3.1 * len(whole), 3.4), layout="constrained")
    for i, task in enumerate(whole):
        ax = fig.add_subplot(1, len(whole), i + 1)
        best = min(losses(found, task, "grid"))
        for arm, colour, label in (
            ("fixed", "0.6", "fixed at the start"),
            ("one_step", "tab:orange", "one_step"),
            ("tuned", "tab:blue", "with foresight"),
        ):
            ends = sorted(losses(found, task, arm))
            ax.plot(range(1, len(ends) + 1), ends, ".-", color=colour, markersize=4, linewidth=1, label=label)
        ax.axhspan(best, 1.1 * best, color="tab:green", alpha=0.2, label="best of 100 fixed, + 10 %")
        ax.set_yscale("log")
        ax.set_title(task.replace("_", " "))
        ax.set_xlabel("starts, sorted")
        if i == 0:
            ax.set_ylabel("validation loss at the end")
            ax.legend(fontsize=7)
    fig.savefig(RESULTS / "any_start.png", dpi=110)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--figure", action="store_true", help="compute nothing")
    options = parser.parse_args()
    if not options.figure:
        compute(options.tasks, options.workers)
    found = rows()
    print(table(found))
    figure(found)


if __name__ == "__main__":
    main()
