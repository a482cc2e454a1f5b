"""Train a grid of configurations once, so that search engines can look up the results.

    python benchmarks/lattice.py                   # all tasks; resumes

Grid: 14 values of log10 L2 in [-7, -0.5] times 13 of noise in [0, 1.2], tasks of tasks.py. A row has the
validation loss and the test error at 27 equally spaced checkpoints. Rows: docs/results/lattice.jsonl.
"""

import argparse
import itertools
import multiprocessing
from functools import cache

import numpy as np
from tasks import HIGH, LOW, RESULTS, TASKS, Row, Training, compute, rows

ROWS = RESULTS / "lattice.jsonl"
CHECKPOINTS = 27
L2, NOISE = np.linspace(LOW[0], HIGH[0], 14), np.linspace(LOW[1], HIGH[1], 13)
POINTS = [(float(l2), float(noise)) for l2, noise in itertools.product(L2, NOISE)]


def train(job: tuple[str, int]) -> Row:
    name, index = job
    run = Training(name, POINTS[index])
    at = {round(run.steps * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)}
    curve = []
    for n in range(1, run.steps + 1):
        run.step()
        if n in at:
            curve.append(tuple(round(v, 5) for v in run.losses()))
    return {"task": name, "index": index, "point": POINTS[index], "curve": curve}


@cache
def table(name: str) -> np.ndarray:
    """Return (validation loss, test error) curves, shape (14, 13, 27, 2); infinite if a run diverged.

    Raises:
        SystemExit: rows are missing.
    """
    found = {row["index"]: row["curve"] for row in rows(ROWS) if row["task"] == name}
    if len(found) < len(POINTS):
        raise SystemExit(f"{ROWS.name} must hold {len(POINTS)} rows for {name}, but holds {len(found)}; "
                         f"run python benchmarks/lattice.py --tasks {name}.")  # fmt: skip
    curves = np.array([found[i] for i in range(len(POINTS))], dtype=float)
    return np.nan_to_num(curves, nan=np.inf).reshape(len(L2), len(NOISE), CHECKPOINTS, 2)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    done = {(row["task"], row["index"]) for row in rows(ROWS)}
    jobs = [(t, i) for t in options.tasks for i in range(len(POINTS)) if (t, i) not in done]
    compute(ROWS, jobs, train, options.workers)


if __name__ == "__main__":
    main()
