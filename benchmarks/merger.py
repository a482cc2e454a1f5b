"""Compare tuning during the trials of a search with searching all hyperparameters.

    python benchmarks/merger.py                       # all tasks and seeds, without "cold"; resumes
    python benchmarks/merger.py --tasks digits --seeds 3
    python benchmarks/merger.py --table               # tables of the stored rows
    python benchmarks/merger.py --figure              # also the figure

The search chooses layers, width, activation, optimiser and momentum of a small network. Learning rate, weight
decay, input noise and dropout depend on the method:

    merged        tuned during each trial, starting at the final values of the nearest good trial
    merged, cold  tuned during each trial, starting at their defaults
    searched      searched by the same engine

Each search has a budget of 32 full trainings. An epoch of a tuned trial costs its time over that of a plain
epoch, measured here with alternating turns on one thread. Validation passes and the engine's own time are
free. Both kinds of trial finish alike: with the best, by validation, of last weights, their average, and
the best earlier average. The best model so far has the lowest validation loss at any epoch of any trial;
its test error is only reported. Needs midflight[search]. Rows: docs/results/merger.jsonl.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tasks import (
    RESULTS,
    Batch,
    Row,
    Splits,
    append,
    captioned,
    compute,
    diabetes,
    images,
    markdown,
    one_thread,
    parser_of,
    rows,
)
from torch import Tensor, nn

import midflight as mf
from midflight import search
from midflight._tensors import Tensors
from midflight.datasets import Shuffled, Split
from midflight.search.problems import MLP_SPACE, network, optimizer_for
from midflight.tuner.live import evaluating, weights_at
from midflight.tuner.optimizers import trained_parameters

ROWS = RESULTS / "merger.jsonl"
SEEDS, EPOCHS, TRAININGS = 10, 27, 32
BUDGETS = [1, 2, 4, 8, 16, 32]
ENGINES = ["bohb", "smac"]
ARMS = ["merged", "merged, cold", "searched"]
COST = "cost of tuning"
FIXED = ("layers", "width", "batch_norm", "lr")
SPACE = search.Space(
    {name: spec for name, spec in MLP_SPACE.specs.items() if name not in FIXED},
    layers=mf.Int(1, 3), width=mf.Int(16, 128, log=True), lr=mf.Float(1e-4, 0.3, log=True, online=True),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Data, batch size, number of outputs, loss and error."""

    data: Callable[[], Splits]
    batch: int
    outputs: int = 10
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return self.loss(model(x), y)

    def error(self, outputs: Tensor, y: Tensor) -> float:
        """Return the share of misclassified examples, or the mean squared error."""
        if self.loss is F.mse_loss:
            return float(F.mse_loss(outputs, y))
        return float((outputs.argmax(1) != y).float().mean())


def friedman() -> Splits:
    """Make scikit-learn's table friedman1: 600 training rows, 200 each for T2 and test; standardised."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(1000, noise=1.0, random_state=0)
    x, y = ((a - a[:600].mean(0)) / a[:600].std(0) for a in (x, y))
    table = Split(torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None])
    return table[:600], table[600:800], table[800:]


TASKS = {
    "digits": Task(lambda: images("digits", 1000, 437), 50),
    "mnist_2k": Task(lambda: images("mnist", 2000, 1000), 100),
    "fashion_2k": Task(lambda: images("fashion_mnist", 2000, 1000), 100),
    "tabular": Task(diabetes, 20, 1, F.mse_loss),
    "friedman": Task(friedman, 30, 1, F.mse_loss),
}


@cache
def splits(name: str) -> Splits:
    """Load the data of a task, once per process."""
    return TASKS[name].data()


class Training:
    """A training of a configuration, tuned with default options, or fixed with the same weight averaging."""

    def __init__(self, name: str, params: dict[str, Any], online: mf.Space | None, seed: int) -> None:
        self.task, self.seed = TASKS[name], seed
        self.t1, self.t2, self.test = splits(name)
        torch.manual_seed(seed)
        levels = {n: online[n] for n in online} if online else {}
        self.model = network(self.t1.x.shape[1], self.task.outputs, {**params, **levels, "batch_norm": False})
        self.optimizer = optimizer_for(self.model, params)
        self.batches = Shuffled(self.t1, self.task.batch, seed + 1)
        self.steps, self.total = 0, EPOCHS * (len(self.t1) // self.task.batch)
        self.params = trained_parameters(self.model, self.optimizer)
        self.average, self.earlier = mf.Averaged(), (float("inf"), {})
        size = min(128, len(self.t2), len(self.t1))
        self.tuner = online and mf.Tuner(
            self.model, self.optimizer, online, self.task.loss_of, Shuffled(self.t1, size, seed + 3),
            Shuffled(self.t2, size, seed + 2), total_steps=self.total,
        )  # fmt: skip

    def epoch(self) -> None:
        for batch in self.batches:
            self.optimizer.zero_grad()
            self.task.loss_of(self.model, batch).backward()
            self.optimizer.step()
            self.steps += 1
            if not self.tuner:
                self.average.follow(self.params, self.steps, self.steps / self.total)

    @torch.no_grad()
    def valid(self, weights: Tensors) -> float:
        """Return the validation loss at some weights; None: the model's."""
        with evaluating(self.model), weights_at({n: self.params[n] for n in weights}, weights):
            return float(self.task.loss_of(self.model, (self.t2.x, self.t2.y)))

    @torch.no_grad()
    def test_error(self, weights: Tensors) -> float:
        """Return the test error at some weights; None: the model's."""
        with evaluating(self.model), weights_at({n: self.params[n] for n in weights}, weights):
            return self.task.error(self.model(self.test.x), self.test.y)

    def report(self) -> tuple[float, Tensors]:
        """Return the report of an epoch: of the last weights; after the last epoch, of the best weights."""
        ends = self.steps == self.total
        if self.tuner:
            if ends:
                self.tuner.finish()
            return self.valid({}), {}
        average = self.average.average()
        averaged = self.valid(average), average
        if averaged[0] < self.earlier[0]:
            self.earlier = averaged[0], {name: a.clone() for name, a in average.items()}
        last = self.valid({}), {}
        return min(last, averaged, self.earlier, key=lambda found: found[0]) if ends else last

    def state_dict(self) -> Row:
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps,
            "batches": self.batches.generator.get_state(), "average": self.average.state_dict(),
            "earlier": list(self.earlier), "tuner": self.tuner and self.tuner.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Row) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.generator.set_state(state["batches"])
        self.average.load_state_dict(state["average"])
        self.steps, self.earlier = state["steps"], tuple(state["earlier"])
        if self.tuner:
            self.tuner.load_state_dict(state["tuner"])


@dataclass
class Purse:
    """Trains trials until the budget is spent; records the best model so far."""

    task: str
    price: float
    spent: float = 0.0
    best: float = float("inf")
    trace: list[list[float]] = field(default_factory=list)

    def __call__(self, trial: search.Trial) -> None:
        training = Training(self.task, trial.params, online := trial.online(), trial.seed)
        done = 0
        if (state := trial.load()) is not None:
            training.load_state_dict(state)
            done = training.steps * EPOCHS // training.total
        for epoch in range(done + 1, EPOCHS + 1):
            if self.spent >= TRAININGS:
                raise KeyboardInterrupt
            training.epoch()
            self.spent += self.price / EPOCHS
            valid, weights = training.report()
            if valid < self.best:
                self.best = valid
                self.trace.append([round(self.spent, 4), valid, training.test_error(weights)])
            trial.report(epoch, valid, training.state_dict(), online)


def searched(job: tuple[str, str, str, int]) -> Row:
    """Return a search as a row; its trace has [trainings spent, validation loss, test error] of the best."""
    task, engine, arm, seed = job
    purse = Purse(task, 1.0 if arm == "searched" else cost(task))
    space = SPACE.offline() if arm == "searched" else SPACE
    began = time.perf_counter()
    try:
        search.run(
            purse, space, engine=engine, trials=1000, epochs=EPOCHS, seed=seed, warm_start=arm == "merged"
        )
    except search.Interrupted as stopped:
        trials = len(stopped.result.records)
    return {
        "task": task, "engine": engine, "arm": arm, "index": seed, "trace": purse.trace, "trials": trials,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def compute_cost(task: str, pairs: int = 12) -> None:
    """Measure the time ratio of tuned and plain epochs over full trainings that alternate by epoch."""
    one_thread()
    seconds = np.zeros(2)
    rng = np.random.default_rng(0)
    for n in range(pairs):
        params = {
            "layers": int(rng.integers(1, 4)), "width": int(rng.integers(16, 129)), "activation": "relu",
            **({"optimizer": "sgd", "momentum": 0.9} if n % 2 else {"optimizer": "adam"}),
        }  # fmt: skip
        online = SPACE.tuned(SPACE.starts(params))
        runs = [Training(task, {**params, **SPACE.starts(params)}, space, n) for space in (None, online)]
        for epoch in range(EPOCHS):
            for i in (epoch % 2, 1 - epoch % 2):
                began = time.perf_counter()
                runs[i].epoch()
                seconds[i] += time.perf_counter() - began
        began = time.perf_counter()
        runs[1].tuner.finish()
        seconds[1] += time.perf_counter() - began
    append(ROWS, {"task": task, "arm": COST, "index": 0, "ratio": round(float(seconds[1] / seconds[0]), 3)})


def cost(task: str) -> float:
    """Return the cost of a tuned epoch in plain epochs."""
    return next(r["ratio"] for r in reversed(rows(ROWS)) if (r["task"], r["arm"]) == (task, COST))


def at(trace: list[list[float]], budget: float) -> float:
    """Return the test error of the best model at a budget in trainings; NaN before the first report."""
    seen = [test for spent, _, test in trace if spent <= budget + 1e-9]
    return seen[-1] if seen else float("nan")


def errors(found: list[Row], task: str, engine: str, arm: str, budget: float) -> list[float]:
    """Return the test errors by seed."""
    mine = {r["index"]: r for r in found if (r["task"], r.get("engine"), r["arm"]) == (task, engine, arm)}
    return [at(mine[seed]["trace"], budget) for seed in sorted(mine)]


def table(found: list[Row]) -> str:
    """Print the median test error, merged / searched (seeds where merged is better : worse), and the cost."""
    cells = []
    for task, engine in product(TASKS, ENGINES):
        merged, searched = (
            np.array([errors(found, task, engine, arm, b) for b in BUDGETS]) for arm in ("merged", "searched")
        )
        if merged.size and searched.size:
            both = zip(merged, searched, strict=True)
            cells.append([task, engine, *(_against(*pair) for pair in both)])
    costs = [[t, f"{cost(t):.2f}", f"{1 / cost(t):.2f}"] for t in TASKS if any(r["task"] == t for r in found)]
    heads = (f"{b} training{'s' * (b > 1)}" for b in BUDGETS)
    cost_head = ["task", "time of a tuned epoch over plain", "epochs, merged / searched"]
    return captioned(
        {
            "Median test error, merged / searched (seeds where merged is better : worse)": markdown(
                ["task", "engine", *heads], cells
            ),
            "Cost of a tuned epoch, in untuned ones": markdown(cost_head, costs),
        }
    )


def _against(merged: np.ndarray, searched: np.ndarray) -> str:
    n = min(len(merged), len(searched))
    ours, theirs = (np.nanmedian(x) for x in (merged, searched))
    better, worse = (int((f(merged[:n], searched[:n])).sum()) for f in (np.less, np.greater))
    return f"{ours:.3f} / {theirs:.3f} ({better}:{worse})"


def figure(found: list[Row]) -> None:
    shown = [task for task in TASKS if any(r["task"] == task and r["arm"] != COST for r in found)]
    engines = [engine for engine in ENGINES if any(r.get("engine") == engine for r in found)]
    fig = Figure(figsize=(3.4 * len(shown) + 0.4, 2.6 * len(engines) + 0.4), layout="constrained")
    axes = fig.subplots(len(engines), len(shown), squeeze=False)
    budgets = np.geomspace(1, TRAININGS, 40)
    for (i, engine), (k, task) in product(enumerate(engines), enumerate(shown)):
        axis = axes[i][k]
        for arm, colour in zip(ARMS, ("tab:blue", "tab:cyan", "tab:grey"), strict=True):
            e = np.array([errors(found, task, engine, arm, b) for b in budgets])
            if not e.size:
                continue
            low, mid, high = np.nanquantile(e, (0.25, 0.5, 0.75), axis=1)
            axis.plot(budgets, mid, color=colour, label=arm, lw=2 if arm == "merged" else 1.3)
            axis.fill_between(budgets, low, high, color=colour, alpha=0.15, lw=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(BUDGETS, [str(b) for b in BUDGETS])
        axis.set_yscale("log")
        axis.set_title(f"{task.replace('_', ' ')}, {engine}")
        if i == len(engines) - 1:
            axis.set_xlabel("compute, in plain trainings")
        if k == 0:
            axis.set_ylabel("test error of the best so far")
    handles = {
        label: h for axis in fig.axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    fig.savefig(ROWS.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = parser_of(__doc__, figure=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES[:1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["merged", "searched"])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    if not (options.table or options.figure):
        paid = {row["task"] for row in rows(ROWS) if row["arm"] == COST}
        for task in options.tasks:
            if task not in paid:
                compute_cost(task)
        done = {(r["task"], r.get("engine"), r["arm"], r["index"]) for r in rows(ROWS)}
        jobs = [
            (t, e, a, s)
            for s in range(options.seeds)
            for t in options.tasks
            for e in options.engines
            for a in options.arms
        ]
        compute(ROWS, [job for job in jobs if job not in done], searched, options.workers)
    found = rows(ROWS)
    print(table(found))
    if not options.table:
        figure(found)


if __name__ == "__main__":
    main()
