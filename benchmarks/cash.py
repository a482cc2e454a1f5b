"""Compare midflight.AutoClassifier and AutoRegressor with other AutoML on ten tables.

    python benchmarks/cash.py                     # all datasets and methods; resumes
    python benchmarks/cash.py --datasets wine --arms midflight
    python benchmarks/cash.py --autogluon PYTHON  # also AutoGluon, in an interpreter that has it
    python benchmarks/cash.py --table             # tables of the stored rows
    python benchmarks/cash.py --figure            # also the figure
    python benchmarks/cash.py --time              # measure whether the time limit is kept; four minutes

Data: five classifications and five regressions, of 178 to 20,000 rows, five random splits each, 70 % for
training and 30 % for testing. moons, friedman1 and the large ones are generated; concrete and red_wine are of
the UCI repository, in ../shared/data/uci; the others come with scikit-learn. One process, one thread.
midflight, FLAML and AutoGluon have 20 seconds each. Two scikit-learn learners with default options have no
time limit. Loss: log loss, or squared error over the variance of the test target. "midflight, best alone" is
the best configuration of the same search without the ensemble. A method that fails leaves a row with its
error. FLAML needs pip install 'flaml[automl]'. AutoGluon needs an environment of its own with
'autogluon.tabular[lightgbm,xgboost,catboost]', because it wants an older pandas.

Rows: docs/results/cash_tables.jsonl.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata
from sklearn import datasets
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from tasks import RESULTS, Row, append, one_thread, rows

import midflight as mf
from midflight._reporting.machine import machine

ROWS = RESULTS / "cash_tables.jsonl"
DATA = Path(__file__).parents[2] / "shared/data/uci"
WORKER = Path(__file__).parent / "autogluon_worker.py"
SECONDS = 20.0
SEEDS = 5
TIMES = [
    (500, 30, 3, 10.0), (5000, 30, 3, 10.0), (50_000, 30, 3, 10.0), (500_000, 30, 3, 10.0),
    (5000, 30, 3, 60.0), (50_000, 30, 3, 60.0), (2000, 2000, 10, 5.0), (10_000, 20, 500, 10.0),
]  # fmt: skip
"""(rows, columns, classes, seconds) for --time."""
Arrays = tuple[np.ndarray, np.ndarray]
Models = dict[str, Any]
"""Name of a method -> function that fits it."""


def uci(name: str) -> Arrays:
    """Return a table of the UCI repository."""
    file = np.load(DATA / f"{name}.npz")
    return file["x"], file["y"].ravel()


def large_values() -> Arrays:
    """Return 20,000 rows of friedman1 with 30 columns, of which 25 are noise."""
    return datasets.make_friedman1(20_000, 30, noise=1.0, random_state=0)


CLASSIFICATIONS: dict[str, Callable[[], Arrays]] = {
    "breast_cancer": partial(datasets.load_breast_cancer, return_X_y=True),
    "wine": partial(datasets.load_wine, return_X_y=True),
    "digits": partial(datasets.load_digits, return_X_y=True),
    "moons": partial(datasets.make_moons, 500, noise=0.3, random_state=0),
    "large_classes": partial(
        datasets.make_classification, 20_000, 30, n_informative=15, n_classes=5, flip_y=0.05, random_state=0
    ),
}
REGRESSIONS: dict[str, Callable[[], Arrays]] = {
    "diabetes": partial(datasets.load_diabetes, return_X_y=True),
    "friedman1": partial(datasets.make_friedman1, 600, noise=1.0, random_state=0),
    "concrete": partial(uci, "concrete"),
    "red_wine": partial(uci, "wine"),
    "large_values": large_values,
}
DATASETS = CLASSIFICATIONS | REGRESSIONS


def midflight(x: np.ndarray, y: np.ndarray, classes: bool, seed: int) -> Models:
    kind = mf.AutoClassifier if classes else mf.AutoRegressor
    model = kind(seconds=SECONDS, random_state=seed).fit(x, y)
    return {"midflight": model, "midflight, best alone": model.best_estimator_}


def forest(x: np.ndarray, y: np.ndarray, classes: bool, seed: int) -> Models:
    kind = RandomForestClassifier if classes else RandomForestRegressor
    return {"random forest": kind(random_state=seed).fit(x, y)}


def boosting(x: np.ndarray, y: np.ndarray, classes: bool, seed: int) -> Models:
    kind = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    return {"boosting": kind(random_state=seed).fit(x, y)}


def flaml(x: np.ndarray, y: np.ndarray, classes: bool, seed: int) -> Models:
    from flaml import AutoML

    task, metric = ("classification", "log_loss") if classes else ("regression", "mse")
    model = AutoML()
    model.fit(
        x, y, task=task, metric=metric, time_budget=SECONDS, seed=seed, n_jobs=1, verbose=0, log_file_name=""
    )
    return {"FLAML": model}


class AutoGluon:
    """Fits and predicts in another interpreter."""

    python = ""
    """The interpreter, from --autogluon."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.folder = Path(tempfile.mkdtemp())
        np.savez(self.folder / "train.npz", x=x, y=y)
        self._call("fit", str(SECONDS))

    def predict(self, x: np.ndarray) -> np.ndarray:
        np.savez(self.folder / "test.npz", x=x)
        self._call("predict")
        found: np.ndarray = np.load(self.folder / "found.npy")
        return found

    predict_proba = predict

    def _call(self, verb: str, *more: str) -> None:
        command = [self.python, str(WORKER), verb, str(self.folder), *more]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])


def autogluon(x: np.ndarray, y: np.ndarray, classes: bool, seed: int) -> Models:
    """Fit AutoGluon; its start takes two seconds more, which the row's seconds include."""
    return {"AutoGluon": AutoGluon(x, y)}


ARMS: dict[str, Callable[..., Models]] = {
    "midflight": midflight, "FLAML": flaml, "AutoGluon": autogluon, "random forest": forest,
    "boosting": boosting,
}  # fmt: skip
SHOWN = ["midflight", "midflight, best alone", "FLAML", "AutoGluon", "random forest", "boosting"]


def run(name: str, arm: str, seed: int) -> list[Row]:
    """Return the rows of one method on one split."""
    x, y = DATASETS[name]()
    classes = name in CLASSIFICATIONS
    x, test_x, y, test_y = train_test_split(
        x, y, test_size=0.3, random_state=seed, stratify=y if classes else None
    )
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models = ARMS[arm](x, y, classes, seed)
            seconds = time.perf_counter() - began
            losses = {label: loss(model, test_x, test_y, classes) for label, model in models.items()}
    except Exception as error:  # a failure is a result, too
        said = f"{type(error).__name__}: {error}"
        return [{"task": name, "arm": arm, "index": seed, "error": said}]
    return [
        {"task": name, "arm": label, "index": seed, "loss": at, "seconds": round(seconds, 2),
         "chosen": chosen(models[label])}
        for label, at in losses.items()
    ]  # fmt: skip


def loss(model: Any, x: np.ndarray, y: np.ndarray, classes: bool) -> float:
    """Return the log loss, or the squared error over the variance of the target."""
    if classes:
        return float(log_loss(y, model.predict_proba(x)))
    return float(np.mean((model.predict(x) - y) ** 2) / np.var(y))


def chosen(model: Any) -> str:
    """Return the kind of the chosen learner."""
    if hasattr(model, "best_estimator"):
        return str(model.best_estimator)
    if hasattr(model, "leaderboard_"):
        return " ".join(f"{row['family']}*{row['weight']}" for row in model.leaderboard_ if row["weight"])
    return ""


def time_kept(n: int, columns: int, classes: int, seconds: float) -> Row:
    """Time a fit on a synthetic table of n rows."""
    x, y = datasets.make_classification(
        n, columns, n_informative=15, n_classes=classes, flip_y=0.05, random_state=0
    )
    began = time.perf_counter()
    model = mf.AutoClassifier(seconds=seconds, random_state=0).fit(x, y)
    took = time.perf_counter() - began
    states = [row["state"] for row in model.leaderboard_]
    counts = {state: states.count(state) for state in ("complete", "behind", "skipped", "failed")}
    return {"task": "time", "arm": f"{n:,} x {columns:,}, {classes} classes", "index": n, "budget": seconds,
            "took": round(took, 2), "chosen": chosen(model), **counts}  # fmt: skip


def time_table(found: Sequence[Row]) -> str:
    heads = "table", "seconds given", "taken", "complete, behind, skipped, failed", "chosen"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in found:
        if r["task"] == "time":
            counts = ", ".join(str(r[state]) for state in ("complete", "behind", "skipped", "failed"))
            lines.append(f"| {r['arm']} | {r['budget']:g} | {r['took']:.1f} | {counts} | {r['chosen']} |")
    return "\n".join(lines)


def by_seed(found: Sequence[Row], name: str) -> dict[str, list[float]]:
    """Return method -> losses, sorted by seed, of the seeds that all methods have."""
    losses = {
        arm: {r["index"]: r["loss"] for r in found if (r["task"], r["arm"]) == (name, arm) and "loss" in r}
        for arm in SHOWN
    }
    losses = {arm: of_seed for arm, of_seed in losses.items() if of_seed}
    seeds = sorted(set.intersection(*map(set, losses.values()))) if losses else []
    return {arm: [of_seed[s] for s in seeds] for arm, of_seed in losses.items()}


def ranks(losses: dict[str, list[float]]) -> dict[str, float]:
    """Return method -> mean rank over the seeds, 1 is best; ensemble and best alone are ranked separately."""
    arms = [arm for arm in SHOWN if arm in losses and arm != "midflight, best alone"]
    of_seed = np.array([rankdata([losses[arm][s] for arm in arms]) for s in range(len(losses[arms[0]]))])
    return dict(zip(arms, of_seed.mean(0).tolist(), strict=True))


def table(found: Sequence[Row]) -> str:
    """Print mean test loss [minimum, maximum], mean ranks, wins and losses of midflight, and seconds."""
    lines = [f"| dataset | {' | '.join(SHOWN)} |", "|---|" + "---|" * len(SHOWN)]
    all_ranks: dict[str, dict[str, float]] = {arm: {} for arm in SHOWN}
    for name in DATASETS:
        losses = by_seed(found, name)
        if not losses:
            continue
        best = min(float(np.mean(v)) for v in losses.values())
        cells = []
        for arm in SHOWN:
            if arm not in losses:
                cells.append("-")
                continue
            mean = float(np.mean(losses[arm]))
            text = f"{mean:.4f} [{min(losses[arm]):.4f}, {max(losses[arm]):.4f}]"
            cells.append(f"**{text}**" if mean == best else text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
        for arm, rank in ranks(losses).items():
            all_ranks[arm][name] = rank
    for kind, names in (("classification", CLASSIFICATIONS), ("regression", REGRESSIONS)):
        of_kind = {arm: [of[n] for n in names if n in of] for arm, of in all_ranks.items()}
        cells = [f"{np.mean(of_kind[arm]):.2f}" if of_kind[arm] else "" for arm in SHOWN]
        lines.append(f"| mean rank, {kind} | {' | '.join(cells)} |")
    cells = []
    for arm in SHOWN:
        seconds = [r["seconds"] for r in found if r["arm"] == arm and "seconds" in r]
        cells.append(f"{np.mean(seconds):.1f}, most {max(seconds):.1f}" if seconds else "-")
    lines.append(f"| seconds | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *duels(found), "", *seconds_taken(found), ensembles(found), *errors(found)])


def seconds_taken(found: Sequence[Row]) -> list[str]:
    taken = {arm: [r["seconds"] for r in found if r["arm"] == arm and "seconds" in r] for arm in SHOWN}
    return [f"{arm} took {min(s):.1f} to {max(s):.1f} seconds." for arm, s in taken.items() if s]


def ensembles(found: Sequence[Row]) -> str:
    """Print on how many splits the ensemble differs from its best member, and is better and worse."""
    losses = {(r["task"], r["index"], r["arm"]): r["loss"] for r in found if "loss" in r}
    pairs = [
        (loss, losses[*split, "midflight, best alone"])
        for (*split, arm), loss in losses.items()
        if arm == "midflight"
    ]
    better, worse = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    return (
        f"The ensemble was used on {better + worse} of {len(pairs)} splits: better than the best "
        f"configuration alone on {better}, worse on {worse}."
    )


def duels(found: Sequence[Row]) -> list[str]:
    """Print on how many splits midflight beats each other method, and the datasets where it loses."""
    lines = []
    for other in SHOWN[1:]:
        won, splits, behind = 0, 0, []
        for name in DATASETS:
            losses = by_seed(found, name)
            if "midflight" not in losses or other not in losses:
                continue
            pairs = list(zip(losses["midflight"], losses[other], strict=True))
            won, splits = won + sum(a < b for a, b in pairs), splits + len(pairs)
            if np.mean(losses["midflight"]) > np.mean(losses[other]):
                behind.append(name)
        if splits:
            lines.append(
                f"midflight against {other}: lower on {won} of {splits} splits; behind on the mean of "
                f"{', '.join(behind) or 'no dataset'}."
            )
    return lines


def errors(found: Sequence[Row]) -> list[str]:
    return [f"{r['arm']} on {r['task']}, seed {r['index']}: {r['error']}" for r in found if "error" in r]


def figure(found: Sequence[Row]) -> None:
    """Draw the ratio of each split's test loss to the default random forest's."""
    arms = [arm for arm in SHOWN if arm != "random forest"]
    fig = Figure(figsize=(9, 3.6), layout="constrained")
    ax = fig.subplots()
    for k, arm in enumerate(arms):
        for i, name in enumerate(DATASETS):
            losses = by_seed(found, name)
            if arm not in losses or "random forest" not in losses:
                continue
            ratio = np.array(losses[arm]) / np.array(losses["random forest"])
            x = i + 0.18 * (k - 1.5)
            ax.plot(np.full(len(ratio), x), ratio, ".", color=f"C{k}", alpha=0.5, markersize=5)
            ax.plot(x, np.exp(np.log(ratio).mean()), "_", color=f"C{k}", markersize=14, markeredgewidth=2.5,
                    label=arm if i == 0 else None)  # fmt: skip
    ax.axhline(1, color="grey", linewidth=1)
    ax.set_yscale("log")
    ax.set_xticks(range(len(DATASETS)), list(DATASETS), fontsize=8)
    ax.set_ylabel("test loss / default random forest")
    fig.legend(loc="outside lower center", ncols=len(arms), fontsize=8)
    fig.savefig(ROWS.with_suffix(".png"), dpi=110)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=[a for a in ARMS if a != "AutoGluon"]
    )
    parser.add_argument("--autogluon", metavar="PYTHON", help="interpreter that has AutoGluon; adds that arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    parser.add_argument("--table", action="store_true", help="run nothing; print the tables")
    parser.add_argument("--figure", action="store_true", help="run nothing; also draw the figure")
    parser.add_argument("--time", action="store_true", help="only measure whether the time limit is kept")
    options = parser.parse_args()
    if options.autogluon:
        AutoGluon.python = options.autogluon
        options.arms = [*options.arms, "AutoGluon"]
    if options.time:
        one_thread()
        append(ROWS, {"machine": machine()})
        for table_and_seconds in TIMES:
            append(ROWS, time_kept(*table_and_seconds))
    elif not (options.table or options.figure):
        one_thread()
        done = {(row["task"], row["arm"], row["index"]) for row in rows(ROWS)}
        append(ROWS, {"machine": machine(), "seconds": SECONDS})
        for seed in options.seeds:
            for name in options.datasets:
                for arm in options.arms:
                    if (name, arm, seed) not in done:
                        for row in run(name, arm, seed):
                            append(ROWS, row)
                            print(row, flush=True)
    found = rows(ROWS)
    if options.figure:
        figure(found)
    print(table(found), time_table(found), sep="\n\n")


if __name__ == "__main__":
    # limit the threads before a numeric library is loaded
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
