"""Compare ways to set the weights of eight sources of text, for a small Transformer and a target text.

    python benchmarks/mixture.py                         # everything; resumes
    python benchmarks/mixture.py --pairs german/scarce --arms midflight uniform
    python benchmarks/mixture.py --workers 2
    python benchmarks/mixture.py --agreement             # cosine of each rule's direction with the true one
    python benchmarks/mixture.py --table                 # run nothing; print the tables
    python benchmarks/mixture.py --figure                # run nothing; draw the figures

Sources: Debian's manual pages in six languages (apt-get downloads the packages and installs none), the source
code of Python's standard library, and the C++ headers of torch. Targets: German pages (one of the sources),
Dutch pages (none of them), and a blend of Python code and French pages. Files are split by name: a tenth is
T2, a tenth the test set. Regimes: "ample" has up to 8 MB of a source,
"scarce" 0.2 % of that, at most 16 kB.

Model: a Transformer on bytes with 1.07 million weights; AdamW with warm-up, cosine schedule and clipping. All
arms of a pair share initial weights, and draw 1,024 bytes a step by their weights.

arm         weights of the sources
uniform     equal
natural     proportional to their sizes
midflight   `mf.Mixture` with its defaults, one run
FastMix     Tan et al. 2026; its step is a first guess, as that of DGA is
DGA         Fan et al. 2024
DoReMi      Xie et al. 2023: a reference model, a proxy, and the final run; three trainings
TPE         the best of 16 static mixtures on T2, proposed by Optuna; 16 trainings

T2 has 16 kB, and tunes and chooses. The test loss, in bits per byte, is read once, of the last weights.
Rows: docs/results/mixture.jsonl.
"""

import argparse
import copy
import gzip
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mixture_rules import Alignment, DoReMi, FastMix, Fixed, alignments
from tasks import RESULTS, Row, append, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import midflight as mf
from midflight._reporting.machine import machine
from midflight.datasets import _cache_folder

ROWS = RESULTS / "mixture.jsonl"
LANGUAGES = {
    "english": "manpages", "german": "manpages-de", "french": "manpages-fr", "spanish": "manpages-es",
    "polish": "manpages-pl", "italian": "manpages-it", "dutch": "manpages-nl", "swedish": "manpages-sv",
}  # fmt: skip
SOURCES = ["english", "german", "french", "spanish", "polish", "italian", "python", "c++"]
TARGETS = {"german": ["german"], "dutch": ["dutch"], "blend": ["python", "french"], "swedish": ["swedish"]}
"""Name -> texts of the target; swedish is for choosing the steps of other rules, the rest are reported."""
REGIMES = {"ample": 1.0, "scarce": 0.002}
"""Share of each source that there is."""
MOST = 8_000_000
"""Bytes of a text that are kept."""
PAIRS = [f"{target}/{regime}" for target in ("german", "dutch", "blend") for regime in REGIMES]
ARMS = ["uniform", "natural", "midflight", "FastMix", "DGA", "DoReMi", "TPE"]
TRAININGS = 16
CONTEXT, BATCH, STEPS, LR = 64, 16, 250, 3e-3
VALID_BYTES, TEST_BYTES = 16_384, 65_536
OF_EACH = 4
"""Windows of each source in an update of FastMix, DGA and DoReMi."""
FASTMIX_LR, DGA_LR = 0.1, 3.0
"""First guesses; to be chosen on swedish/ample and swedish/scarce, which are not reported."""


@cache
def text(name: str) -> dict[str, Tensor]:
    """Return "train", "valid" and "test" of a text as bytes, its files in a fixed order."""
    path = _cache_folder(None) / "texts" / f"{name}.npz"
    if not path.exists():
        parts: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
        for file, content in sorted(_files(name), key=lambda pair: sha256(pair[0].encode()).digest()):
            place = sha256(file.encode()).digest()[0] % 10
            parts[{0: "valid", 1: "test"}.get(place, "train")].append(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {part: np.frombuffer(b"\n".join(all_), np.uint8) for part, all_ in parts.items()}
        np.savez_compressed(path, **{part: array[:MOST] for part, array in arrays.items()})
    return {part: torch.from_numpy(array.astype(np.int64)) for part, array in np.load(path).items()}


def _files(name: str) -> list[tuple[str, bytes]]:
    """Return (name, content) of the files of a text."""
    if name in LANGUAGES:
        with TemporaryDirectory() as folder:
            subprocess.run(
                ["apt-get", "download", LANGUAGES[name]], cwd=folder, check=True, capture_output=True
            )
            (package,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
            found = Path(folder).glob("usr/share/man/**/*.gz")
            return [
                (path.name, gzip.decompress(path.read_bytes())) for path in found if not path.is_symlink()
            ]
    if name == "python":
        folder, pattern = Path(sysconfig.get_paths()["stdlib"]), "*.py"
    else:
        folder, pattern = Path(torch.__file__).parent / "include/ATen", "*.h"
    return [(path.name, path.read_bytes()) for path in folder.glob(pattern)]


class Windows(Dataset[tuple[Tensor]]):
    """Pieces of a text, each with CONTEXT bytes and the next one."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __len__(self) -> int:
        return (len(self.data) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.data[index * CONTEXT : (index + 1) * CONTEXT + 1],)


class Problem:
    """Sources, T2 and test set of a pair."""

    def __init__(self, pair: str) -> None:
        target, regime = pair.split("/")
        texts = [text(name) for name in TARGETS[target]]
        all_ = [text(name)["train"] for name in SOURCES]
        self.sources = [Windows(data[: int(REGIMES[regime] * len(data))]) for data in all_]
        self.valid = Windows(torch.cat([t["valid"][: VALID_BYTES // len(texts)] for t in texts]))
        self.test = Windows(torch.cat([t["test"][: TEST_BYTES // len(texts)] for t in texts]))


class Block(nn.Module):
    """A layer of the Transformer: attention, then a perceptron, each after a normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(self.before(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.perceptron(self.between(x))


class Transformer(nn.Module):
    """Predicts each next byte."""

    def __init__(self, width: int = 128, layers: int = 5, heads: int = 4) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1]))
        logits: Tensor = self.last(self.norm(self.blocks(self.bytes(x) + places)))
        return logits


def losses_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the loss of each window, the mean over its bytes, shape (n,)."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)


def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return losses_of(model, batch[0]).mean()


@torch.no_grad()
def bits(model: nn.Module, data: Windows) -> float:
    """Return the mean loss in bits per byte."""
    model.eval()
    found = [losses_of(model, batch) for (batch,) in DataLoader(data, 128)]
    model.train()
    return float(torch.cat(found).mean() / np.log(2))


class Run:
    """A training, whose steps draw the sources by `mixture`."""

    def __init__(self, problem: Problem, seed: int, steps: int = STEPS) -> None:
        torch.manual_seed(seed)
        self.problem, self.steps = problem, steps
        self.model = Transformer()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.1, fused=True)
        warm_up = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda n: min((n + 1) / warm_up, 0.5 + 0.5 * np.cos(np.pi * min(1.0, n / steps))),
        )
        self.mixture = mf.Mixture(SOURCES, ratio=1e6)
        self.history: list[list[float]] = []

    def train(self, rule: Any = None) -> None:
        """Train; a rule sets the weights and moves them every `rule.every` steps."""
        if rule is not None:
            self.mixture.set(rule.weights)
        step = 0
        while step < self.steps:
            for batch in self.mixture.loader(self.problem.sources, BATCH):
                if rule is not None and rule.every and step % rule.every == 0:
                    rule.update(self.model, self.losses, list(self.model.last.parameters()))  # type: ignore
                    self.mixture.set(rule.weights.clamp(min=1e-5))
                self.optimizer.zero_grad()
                self.loss(self.model, batch).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                step += 1
                if step % 10 == 0:
                    self.history.append([round(w, 4) for w in self.mixture.tolist()])
                if step == self.steps:
                    return

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        windows, drawn = batch
        return self.mixture.loss(losses_of(model, windows), drawn)

    def losses(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the losses that the other rules read."""
        windows = torch.cat([_some(data, OF_EACH) for data in self.problem.sources])
        target = losses_of(model, _some(self.problem.valid, BATCH)).mean()
        return losses_of(model, windows).view(-1, OF_EACH).mean(1), target

    def tuner(self) -> mf.Tuner:
        """Tune the mixture by midflight, with the defaults of `mf.Mixture`."""
        self.mixture = mf.Mixture(SOURCES)
        t2 = DataLoader(self.problem.valid, BATCH, shuffle=True)
        return mf.Tuner(
            self.model, self.optimizer, mf.Space(mixture=self.mixture), self.loss,
            self.mixture.loader(self.problem.sources, BATCH), t2, valid_loss_fn=loss_of,
            total_steps=self.steps, max_grad_norm=1.0,
        )  # fmt: skip


def _some(data: Windows, n: int) -> Tensor:
    return torch.stack([data[int(i)][0] for i in torch.randint(len(data), (n,))])


def by_tuner(problem: Problem, seed: int) -> Run:
    run = Run(problem, seed)
    tuner = run.tuner()
    run.train()
    tuner.detach()  # the last weights, as in the other arms
    return run


def by_rule(rule: Callable[[Problem], Any], problem: Problem, seed: int) -> Run:
    run = Run(problem, seed)
    run.train(rule(problem))
    return run


def by_doremi(problem: Problem, seed: int) -> Run:
    reference, proxy = Run(problem, seed + 1000), Run(problem, seed)
    equal = torch.ones(len(SOURCES))
    reference.train(Fixed(equal))
    rule = DoReMi(len(SOURCES), reference.model)
    proxy.train(rule)
    return by_rule(lambda p: Fixed(rule.mean), problem, seed)


def by_tpe(problem: Problem, seed: int) -> Run:
    """Return the best of 16 static mixtures; the weights are proportional to numbers in [0.001, 1]."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(multivariate=True, seed=seed))
    runs: list[Run] = []

    def objective(trial: optuna.Trial) -> float:
        weights = torch.tensor([trial.suggest_float(name, 1e-3, 1, log=True) for name in SOURCES])
        runs.append(by_rule(lambda p: Fixed(weights), problem, seed))
        return bits(runs[-1].model, problem.valid)

    study.enqueue_trial(dict.fromkeys(SOURCES, 1.0))
    study.optimize(objective, TRAININGS)
    return runs[study.best_trial.number]


def _natural(problem: Problem) -> Fixed:
    return Fixed(torch.tensor([float(len(data)) for data in problem.sources]))


METHODS: dict[str, Callable[[Problem, int], Run]] = {
    "uniform": partial(by_rule, lambda p: Fixed(torch.ones(len(SOURCES)))),
    "natural": partial(by_rule, _natural),
    "midflight": by_tuner,
    "FastMix": partial(by_rule, lambda p: FastMix(len(SOURCES), FASTMIX_LR)),
    "DGA": partial(by_rule, lambda p: Alignment(len(SOURCES), DGA_LR)),
    "DoReMi": by_doremi,
    "TPE": by_tpe,
}


def run_arm(pair: str, arm: str, seed: int) -> Row:
    """Return the row of an arm on a pair."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    problem = Problem(pair)
    began = time.perf_counter()
    run = METHODS[arm](problem, seed)
    seconds = time.perf_counter() - began
    return {
        "task": pair, "arm": arm, "index": seed, "seconds": round(seconds, 1),
        "valid": bits(run.model, problem.valid), "test": bits(run.model, problem.test),
        "weights": run.history,
    }  # fmt: skip


class Keeper(torch.optim.Optimizer):
    """Moves nothing and keeps the last hypergradient."""

    def __init__(self, raws: Any) -> None:
        super().__init__(raws, {"lr": 1.0})

    def step(self, closure: Any = None) -> None:
        self.last = self.param_groups[0]["params"][0].grad.clone()


def agreement(pair: str, seed: int, after: int) -> Row:
    """Compare the direction of each rule with the truth, on one batch and after some steps of training.

    The truth is a central difference, in float64, of the target's loss after the next step of AdamW with
    clipping. Each rule reads the windows of the same batch, four of each source, and the same of the target.
    """
    torch.set_num_threads(1)
    problem = Problem(pair)
    run = Run(problem, seed)
    run.steps = after
    run.train(Fixed(torch.ones(len(SOURCES))))
    model, states = run.model.double(), run.optimizer.state
    for state in states.values():
        state.update({name: x.double() for name, x in state.items() if name != "step"})
    mixture = mf.Mixture(SOURCES)
    space = mf.Space(mixture=mixture, dtype=torch.float64)
    run.mixture = mixture
    batch = next(iter(mixture.loader(problem.sources, OF_EACH * len(SOURCES), by="loss")))
    target = (_some(problem.valid, BATCH),)
    before = copy.deepcopy((model, run.optimizer.state_dict()))
    raw = mixture.raw.detach().clone()

    def step() -> None:
        run.optimizer.zero_grad()
        run.loss(model, batch).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()

    def restore() -> None:
        model.load_state_dict(before[0].state_dict())
        run.optimizer.load_state_dict(copy.deepcopy(before[1]))

    def after_step(i: int, shift: float) -> float:
        restore()
        moved = raw.clone()
        moved[i] += shift
        with space.seeing(space.values({"mixture": moved})):
            step()
        return float(loss_of(model, target).detach())

    width = 1e-4
    truth = torch.tensor(
        [(after_step(i, width) - after_step(i, -width)) / (2 * width) for i in range(len(SOURCES))]
    )
    restore()
    windows = [batch[0][batch[1].source == i] for i in range(len(SOURCES))]
    found = {}
    for name, params in (("FastMix", model.last.parameters()), ("DGA", model.parameters())):
        losses = torch.stack([losses_of(model, own).mean() for own in windows]), loss_of(model, target)
        slopes = -alignments(losses, list(params))  # by the weights; the truth is by the coordinates
        found[name] = torch.autograd.functional.vjp(mixture.transform.value, raw, slopes)[1]
    tuner = mf.Tuner(
        model, run.optimizer, space, run.loss, [batch], [target], examples=None, valid_loss_fn=loss_of,
        schedule=1, horizon="step", hyper_optimizer=Keeper, max_grad_norm=1.0,
    )  # fmt: skip
    step()
    found["midflight"] = tuner.hyper_optimizer.last  # type: ignore[union-attr]
    tuner.detach()
    cosines = {
        name: float(F.cosine_similarity(g.double(), truth.double(), dim=0)) for name, g in found.items()
    }
    return {"task": "agreement", "arm": pair, "index": seed, "after": after, **cosines}


def table(found: Sequence[Row]) -> str:
    """Print the test loss of each arm and pair, the mean over the seeds, and the time over uniform's."""
    lines = ["| pair | " + " | ".join(ARMS) + " |", "|---" * (len(ARMS) + 1) + "|"]
    for pair in dict.fromkeys(r["task"] for r in found if "test" in r):
        of = {arm: [r["test"] for r in found if (r["task"], r["arm"]) == (pair, arm)] for arm in ARMS}
        best = min(float(np.mean(values)) for values in of.values() if values)
        cells = [
            "-"
            if not of[arm]
            else ("**{:.3f}**" if np.mean(of[arm]) == best else "{:.3f}").format(np.mean(of[arm]))
            for arm in ARMS
        ]
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    plain = np.mean([r["seconds"] for r in found if r.get("arm") == "uniform"] or [np.nan])
    times = [
        np.mean([r["seconds"] for r in found if r.get("arm") == arm] or [np.nan]) / plain for arm in ARMS
    ]
    return "\n".join([*lines, "| time / uniform | " + " | ".join(f"{t:.2f}" for t in times) + " |"])


def figure(found: Sequence[Row]) -> None:
    """Draw midflight's mixtures over time as stacked areas."""
    pairs = [r for r in found if r.get("arm") == "midflight" and r["index"] == 0]
    fig = Figure(figsize=(3.2 * max(1, len(pairs)), 3.2), layout="constrained")
    axes = fig.subplots(1, max(1, len(pairs)), sharey=True, squeeze=False)[0]
    for ax, row in zip(axes, pairs, strict=False):
        shares = np.array(row["weights"]).T
        ax.stackplot(10 * np.arange(1, shares.shape[1] + 1), shares, labels=SOURCES)
        ax.set(title=row["task"], xlabel="step", ylim=(0, 1), xlim=(10, 10 * shares.shape[1]))
    axes[0].set_ylabel("weight of the source")
    fig.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SOURCES), fontsize=8
    )
    fig.savefig(ROWS.with_suffix(".png"), dpi=110)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="TARGET/REGIME")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--agreement", action="store_true", help="print each rule's cosine with the truth")
    parser.add_argument("--table", action="store_true", help="run nothing; print the tables")
    parser.add_argument("--figure", action="store_true", help="run nothing; draw the figure")
    options = parser.parse_args()
    if options.agreement:
        for pair in options.pairs:
            for after in (20, 100, STEPS - 10):
                row = agreement(pair, options.seeds[0], after)
                append(options.rows, row)
                print(row, flush=True)
        return
    if not (options.table or options.figure):
        done = {(r["task"], r["arm"], r["index"]) for r in rows(options.rows) if "task" in r}
        jobs = [(p, a, s) for s in options.seeds for p in options.pairs for a in options.arms]
        jobs = [job for job in jobs if job not in done]
        for name in {*SOURCES, *(t for texts in TARGETS.values() for t in texts)}:
            text(name)  # downloads before the workers start
        append(options.rows, {"machine": machine(), "steps": STEPS})
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
            for future in [pool.submit(run_arm, *job) for job in jobs]:
                row = future.result()
                append(options.rows, row)
                print({k: v for k, v in row.items() if k != "weights"}, flush=True)
    found = rows(options.rows)
    if options.figure:
        figure(found)
    print(table(found))


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
