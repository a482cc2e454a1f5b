"""Count the runs that end worse with a tuner than without, from good and from random starts.

    python benchmarks/harm.py                            # all settings; resumes
    python benchmarks/harm.py --sample 200               # a random part of them, drawn with --seed
    python benchmarks/harm.py --tasks digits tabular     # some tasks
    python benchmarks/harm.py --table                    # tables of the stored rows
    python benchmarks/harm.py --figure                   # also the figure

Each setting has two runs of the same weights and batches: one without a tuner, whose hyperparameters stay at
the start, and one with a tuner at its defaults. The losses are those of all of T2, the validation data.

=============  ==================================================================================
task           tabular, digits, mnist_5k, small_cnn (5,000 images)
optimiser      SGD, SGD with momentum, Adam, AdamW, RMSprop
tuned          lr, momentum (beta1), weight_decay, noise, dropout, label_smoothing, lr + decay, all
range          the default of each kind, or a thousand times wider
schedule       constant, cosine, warm-up of 10 % and linear decay
start          0 and 1 are good, 2 to 4 are random in the default range
=============  ==================================================================================

Rows: docs/results/harm.jsonl.
"""

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tasks import (
    RESULTS,
    TASKS,
    Row,
    Task,
    captioned,
    cnn,
    compute,
    endless,
    images,
    markdown,
    parser_of,
    rows,
    splits,
    with_dropout,
)
from torch import Tensor, nn

import midflight as mf
from midflight.datasets import Shuffled
from midflight.tuner.live import evaluating

ROWS = RESULTS / "harm.jsonl"
TASKS["small_cnn"] = Task(partial(images, "mnist", 5000, 2000), cnn, 20, 128, 128)
TASK_NAMES = ["tabular", "digits", "mnist_5k", "small_cnn"]
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "sgd": (torch.optim.SGD, 0.05),
    "sgd_momentum": (partial(torch.optim.SGD, momentum=0.9), 0.02),
    "adam": (torch.optim.Adam, 1e-3),
    "adamw": (torch.optim.AdamW, 1e-3),
    "rmsprop": (torch.optim.RMSprop, 1e-3),
}
"""Optimiser -> how it is made, and a good learning rate."""
TUNED = {
    "lr": ("lr",),
    "momentum": ("momentum",),
    "weight_decay": ("weight_decay",),
    "noise": ("noise",),
    "dropout": ("dropout",),
    "label_smoothing": ("label_smoothing",),
    "lr+decay": ("lr", "weight_decay"),
    "all": ("lr", "momentum", "weight_decay", "noise", "dropout", "label_smoothing"),
}
GOOD = {"momentum": 0.9, "weight_decay": 1e-4, "noise": 0.1, "dropout": 0.1, "label_smoothing": 0.05}
WIDE = {
    "lr": (1e-8, 100.0), "momentum": (5e-4, 0.99999), "weight_decay": (1e-9, 100.0), "noise": (0.0, 800.0),
    "dropout": (1e-5, 0.9998), "label_smoothing": (0.0, 0.9999),
}  # fmt: skip
"""The wide ranges; those that end at 1 are a thousand times wider in odds."""
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "warm_up": lambda done: min(done / 0.1 + 1e-3, (1 - done) / 0.9),
}
WORSE = 1.05


@dataclass(frozen=True)
class Setting:
    """One pair of runs."""

    task: str
    optimizer: str
    tuned: str
    wide: bool
    schedule: str
    start: int
    seed: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(asdict(self).values())


def settings(tasks: list[str], seed: int) -> list[Setting]:
    """Return all settings of these tasks that tune something."""
    found = [
        Setting(*choice, seed=seed)
        for choice in product(tasks, OPTIMIZERS, TUNED, (False, True), SCHEDULES, range(5))
    ]
    return [s for s in found if tuned(s)]


def tuned(setting: Setting) -> list[str]:
    """Return what a setting tunes. SGD and RMSprop have no momentum here, and a regression has no labels."""
    missing = set()
    if setting.optimizer in ("sgd", "rmsprop"):
        missing.add("momentum")
    if TASKS[setting.task].loss is F.mse_loss:
        missing.add("label_smoothing")
    return [name for name in TUNED[setting.tuned] if name not in missing]


def values(setting: Setting) -> dict[str, float]:
    """Return the initial values of all hyperparameters; those that are not tuned are good."""
    found = {"lr": OPTIMIZERS[setting.optimizer][1], **GOOD}
    if setting.start == 1:
        found |= {"lr": 0.3 * found["lr"], "weight_decay": 1e-5, "noise": 0.0, "dropout": 0.02}
    if setting.start > 1:
        units = random.Random(f"{setting.start} {setting.seed}")
        for name in found:
            spec, unit = mf.default_range(name), units.random()
            if name in TUNED[setting.tuned]:
                found[name] = float(spec.transform.value(torch.tensor(unit)))
    return found


class Training:
    """A training under a setting, with or without a tuner."""

    def __init__(self, setting: Setting, tune: bool) -> None:
        task, self.setting = TASKS[setting.task], setting
        self.task = task
        t1, self.t2, _ = splits(setting.task)
        torch.manual_seed(setting.seed)
        start = values(setting)
        names = tuned(setting)
        self.space = mf.Space({name: spec(name, start[name], setting.wide) for name in names})
        self.start = start
        network = with_dropout(task.network(), self.hyperparameter("dropout"))
        self.model = nn.Sequential(mf.nn.GaussianNoise(self.hyperparameter("noise"), floor=0.0), network)
        make, _ = OPTIMIZERS[setting.optimizer]
        adaptive = setting.optimizer in ("adam", "adamw")
        momentum: dict[str, Any] = {}
        if adaptive:
            momentum = {"betas": (start["momentum"], 0.999)}
        elif setting.optimizer == "sgd_momentum":
            momentum = {"momentum": start["momentum"]}
        options = {"lr": start["lr"], "weight_decay": start["weight_decay"], **momentum}
        self.optimizer = make(self.model.parameters(), **options)
        self.batches = endless(Shuffled(t1, task.batch, seed=setting.seed + 1))
        self.steps = task.epochs * (len(t1) // task.batch)
        factor = SCHEDULES[setting.schedule]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: factor(n / self.steps))
        self.tuner = None
        if tune:
            bound = {n: "beta1" if n == "momentum" and adaptive else n for n in names}
            size = task.valid_batch
            self.tuner = mf.Tuner(
                self.model, self.optimizer, self.space, self.loss,
                Shuffled(t1, min(size, len(t1)), seed=setting.seed + 3),
                Shuffled(self.t2, size, seed=setting.seed + 2), valid_loss_fn=self.plain_loss,
                bind={n: o for n, o in bound.items() if n in ("lr", "momentum", "weight_decay")},
                total_steps=self.steps,
            )  # fmt: skip
        else:
            self.space.requires_grad_(False)

    def hyperparameter(self, name: str) -> Any:
        return self.space[name] if name in self.space else self.start[name]

    def plain_loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return self.task.loss(model(x), y)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        if self.task.loss is F.mse_loss:
            return F.mse_loss(model(x), y)
        return mf.nn.losses.cross_entropy(model(x), y, label_smoothing=self.hyperparameter("label_smoothing"))

    def run(self) -> tuple[float, float]:
        """Train; return the validation loss of the last weights and of the finished ones."""
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            self.loss(self.model, next(self.batches)).backward()
            self.optimizer.step()
            self.scheduler.step()
        last = self.valid_loss()
        if self.tuner is not None:
            self.tuner.finish()
        return last, self.valid_loss()

    @torch.no_grad()
    def valid_loss(self) -> float:
        with evaluating(self.model):
            return float(self.plain_loss(self.model, (self.t2.x, self.t2.y)))


def spec(name: str, init: float, wide: bool) -> mf.Float:
    """Return the range of a hyperparameter."""
    usual = mf.default_range(name)
    low, high = WIDE[name] if wide else (usual.low, usual.high)
    return replace(usual, low=min(low, init), high=max(high, init), init=init)


def pair(setting: Setting) -> Row:
    """Run a setting without and with a tuner; return its row."""
    without, _ = Training(setting, tune=False).run()
    with_tuner = Training(setting, tune=True)
    last, finished = with_tuner.run()
    assert with_tuner.tuner is not None
    log = with_tuner.tuner.log()
    return {
        **asdict(setting), "index": setting.start, "untouched": without, "last": last, "finish": finished,
        "restored": log["restored"], "values": with_tuner.space.as_dict(),
    }  # fmt: skip


def summary(found: list[Row]) -> str:
    """Print how many runs end worse than untouched, by tuned hyperparameter, and by task and seed."""
    worse = ["pairs", "newly not finite", "finished over 5 % worse", "last over 5 % worse"]
    tuned = [(name, [r for r in found if r["tuned"] == name]) for name in TUNED]
    by_tuned = [[name, *_worse(of), *_medians(of)] for name, of in [*tuned, ("together", found)] if of]
    seeds = sorted({(r["seed"], r["task"]) for r in found})
    by_seed = [
        [task, seed, *_worse([r for r in found if (r["seed"], r["task"]) == (seed, task)])]
        for seed, task in seeds
    ]
    medians = ["median, good starts", "median, others"]
    return captioned(
        {
            "By tuned hyperparameter": markdown(["tuned", *worse, *medians], by_tuned),
            "By task": markdown(["task", "seed", *worse], by_seed),
        }
    )


def _worse(rows: list[Row]) -> list[int]:
    newly = sum(finite(r["untouched"]) and not finite(r["last"]) for r in rows)
    return [len(rows), newly, *(sum(is_worse(r, end) for r in rows) for end in ("finish", "last"))]


def _medians(rows: list[Row]) -> list[str]:
    kinds = ([ratio(r) for r in rows if (r["start"] < 2) == good] for good in (True, False))
    return [f"{sorted(x)[len(x) // 2]:.3f}" if x else "" for x in kinds]


def finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def is_worse(row: Row, end: str) -> bool:
    return finite(row["untouched"]) and not (finite(row[end]) and row[end] <= WORSE * row["untouched"])


def ratio(row: Row) -> float:
    """Return the finished loss over the untouched one; 0 if only the untouched one is not finite."""
    if not finite(row["untouched"]):
        return 0.0 if finite(row["finish"]) else 1.0
    return row["finish"] / row["untouched"] if finite(row["finish"]) else math.inf


def figure(found: list[Row], path: Path) -> None:
    """Draw the finished loss of each pair over the untouched one, per tuned hyperparameter."""
    fig = Figure(figsize=(9, 3.6), layout="constrained")
    ax = fig.add_subplot()
    for x, name in enumerate(TUNED):
        for side, good in ((-0.15, True), (0.15, False)):
            chosen = [
                min(20.0, max(0.02, ratio(r)))
                for r in found
                if r["tuned"] == name and (r["start"] < 2) == good
            ]
            places = [x + side + 0.2 * (random.Random(i).random() - 0.5) for i in range(len(chosen))]
            ax.plot(
                places,
                chosen,
                ".",
                color="tab:blue" if good else "0.6",
                markersize=3,
                label=("good starts" if good else "random starts") if x == 0 else None,
            )
    ax.axhline(WORSE, color="tab:red", linewidth=0.8, label="5 % worse")
    ax.set_yscale("log")
    ax.set_xticks(range(len(TUNED)), list(TUNED), rotation=20)
    ax.set_ylabel("finished over untouched loss")
    ax.legend(fontsize=7)
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = parser_of(__doc__, ROWS, figure=True)
    parser.add_argument("--tasks", nargs="+", choices=TASK_NAMES, default=TASK_NAMES, help="default: all")
    parser.add_argument("--tuned", nargs="+", choices=list(TUNED), default=list(TUNED), help="default: all")
    parser.add_argument("--sample", type=int, help="how many settings, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches, starts and sample")
    options = parser.parse_args()
    if not (options.table or options.figure):
        chosen = [s for s in settings(options.tasks, options.seed) if s.tuned in options.tuned]
        random.Random(options.seed).shuffle(chosen)
        done = {tuple(row[k] for k in asdict(chosen[0])) for row in rows(options.rows)}
        compute(
            options.rows, [s for s in chosen[: options.sample] if s.key not in done], pair, options.workers
        )
    found = rows(options.rows)
    print(summary(found))
    if not options.table:
        figure(found, options.rows.with_suffix(".png"))


if __name__ == "__main__":
    main()
