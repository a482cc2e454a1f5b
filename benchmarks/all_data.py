"""Measure whether retraining on T1 + T2 after tuning helps, as in Luketina et al. 2016.

    python benchmarks/all_data.py             # three tasks, 10 starts; resumes
    python benchmarks/all_data.py --table     # print the table of the stored rows

T1 is the training data, T2 the validation data. The table compares test errors start by start.

    tuned        the tuned run on T1
    trajectory   a new training on T1 + T2 along the trajectory of the tuned run (mf.Replay)
    last         a new training on T1 + T2 at the final values of the tuned run
    t1 only      a new training on T1 along the trajectory, which shows the effect of retraining alone

A training on T1 + T2 has the same number of epochs, hence more steps. Rows: docs/results/all_data.jsonl.
"""

import numpy as np
from any_start import point
from tasks import RESULTS, Point, Row, Training, compute, parser_of, rows

import midflight as mf

ROWS = RESULTS / "all_data.jsonl"
TASKS = ["digits", "tabular", "mnist_5k"]
ARMS = ["tuned", "trajectory", "last", "t1 only"]
STARTS = 10


def train(job: tuple[str, int]) -> Row:
    """Run all four variants from one start."""
    name, index = job
    start = point("tuned", index)
    tuned = Training(name, start)
    tuner = tuned.tune()
    for _ in range(tuned.steps):
        tuned.step()
    fixed_last = mf.Trajectory()
    fixed_last.record(0, tuned.space)
    errors = {
        "tuned": tuned.losses()[1],
        "trajectory": followed(name, start, tuner.trajectory, with_t2=True),
        "last": followed(name, start, fixed_last, with_t2=True),
        "t1 only": followed(name, start, tuner.trajectory, with_t2=False),
    }
    return {"task": name, "index": index, "errors": errors}


def followed(name: str, start: Point, trajectory: mf.Trajectory, with_t2: bool) -> float:
    run = Training(name, start, with_t2=with_t2)
    mf.Replay(trajectory, run.space, run.optimizer, total_steps=run.steps)
    for _ in range(run.steps):
        run.step()
    return run.losses()[1]


def table(found: list[Row]) -> str:
    """Print the median test error and the number of starts with a lower one than the tuned run."""
    lines = [f"| task | {' | '.join(ARMS)} |", "|---|" + "---|" * len(ARMS)]
    for task in TASKS:
        errors = [row["errors"] for row in found if row["task"] == task]
        if len(errors) < STARTS:
            continue
        cells = [f"{np.median([e['tuned'] for e in errors]):.4f}"]
        for arm in ARMS[1:]:
            better = sum(e[arm] < e["tuned"] for e in errors)
            cells.append(f"{np.median([e[arm] for e in errors]):.4f}, better {better}/{len(errors)}")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parser_of(__doc__).parse_args()
    if not options.table:
        done = {(row["task"], row["index"]) for row in rows(ROWS)}
        jobs = [(t, i) for t in TASKS for i in range(STARTS) if (t, i) not in done]
        compute(ROWS, jobs, train, options.workers)
    print(table(rows(ROWS)))


if __name__ == "__main__":
    main()
