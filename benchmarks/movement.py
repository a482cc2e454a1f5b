"""Measure how far steps move the weights at fixed learning rates, and the least validation loss.

    python benchmarks/movement.py                   # all tasks; resumes
    python benchmarks/movement.py --tasks digits    # some tasks
    python benchmarks/movement.py --table           # table of the stored rows

The change of a weight matrix is relative to its norm before; the median of all matrices is shown. Nothing is
tuned. The validation loss, C2, is the least one of 20 moments. `midflight.tuner.movement` has
limits that were read off such runs.

Rows: docs/results/movement.jsonl.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from recipes import BATCH, NETWORKS, data
from tasks import RESULTS, TASKS, Batch, Row, captioned, compute, endless, markdown, parser_of, rows, splits
from torch import Tensor, nn

from midflight.datasets import Shuffled, Split
from midflight.tuner.live import evaluating
from midflight.tuner.movement import relative_change

ROWS = RESULTS / "movement.jsonl"
SINCE_START, OF_A_STEP = (16, 64), (10, 50, 200, 500)
STEPS, MOMENTS = 1000, 20
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
RATES = {"adamw": (-3.5, -3.0, -2.5, -2.0, -1.5, -1.0), "sgd": (-2.5, -2.0, -1.5, -1.0, -0.5)}
"""log10 of the learning rates."""
OF_TASKS, OF_RECIPES = ("digits", "tabular", "mnist_5k"), ("cnn", "transformer")


def training(task: str) -> tuple[nn.Module, Split, Split, int, Callable[[nn.Module, Batch], Tensor]]:
    """Return model, T1, T2, batch size and loss."""
    if task in OF_TASKS:
        t1, t2, _ = splits(task)
        return TASKS[task].network(), t1, t2, TASKS[task].batch, TASKS[task].loss_of

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())

    t1, t2 = data(task)
    return NETWORKS[task](0.1), t1, t2, BATCH[task], loss  # type: ignore[arg-type]


def run(job: tuple[str, str, float]) -> Row:
    """Train a job (task, optimiser, log10 lr); return its row."""
    task, optimizer_name, rate = job
    torch.manual_seed(0)
    model, t1, t2, size, loss = training(task)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters(), lr=10**rate)
    batches, start = endless(Shuffled(t1, size, seed=1)), weights(model)
    since_start, of_a_step, best = [], [], math.inf
    for n in range(1, STEPS + 1):
        before = weights(model) if n in OF_A_STEP else {}
        optimizer.zero_grad()
        loss(model, next(batches)).backward()
        optimizer.step()
        if n in OF_A_STEP:
            of_a_step.append(relative_change(before, weights(model)))
        if n in SINCE_START:
            since_start.append(relative_change(start, weights(model)))
        if n % (STEPS // MOMENTS) == 0:
            with torch.no_grad(), evaluating(model):
                now = float(loss(model, (t2.x, t2.y)))
            best = min(best, now) if math.isfinite(now) else best
    return {
        "task": task, "arm": optimizer_name, "index": rate, "since_start": since_start,
        "of_a_step": of_a_step, "valid": best,
    }  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the weight matrices."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}


def table(found: list[Row]) -> str:
    """Print the changes per task, optimiser and learning rate; the best learning rates are bold."""
    head = [f"since the start, step {n}" for n in SINCE_START] + [f"step {n}, %" for n in OF_A_STEP]
    cells, best = [], []
    for row in sorted(found, key=lambda r: (r["task"], r["arm"], r["index"])):
        same = [r["valid"] for r in found if (r["task"], r["arm"]) == (row["task"], row["arm"])]
        bold = "**" if row["valid"] == min(same) else ""
        best += [row["of_a_step"]] if bold else []
        numbers = [f"{x:.2f}" for x in row["since_start"]] + [f"{100 * x:.2f}" for x in row["of_a_step"]]
        lr = f"{bold}{row['index']}{bold}"
        cells.append([row["task"], row["arm"], lr, *numbers, f"{row['valid']:.4f}"])
    ranges = [f"{100 * min(x):.2f} to {100 * max(x):.2f}" for x in zip(*best, strict=True)]
    of_steps = head[len(SINCE_START) :]
    return captioned(
        {
            "Relative change of the weights": markdown(["task", "optimiser", "log10 lr", *head, "C2"], cells),
            "Least and most at the best learning rates": markdown(
                ["range at the best lr of", *of_steps], [["all tasks", *ranges]]
            ),
        }
    )


def main() -> None:
    parser = parser_of(__doc__)
    names = [*OF_TASKS, *OF_RECIPES]
    parser.add_argument("--tasks", nargs="+", choices=names, default=names, help="default: all")
    options = parser.parse_args()
    if not options.table:
        done = {(r["task"], r["arm"], r["index"]) for r in rows(ROWS)}
        jobs = [(t, o, rate) for t in options.tasks for o in OPTIMIZERS for rate in RATES[o]]
        compute(ROWS, [job for job in jobs if job not in done], run, options.workers)
    print(table(rows(ROWS)))


if __name__ == "__main__":
    main()
