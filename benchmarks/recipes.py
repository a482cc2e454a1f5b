"""Tune ordinary recipes from 10 starts, and compare with the best of 32 fixed runs.

    python benchmarks/recipes.py                           # all recipes; resumes
    python benchmarks/recipes.py --models mlp --optimizers adamw
    python benchmarks/recipes.py --table                   # table of the stored rows
    python benchmarks/recipes.py --figure                  # also the figure
    python benchmarks/recipes.py --seed 1                  # other weights, batches and starts

=========  =========================================================================================
model      mlp (5,000 images of MNIST), cnn (5,000 of Fashion-MNIST, randomly shifted and mirrored),
           transformer (characters of Python's standard library)
optimiser  AdamW, SGD with momentum 0.9
schedule   constant, cosine, one-cycle
tuned      lr, weight decay, dropout, label smoothing
=========  =========================================================================================

Fixed runs and starts are Sobol points in the default ranges; SGD's lr goes up to 1. Runs of a recipe share
weights and batches. Losses are plain cross-entropies on all of T2, the validation data. A tuned run ends
with `tuner.finish()`. A fixed run ends with its last weights; the last column compares with the best of 20
moments of each.

Rows: docs/results/recipes.jsonl.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tasks import RESULTS, Batch, Row, cnn, compute, endless, finite, images, parser_of, rows, with_dropout
from torch import Tensor, nn

import midflight as mf
from midflight.datasets import Shuffled, Split
from midflight.study.arm import mlp
from midflight.tuner.live import evaluating

ROWS = RESULTS / "recipes.jsonl"
STEPS, MOMENTS = 800, 20
FIXED, STARTS = 32, 10
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
Scheduler = torch.optim.lr_scheduler.LRScheduler
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, float], Scheduler | None]] = {
    "constant": lambda optimizer, lr: None,
    "cosine": lambda optimizer, lr: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
    "one_cycle": lambda optimizer, lr: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=STEPS + 1
    ),
}


class Block(nn.Module):
    """A block of a Transformer with 4 heads and width 48."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(48), nn.LayerNorm(48)
        self.qkv, self.out, self.dropout = nn.Linear(48, 144), nn.Linear(48, 48), dropout
        self.mlp = nn.Sequential(nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.before(x)).view(b, t, 3, 4, 12).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(heads.transpose(1, 2).reshape(b, t, 48)))
        return x + self.dropout(self.mlp(self.between(x)))


class Transformer(nn.Module):
    """A language model of 128 characters, 32 at a time."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(128, 48), nn.Embedding(32, 48)
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 128))

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.blocks(self.tokens(x) + places))


def text() -> tuple[Split, Split]:
    """Load sequences of 33 characters, 3,000 to train and 1,000 to validate."""
    names = ("argparse", "ast", "collections", "csv", "dataclasses", "enum", "functools", "inspect", "typing")
    code = "".join(inspect.getsource(import_module(name)) for name in names)
    rows_of = torch.tensor([min(ord(c), 127) for c in code[: 33 * 4000]]).view(4000, 33)
    return Split(rows_of[:3000, :-1], rows_of[:3000, 1:]), Split(rows_of[3000:, :-1], rows_of[3000:, 1:])


def augmented(x: Tensor) -> Tensor:
    """Shift each batch of images by up to two pixels and mirror half of them."""
    pictures = x.view(-1, 28, 28)
    shift = torch.randint(-2, 3, (2,)).tolist()
    pictures = torch.roll(pictures, shift, (1, 2))
    return torch.where(torch.rand(len(x), 1, 1) < 0.5, pictures.flip(2), pictures).reshape(x.shape)


DATA: dict[str, Callable[[], tuple[Split, ...]]] = {
    "mlp": lambda: images("mnist", 5000, 2000)[:2],
    "cnn": lambda: images("fashion_mnist", 5000, 2000)[:2],
    "transformer": text,
}
NETWORKS: dict[str, Callable[[mf.Hyperparameter], nn.Module]] = {
    "mlp": lambda rate: with_dropout(mlp(784, [200, 200], 10), rate),
    "cnn": lambda rate: with_dropout(cnn(), rate),
    "transformer": lambda rate: Transformer(mf.nn.Dropout(rate)),
}
BATCH = {"mlp": 128, "cnn": 128, "transformer": 16}


@cache
def data(model: str) -> tuple[Split, ...]:
    return DATA[model]()


def ranges(optimizer: str) -> dict[str, mf.Float]:
    decay = "decoupled_weight_decay" if optimizer == "adamw" else "weight_decay"
    return {
        "lr": mf.default_range("lr", high=0.1 if optimizer == "adamw" else 1.0),
        "weight_decay": mf.default_range(decay),
        "dropout": mf.default_range("dropout"),
        "label_smoothing": mf.default_range("label_smoothing"),
    }


def values(optimizer: str, tuned: bool, index: int, seed: int) -> dict[str, float]:
    """Return the Sobol point of a fixed run or of a start."""
    count, engine = (STARTS, 100 + seed) if tuned else (FIXED, 2)
    units = torch.quasirandom.SobolEngine(4, scramble=True, seed=engine).draw(count)[index]
    return {
        name: float(spec.transform.value(unit))
        for (name, spec), unit in zip(ranges(optimizer).items(), units, strict=True)
    }


def run(job: tuple[str, str, str, bool, int, int]) -> Row:
    """Train one recipe, fixed or tuned; return its row."""
    name, optimizer_name, schedule, tuned, index, seed = job
    t1, t2 = data(name)
    at = values(optimizer_name, tuned, index, seed)
    torch.manual_seed(seed)
    space = mf.Space({n: replace(s, init=at[n]) for n, s in ranges(optimizer_name).items()})
    model = NETWORKS[name](space["dropout"])
    optimizer = OPTIMIZERS[optimizer_name](model.parameters(), lr=at["lr"], weight_decay=at["weight_decay"])
    scheduler = SCHEDULES[schedule](optimizer, at["lr"])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        logits = model(augmented(x) if name == "cnn" and model.training else x)
        return mf.nn.losses.cross_entropy(
            logits.flatten(0, -2), y.flatten(), label_smoothing=space["label_smoothing"]
        )

    def plain(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    @torch.no_grad()
    def valid_loss() -> float:
        with evaluating(model):
            return float(plain(model, (t2.x, t2.y)))

    tuner, size = None, BATCH[name]
    if tuned:
        t2_size = 128 if name == "transformer" else size
        loaders = Shuffled(t1, size, seed=seed + 3), Shuffled(t2, t2_size, seed=seed + 2)
        tuner = mf.Tuner(model, optimizer, space, loss, *loaders, valid_loss_fn=plain, total_steps=STEPS)
    else:
        space.requires_grad_(False)
    batches, best = endless(Shuffled(t1, size, seed=seed + 1)), math.inf
    for n in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss(model, next(batches)).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        if not tuned and n % (STEPS // MOMENTS) == 0:
            best = min(best, finite(valid_loss()))
    last = valid_loss()
    if tuner:
        tuner.finish()
        best = valid_loss()
    return {
        "task": name, "optimizer": optimizer_name, "schedule": schedule, "tuned": tuned,
        "arm": f"{optimizer_name} {schedule} {'tuned' if tuned else 'fixed'}", "index": index, "seed": seed,
        "start": at, "end": space.as_dict(), "last": last, "finish": best,
        "restored": tuner.log()["restored"] if tuner else 0,
    }  # fmt: skip


Recipe = tuple[str, str, str]


def complete(found: list[Row]) -> dict[Recipe, tuple[list[Row], list[Row]]]:
    """Return recipe -> (fixed rows, tuned rows) of the recipes that have all rows."""
    result = {}
    for recipe in product(DATA, OPTIMIZERS, SCHEDULES):
        here = [r for r in found if (r["task"], r["optimizer"], r["schedule"]) == recipe]
        fixed, tuned = ([r for r in here if r["tuned"] == kind] for kind in (False, True))
        if len(fixed) == FIXED and len(tuned) == STARTS:
            result[recipe] = fixed, tuned
    return result


def summary(found: list[Row]) -> str:
    """Print per recipe how close tuned runs end to the best fixed one."""
    lines = [
        "| model | optimiser | schedule | best of 32 fixed | fixed, median | tuned, median | tuned, worst | "
        "within 5 % | within 10 % | all finished, within 5 % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, (fixed, tuned) in complete(found).items():
        plain = sorted(finite(r["last"]) for r in fixed)
        ends = sorted(finite(r["finish"]) for r in tuned)
        best, best_finished = plain[0], min(r["finish"] for r in fixed)
        near, nearer, all_near = (
            sum(e <= f for e in ends) for f in (1.1 * best, 1.05 * best, 1.05 * best_finished)
        )
        lines.append(
            f"| {' | '.join(recipe)} | {best:.4f} | {plain[FIXED // 2]:.4f} | {ends[STARTS // 2]:.4f} | "
            f"{ends[-1]:.4f} | {nearer}/{STARTS} | {near}/{STARTS} | {all_near}/{STARTS} |"
        )
    return "\n".join(lines)


def figure(found: list[Row], path: Path) -> None:
    """Draw the fixed and the tuned losses of each recipe, over the best fixed one."""
    whole = complete(found)
    if not whole:
        return
    fig = Figure(figsize=(1.5 + 0.55 * len(whole), 4), layout="constrained")
    ax = fig.add_subplot()
    for x, (fixed, tuned) in enumerate(whole.values()):
        best = min(finite(r["last"]) for r in fixed)
        for chosen, end, side, colour, label in (
            (fixed, "last", -0.15, "0.6", "fixed"),
            (tuned, "finish", 0.15, "tab:blue", "tuned"),
        ):
            ends = [min(10.0, finite(r[end]) / best) for r in chosen]
            ax.plot([x + side] * len(ends), ends, ".", color=colour, markersize=4, label=None if x else label)
    ax.axhspan(0.9, 1.05, color="tab:green", alpha=0.2, label="best fixed, + 5 %")
    ax.set_yscale("log")
    ax.set_xticks(range(len(whole)), ["\n".join(recipe) for recipe in whole], fontsize=6, rotation=60)
    ax.set_ylabel("validation loss over the best fixed run's")
    ax.legend(fontsize=7)
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = parser_of(__doc__, ROWS, figure=True)
    parser.add_argument("--models", nargs="+", choices=list(DATA), default=list(DATA), help="default: all")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and starts")
    options = parser.parse_args()
    if not (options.table or options.figure):
        done = {
            (r["task"], r["optimizer"], r["schedule"], r["tuned"], r["index"], r["seed"])
            for r in rows(options.rows)
        }
        jobs = [
            (*recipe, tuned, index, options.seed)
            for recipe in product(options.models, options.optimizers, options.schedules)
            for tuned, count in ((False, FIXED), (True, STARTS))
            for index in range(count)
        ]
        compute(options.rows, [job for job in jobs if job not in done], run, options.workers)
    found = [r for r in rows(options.rows) if r["seed"] == options.seed]
    print(summary(found))
    if not options.table:
        figure(found, options.rows.with_suffix(".png"))


if __name__ == "__main__":
    main()
