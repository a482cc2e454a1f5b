"""Fine-tune a small Transformer by LoRA, from random starts of five hyperparameters, tuned and untouched.

    python benchmarks/finetune.py                       # both sizes, all arms; resumes
    python benchmarks/finetune.py --sizes 200 --arms untouched tuned
    python benchmarks/finetune.py --table               # run nothing; print the tables
    python benchmarks/finetune.py --figure              # run nothing; also draw the figure
    python benchmarks/finetune.py --seed 1              # other examples, weights, batches and points

A Transformer on bytes is pretrained here, on the eight sources of `texts.py` with equal weights, and kept
in the user's cache. The task: from which source are 48 bytes? A fifth of the 200 or 2,000 examples is T2,
the validation data; the others are T1. LoRA of rank 8 in all layers and a linear head are trained by AdamW,
in 250 steps with warm-up and linear decay.

Hyperparameters: the lr that the schedule multiplies, weight decay, dropout before LoRA and the head, label
smoothing, and Gaussian noise on the embeddings (NEFTune, Jain et al. 2024, has uniform noise).

arm        what it is
untouched  a random start, without a tuner
tuned      the same start, with `mf.Tuner` and `schedule=5`, as README says of runs of under 400 steps
fixed      32 further random points
TPE        Optuna's TPE and Hyperband; 16 trainings' worth of steps

Starts and fixed points have the same distribution. Every arm trains on T1. It keeps the best on T2 of the
last weights, their average, and an earlier average: "tuned" by `finish`, the others with `mf.Averaged` at
ten moments. The best fixed point is chosen by T2. The test set (2,000 examples) is read once, with the
final weights.

Rows: docs/results/finetune.jsonl.
"""

import copy
import math
import random
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tasks import RESULTS, Batch, Row, compute, endless, finite, one_thread, parser_of, rows
from texts import SOURCES, Block, text
from torch import Tensor, nn

import midflight as mf
from midflight._tensors import Tensors
from midflight.datasets import Shuffled, Split, cache_folder
from midflight.tuner.live import evaluating, weights_at

ROWS = RESULTS / "finetune.jsonl"
SIZES = [200, 2000]
ARMS = {"untouched": 20, "tuned": 20, "fixed": 32, "TPE": 1}
TRAININGS = 16
STEPS, MOMENTS, BATCH, VALID_BATCH, LR = 250, 10, 8, 40, 3e-3
WARM_UP = 0.1
"""Share of the steps."""
LENGTH, TEST = 48, 2000
"""Bytes of an example; examples of the test set."""
WIDTH, LAYERS, HEADS, RANK = 48, 2, 4, 8
PAIRS, TRIPLES = 4093, 8191
"""Embeddings of two and of three bytes in a row, which share them by their number modulo a prime."""
PRETRAINING = 3000
"""Steps of the pretraining, each on two windows of LENGTH bytes from each source."""
RANGES = {
    "lr": mf.default_range("lr"),
    "weight_decay": mf.default_range("decoupled_weight_decay"),
    "dropout": mf.default_range("dropout"),
    "label_smoothing": mf.default_range("label_smoothing"),
    "noise": mf.default_range("noise"),
}
STARTS = {
    "lr": (0.03 * LR, 10 * LR),
    "weight_decay": (1e-4, 1.0),
    "dropout": (0.01, 0.7),
    "label_smoothing": (0.0, 0.5),
    "noise": (0.0, 0.8),
}
"""Limits of all arms' points: uniform in dropout, label smoothing and noise, log-uniform in the others."""
Point = dict[str, float]


class Base(nn.Module):
    """A Transformer that predicts each next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.pairs, self.triples = nn.Embedding(PAIRS, WIDTH), nn.Embedding(TRIPLES, WIDTH)
        for embedding in (self.pairs, self.triples):
            nn.init.normal_(embedding.weight, std=0.1)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(LAYERS)))
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def embedded(self, x: Tensor) -> Tensor:
        pairs = x + 256 * F.pad(x, (1, -1))
        triples = pairs + 256**2 * F.pad(x, (2, -2))
        return self.bytes(x) + self.pairs(pairs % PAIRS) + self.triples(triples % TRIPLES)


class LoRA(nn.Module):
    """Adds up down x to a frozen layer (Hu et al. 2022, Eq. 3), with dropout on x and alpha = 2 rank."""

    def __init__(self, layer: nn.Linear, dropout: nn.Module) -> None:
        super().__init__()
        self.layer, self.dropout = layer, dropout
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.up(self.down(self.dropout(x)))
        return self.layer(x) + 2 * change


class Classifier(nn.Module):
    """The pretrained Transformer with LoRA, and a linear head on the mean of its last states, normalised."""

    def __init__(self, space: mf.Space) -> None:
        super().__init__()
        self.base = Base()
        self.base.load_state_dict(torch.load(pretrained()))
        self.base.requires_grad_(False)
        self.dropout, self.noise = mf.nn.Dropout(space["dropout"]), mf.nn.GaussianNoise(space["noise"])
        for block in self.base.blocks:
            block.qkv, block.out = LoRA(block.qkv, self.dropout), LoRA(block.out, self.dropout)
            for i in (0, 2):
                block.perceptron[i] = LoRA(block.perceptron[i], self.dropout)
        self.head = nn.Linear(WIDTH, len(SOURCES))

    def forward(self, x: Tensor) -> Tensor:
        states = self.base.blocks(self.noise(self.base.embedded(x)))
        logits: Tensor = self.head(self.dropout(F.layer_norm(states.mean(1), (WIDTH,))))
        return logits


@cache
def pretrained() -> Path:
    """Return the file of the pretrained weights; pretrain if there is none."""
    path = cache_folder(None) / "finetune.pt"
    if not path.exists():
        torch.manual_seed(0)
        model, data = Base(), [text(name)["train"] for name in SOURCES]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=PRETRAINING)
        for step in range(PRETRAINING):
            x = torch.cat([windows(source, 2, LENGTH + 1) for source in data])
            logits = model.last(model.norm(model.blocks(model.embedded(x[:, :-1]))))
            loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 99:
                print(
                    f"pretraining: step {step + 1}, {loss.item() / math.log(2):.2f} bits per byte", flush=True
                )
        torch.save(model.state_dict(), path)
    return path


def windows(data: Tensor, count: int, length: int) -> Tensor:
    """Draw windows of a text, shape (count, length)."""
    places = torch.randint(len(data) - length, (count, 1))
    return data[places + torch.arange(length)]


@cache
def data(size: int, seed: int) -> dict[str, Split]:
    """Draw "t1", "t2" and "test", as many examples of each source, from files not used in the pretraining."""
    counts = {"t1": size * 4 // 5, "t2": size // 5, "test": TEST}
    each = [count // len(SOURCES) for count in counts.values()]
    order = torch.Generator().manual_seed(seed)
    found = []
    for name in SOURCES:
        unseen = torch.cat([text(name)["valid"], text(name)["test"]])
        pieces = unseen[: len(unseen) // LENGTH * LENGTH].view(-1, LENGTH)
        found.append(pieces[torch.randperm(len(pieces), generator=order)[: sum(each)]].split(each))
    y = [torch.arange(len(SOURCES)).repeat_interleave(n) for n in each]
    return {part: Split(torch.cat([f[i] for f in found]), y[i]) for i, part in enumerate(counts)}


def start(arm: str, index: int, seed: int) -> Point:
    """Return the point of a fixed run, or the start of a tuned and an untouched one."""
    draw = random.Random(f"{arm == 'fixed'} {index} {seed}")
    return {
        name: math.exp(draw.uniform(math.log(low), math.log(high)))
        if RANGES[name].log
        else draw.uniform(low, high)
        for name, (low, high) in STARTS.items()
    }


def plain(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Training:
    """A fine-tuning from a point, with a tuner or without.

    Attributes:
        best: T2's loss of the best weights so far, last ones or an average, at the moments; without a tuner.
    """

    def __init__(self, size: int, point: Point, seed: int, tuned: bool = False) -> None:
        one_thread()
        self.data = data(size, seed)
        torch.manual_seed(seed)
        specs = {name: mf.Float(**{**vars(spec), "init": point[name]}) for name, spec in RANGES.items()}
        self.space = mf.Space(specs)
        self.model = Classifier(self.space)
        self.weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=point["lr"], weight_decay=point["weight_decay"], fused=True
        )
        warm_up = WARM_UP * STEPS
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda n: min((n + 1) / warm_up, (STEPS - n) / (STEPS - warm_up))
        )
        self.batches = endless(Shuffled(self.data["t1"], BATCH, seed=seed + 1))
        self.average, self.best, self.best_weights = mf.Averaged(), math.inf, dict[str, Tensor]()
        self.tuner = None
        if tuned:
            loaders = (
                Shuffled(self.data["t1"], BATCH, seed=seed + 3),
                Shuffled(self.data["t2"], VALID_BATCH, seed=seed + 2),
            )
            self.tuner = mf.Tuner(
                self.model, self.optimizer, self.space, self.loss, *loaders, valid_loss_fn=plain,
                total_steps=STEPS, schedule=5,
            )  # fmt: skip
        else:
            self.space.requires_grad_(False)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return mf.nn.losses.cross_entropy(
            model(batch[0]), batch[1], label_smoothing=self.space["label_smoothing"]
        )

    def steps(self) -> Iterator[int]:
        """Train, and yield the number of each moment."""
        for n in range(1, STEPS + 1):
            self.optimizer.zero_grad()
            self.loss(self.model, next(self.batches)).backward()
            self.optimizer.step()
            self.schedule.step()
            if not self.tuner:
                self.average.follow(self.weights, n, n / STEPS)
            if n % (STEPS // MOMENTS) == 0:
                if not self.tuner:
                    self._keep_best(self.average.average())
                yield n * MOMENTS // STEPS

    def _keep_best(self, weights: Tensors) -> None:
        if (loss := finite(self.score("t2", weights)[0])) < self.best:
            self.best, self.best_weights = loss, copy.deepcopy(weights)

    def finish(self) -> None:
        """Give the model its best weights by T2."""
        if self.tuner:
            self.tuner.finish()
        else:
            self._keep_best({n: p.detach() for n, p in self.weights.items()})
            with torch.no_grad():
                for name, value in self.best_weights.items():
                    self.weights[name].copy_(value)

    @torch.no_grad()
    def score(self, part: str, weights: Tensors | None = None) -> tuple[float, float]:
        """Return loss and error on a part; at other weights if they are given."""
        x, y = self.data[part].x, self.data[part].y
        with evaluating(self.model), weights_at(self.weights, weights or {}):
            logits = torch.cat([self.model(some) for some in x.split(256)])
        return float(F.cross_entropy(logits, y)), float((logits.argmax(1) != y).float().mean())


def run(job: tuple[int, str, int, int]) -> Row:
    """Run a job (size, arm, index, seed); return its row."""
    size, arm, index, seed = job
    began = time.perf_counter()
    if arm == "TPE":
        training, more = searched(size, seed)
    else:
        training = Training(size, start(arm, index, seed), seed, tuned=arm == "tuned")
        for _ in training.steps():
            pass
        more = {"start": start(arm, index, seed)}
        if training.tuner:
            more |= {name: training.tuner.log()[name] for name in ("restored", "extrapolation")}
    training.finish()
    seconds = time.perf_counter() - began
    (valid, _), (test, error) = training.score("t2"), training.score("test")
    return {
        "task": f"{size} examples", "arm": arm, "index": index, "seed": seed, **more,
        "end": training.space.as_dict(), "valid": valid, "test": test, "error": error,
        "seconds": round(seconds, 2),
    }  # fmt: skip


def searched(size: int, seed: int) -> tuple[Training, dict[str, Any]]:
    """Search by TPE and Hyperband; return the training with the best T2 loss, and what a row stores."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.HyperbandPruner(min_resource=1, max_resource=MOMENTS),
    )
    best: Training | None = None
    spent = trials = 0
    while spent < TRAININGS * MOMENTS:
        trial = study.ask()
        point = {n: trial.suggest_float(n, *limits, log=RANGES[n].log) for n, limits in STARTS.items()}
        training, pruned = Training(size, point, seed), False
        for moment in training.steps():
            spent += 1
            trial.report(training.best, moment)
            if (pruned := trial.should_prune()) or spent == TRAININGS * MOMENTS:
                break
        if pruned:  # its value is the last one that it reported
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, training.best)
        best = min((t for t in (best, training) if t), key=lambda t: t.best)
        trials += 1
    assert best is not None
    return best, {"trials": trials}


def best_fixed(found: list[Row], by: str) -> Row:
    return min((r for r in found if r["arm"] == "fixed"), key=lambda r: finite(r[by]))


def sizes(found: list[Row]) -> dict[str, list[Row]]:
    """Return task -> rows, of those with a tuned and a fixed run."""
    tasks = {f"{size} examples": [r for r in found if r["task"] == f"{size} examples"] for size in SIZES}
    return {task: here for task, here in tasks.items() if {"fixed", "tuned"} <= {r["arm"] for r in here}}


def pairs(found: list[Row]) -> list[tuple[Row, Row]]:
    """Return the untouched and the tuned row of each start that has both."""
    arms = [{r["index"]: r for r in found if r["arm"] == arm} for arm in ("untouched", "tuned")]
    return [(arms[0][i], arms[1][i]) for i in sorted(arms[0].keys() & arms[1].keys())]


def interval(values: list[float]) -> str:
    """Return the median and its 95 % bootstrap interval over the runs."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return f"{median(values):.3f} [{low:.3f}, {high:.3f}]"


def summary(found: list[Row]) -> str:
    """Print the test losses and errors of the arms, and how often a tuned run reaches its goals."""
    lines = [
        "| task | method | test loss, median | worst | test error, median | s |",
        "|---|---|---|---|---|---|",
    ]
    goals = [
        "| task | better than untouched | within 3 % of the best fixed, by T2 "
        "| within 3 % of the best fixed, by test | tuned / untouched |",
        "|---|---|---|---|---|",
    ]
    for task, here in sizes(found).items():
        for arm in ARMS:
            mine = [r for r in here if r["arm"] == arm]
            if mine:
                losses = [finite(r["test"]) for r in mine]
                cell = interval(losses) if len(losses) > 1 else f"{losses[0]:.3f}"
                error, seconds = (median(r[key] for r in mine) for key in ("error", "seconds"))
                lines.append(f"| {task} | {arm} | {cell} | {max(losses):.3f} | {error:.3f} | {seconds:.1f} |")
        both = pairs(here)
        cells = [f"{sum(t['test'] < u['test'] for u, t in both)}/{len(both)}"]
        for by, named in (("valid", "T2"), ("test", "test")):
            best = best_fixed(here, by)
            lines.append(
                f"| {task} | best fixed, by {named} | {best['test']:.3f} | | {best['error']:.3f} | |"
            )
            near = sum(finite(t["test"]) <= 1.03 * best["test"] for _, t in both)
            cells.append(f"{near}/{len(both)}")
        cells.append(interval([finite(t["test"]) / finite(u["test"]) for u, t in both]))
        goals.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *goals])


def figure(found: list[Row], path: Path) -> None:
    """Draw the test loss of each tuned run over that of its untouched twin."""
    whole = sizes(found)
    fig = Figure(figsize=(4.4 * max(1, len(whole)), 4.0), layout="constrained")
    for i, (task, here) in enumerate(whole.items()):
        ax, both = fig.add_subplot(1, len(whole), i + 1), pairs(here)
        untouched, tuned = ([r["test"] for r in side] for side in zip(*both, strict=True))
        ax.plot(untouched, tuned, "o", color="tab:blue", markersize=5)
        ends = min(untouched + tuned), max(untouched + tuned)
        ax.plot(ends, ends, color="0.6", linewidth=1, label="equal")
        best = best_fixed(here, "valid")["test"]
        ax.axhline(best, color="tab:green", linewidth=1.2, label="best of 32 fixed, by T2")
        ax.axhspan(ends[0], 1.03 * best, color="tab:green", alpha=0.15, linewidth=0, label="within 3 %")
        for row in here:
            if row["arm"] == "TPE":
                ax.axhline(
                    row["test"], color="tab:orange", linestyle="--", linewidth=1.2, label="TPE, Hyperband"
                )
        ax.set(title=task, xlabel="test loss, untouched")
        if i == 0:
            ax.set_ylabel("test loss, tuned")
            ax.legend(fontsize=8)
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = parser_of(__doc__, ROWS, figure=True)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=SIZES, help="default: both")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--starts", type=int, default=ARMS["tuned"], help="tuned and untouched runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of examples, weights, batches and points")
    options = parser.parse_args()
    if not (options.table or options.figure):
        pretrained()
        counts = ARMS | dict.fromkeys(("untouched", "tuned"), options.starts)
        done = {(r["task"], r["arm"], r["index"], r["seed"]) for r in rows(options.rows)}
        jobs = [
            (s, arm, i, options.seed)
            for s in options.sizes
            for arm in options.arms
            for i in range(counts[arm])
        ]
        jobs = [job for job in jobs if (f"{job[0]} examples", *job[1:]) not in done]
        compute(options.rows, jobs, run, options.workers)
    found = [r for r in rows(options.rows) if r["seed"] == options.seed]
    print(summary(found))
    if not options.table:
        figure(found, options.rows.with_suffix(".png"))


if __name__ == "__main__":
    main()
