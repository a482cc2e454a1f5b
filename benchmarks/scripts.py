"""Train scripts of the usual kinds without and with a tuner; compare their losses and times.

    python benchmarks/scripts.py                    # a quarter of an hour; resumes
    python benchmarks/scripts.py --scripts mnist gpt
    python benchmarks/scripts.py --table            # the stored rows

=========  ===================================================  ==========================  =========
script     what it is like                                      tuned                       loss on
=========  ===================================================  ==========================  =========
mnist      PyTorch's example: CNN, Adadelta, StepLR             lr, weight decay            test data
word_lm    PyTorch's example: LSTM, SGD, clipping, dropout      lr, dropout                 test data
gpt        nanoGPT: lr by hand with warm-up, accumulation,      lr, weight decay,           test data
           clipping, bfloat16, groups without decay             dropout
timm       timm's NativeScaler: GradScaler, clipping, cosine    lr, weight decay,           test data
                                                                label smoothing
lightning  `examples/lightning_digits.py`                       lr, weight decay, noise     T2
hf         `examples/hf_text.py`                                lr, weight decay, dropout   T2
skorch     `examples/skorch_digits.py`                          lr, weight decay, noise     test data
=========  ===================================================  ==========================  =========

A script is trained without and with the tuner, one after the other, with the same seed. It adds the space,
one call before an unchanged loop, and `finish` after it. The time is that of the tuned training over the
other, without imports. Rows: docs/results/scripts.jsonl.
"""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from recipes import text
from tasks import RESULTS, Row, compute, images, parser_of, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
ROWS = RESULTS / "scripts.jsonl"
SEEDS = 3


def loaders(
    kind: str, train: int, batch: int
) -> tuple[DataLoader[Any], DataLoader[Any], tuple[Tensor, Tensor]]:
    """Return loaders of T1 and T2, and the test data, of images."""
    t1, t2, test = images(kind, train, 2000)
    parts = [TensorDataset(part.x.view(-1, 1, 28, 28), part.y) for part in (t1, t2)]
    return (
        DataLoader(parts[0], batch, shuffle=True),
        DataLoader(parts[1], batch, shuffle=True),
        (test.x.view(-1, 1, 28, 28), test.y),
    )


class Net(nn.Module):
    """The network of PyTorch's MNIST example, of half the width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(32 * 144, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = F.relu(self.fc1(torch.flatten(self.dropout1(x), 1)))
        return F.log_softmax(self.fc2(self.dropout2(x)), dim=1)


def nll(model: nn.Module, batch: Any) -> Tensor:
    return F.nll_loss(model(batch[0]), batch[1])


def mnist(tune: bool) -> float:
    epochs = 4
    train_loader, valid_loader, test = loaders("mnist", 3000, 64)
    model = Net()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    space = mf.Space(
        lr=mf.Float(1e-2, 10.0, log=True, init=1.0),
        weight_decay=mf.Float(1e-6, 1e-2, log=True, init=1e-5),
    )
    tuner = tune and mf.Tuner(
        model, optimizer, space, nll, train_loader, valid_loader, total_steps=epochs * len(train_loader)
    )
    for _ in range(epochs):
        model.train()
        for data, target in train_loader:
            optimizer.zero_grad()
            F.nll_loss(model(data), target).backward()
            optimizer.step()
        scheduler.step()
    return ended(tuner, model, lambda: nll(model, test))


class RNN(nn.Module):
    """The model of PyTorch's word language model, on characters."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.drop, self.encoder = dropout, nn.Embedding(128, 64)
        self.rnn, self.decoder = nn.LSTM(64, 64, batch_first=True), nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.drop(self.rnn(self.drop(self.encoder(x)))[0]))


def next_token(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def word_lm(tune: bool) -> float:
    epochs = 6
    t1, held_out = text()
    t2, test = ((held_out.x[part], held_out.y[part]) for part in (slice(0, 500), slice(500, None)))
    space = mf.Space(lr=mf.Float(0.1, 50.0, log=True, init=5.0), dropout=mf.Float(0.0, 0.6, init=0.2))
    model = RNN(mf.nn.Dropout(space["dropout"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    train_loader = DataLoader(TensorDataset(t1.x, t1.y), 20, shuffle=True)
    valid_loader = DataLoader(TensorDataset(*t2), 20, shuffle=True)
    tuner = tune and mf.Tuner(
        model,
        optimizer,
        space,
        next_token,
        train_loader,
        valid_loader,
        total_steps=epochs * len(train_loader),
    )
    for _ in range(epochs):
        model.train()
        for batch in train_loader:
            optimizer.zero_grad()
            next_token(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
    return ended(tuner, model, lambda: next_token(model, test))


class GPT(nn.Module):
    """A small decoder on characters."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(128, 64), nn.Embedding(32, 64)
        self.drop = dropout
        self.blocks = nn.ModuleList(GPTBlock(dropout) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 128, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.tokens(x) + self.places.weight[: x.shape[1]])
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class GPTBlock(nn.Module):
    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.drop = nn.LayerNorm(64), nn.LayerNorm(64), dropout
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.drop(self.out(mixed))
        return x + self.drop(self.mlp(self.norm2(x)))


def gpt(tune: bool) -> float:
    max_iters, warmup, learning_rate, min_lr, accumulate = 400, 40, 1e-3, 1e-4, 2
    t1, held_out = text()
    t2, test = ((held_out.x[part], held_out.y[part]) for part in (slice(0, 500), slice(500, None)))
    space = mf.Space(
        lr=mf.default_range("lr", init=learning_rate),
        weight_decay=mf.default_range("decoupled_weight_decay", init=0.1),
        dropout=mf.Float(0.0, 0.6, init=0.05),
    )
    model = GPT(mf.nn.Dropout(space["dropout"]))
    weights = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return next_token(model, batch)

    def get_batch() -> tuple[Tensor, Tensor]:
        rows_of = torch.randint(len(t1.x), (16,))
        return t1.x[rows_of], t1.y[rows_of]

    def get_lr(it: int) -> float:
        if it < warmup:
            return learning_rate * (it + 1) / (warmup + 1)
        ratio = 0.5 * (1 + math.cos(math.pi * (it - warmup) / (max_iters - warmup)))
        return min_lr + ratio * (learning_rate - min_lr)

    train_loader = DataLoader(TensorDataset(t1.x, t1.y), 16, shuffle=True)
    valid_loader = DataLoader(TensorDataset(*t2), 32, shuffle=True)
    tuner = tune and mf.Tuner(
        model, optimizer, space, loss_fn, train_loader, valid_loader, total_steps=max_iters
    )
    model.train()
    for it in range(max_iters):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(it)
        for _ in range(accumulate):
            (loss_fn(model, get_batch()) / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return ended(tuner, model, lambda: next_token(model, test))


class NativeScaler:
    """What timm calls in place of `backward` and `step`."""

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu")

    def __call__(self, loss: Tensor, optimizer: torch.optim.Optimizer, clip: float, parameters: Any) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        self.scaler.step(optimizer)
        self.scaler.update()


def timm(tune: bool) -> float:
    epochs = 4
    train_loader, valid_loader, test = loaders("fashion_mnist", 4000, 64)
    layers = nn.Conv2d(1, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 36, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss_scaler = NativeScaler()
    space = mf.Space(
        lr=mf.default_range("lr", init=1e-3),
        weight_decay=mf.default_range("decoupled_weight_decay", init=0.05),
        label_smoothing=mf.Float(0.0, 0.5, init=0.1),
    )

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return mf.nn.losses.cross_entropy(
            model(batch[0]), batch[1], label_smoothing=space["label_smoothing"] if model.training else 0.0
        )

    tuner = tune and mf.Tuner(model, optimizer, space, loss_fn, train_loader, valid_loader, total_steps=steps)
    for _ in range(epochs):
        model.train()
        for batch in train_loader:
            optimizer.zero_grad()
            loss_scaler(loss_fn(model, batch), optimizer, clip=1.0, parameters=model.parameters())
            scheduler.step()
    return ended(tuner, model, lambda: loss_fn(model, test))


def ended(tuner: Any, model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Return the loss of the finished model."""
    if tuner:
        tuner.finish()
    model.eval()
    with torch.no_grad():
        return float(loss())


def example(name: str, length: int, tune: bool, seed: int) -> float:
    """Return the loss at the end of an example, whose quick form is `length` long."""
    import importlib
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return float(importlib.import_module(name).train(length, tune=tune, seed=seed)[1])


SCRIPTS: dict[str, Callable[..., float]] = {
    "mnist": mnist,
    "word_lm": word_lm,
    "gpt": gpt,
    "timm": timm,
    "lightning": partial(example, "lightning_digits", 80),
    "hf": partial(example, "hf_text", 300),
    "skorch": partial(example, "skorch_digits", 100),
}


def run(job: tuple[str, int]) -> Row:
    """Train a script without and with the tuner; return its row."""
    name, seed = job
    script = SCRIPTS[name]
    more = {"seed": seed} if isinstance(script, partial) else {}
    if more:
        partial(script.func, script.args[0], 2)(tune=False, seed=seed)  # imports, first calls
    found: Row = {"task": name, "index": seed, "seed": seed}
    for tune in (False, True):
        torch.manual_seed(seed)
        began = time.perf_counter()
        found["tuned" if tune else "untouched"] = script(tune=tune, **more)
        found["seconds_tuned" if tune else "seconds_untouched"] = time.perf_counter() - began
    return found


def summary(found: list[Row]) -> str:
    lines = [
        "| script | seeds | loss, untouched | loss, tuned | tuned / untouched, each seed | time |",
        "|---|---|---|---|---|---|",
    ]
    for name in SCRIPTS:
        if not (here := sorted((r for r in found if r["task"] == name), key=lambda r: r["seed"])):
            continue
        plain, tuned = (sum(r[arm] for r in here) / len(here) for arm in ("untouched", "tuned"))
        ratios = ", ".join(f"{r['tuned'] / r['untouched']:.2f}" for r in here)
        times = sorted(r["seconds_tuned"] / r["seconds_untouched"] for r in here)
        lines.append(
            f"| {name} | {len(here)} | {plain:.3f} | {tuned:.3f} | {ratios} | {times[len(times) // 2]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, ROWS)
    parser.set_defaults(workers=1)
    parser.add_argument(
        "--scripts", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS), help="default: all"
    )
    options = parser.parse_args()
    if not options.table:
        done = {(r["task"], r["seed"]) for r in rows(options.rows)}
        jobs = [(name, seed) for seed in range(SEEDS) for name in options.scripts]
        compute(options.rows, [job for job in jobs if job not in done], run, options.workers)
    print(summary(rows(options.rows)))


if __name__ == "__main__":
    main()
