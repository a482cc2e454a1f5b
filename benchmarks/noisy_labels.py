"""Compare ways to find wrong labels and to train in spite of them.

    python benchmarks/noisy_labels.py                      # everything; resumes
    python benchmarks/noisy_labels.py --tasks fashion_mnist/pair --arms plain midflight --seeds 0
    python benchmarks/noisy_labels.py --ablation           # parts of midflight's rule replaced; resumes
    python benchmarks/noisy_labels.py --scaling            # time and memory with 10^3 to 10^6 weights
    python benchmarks/noisy_labels.py --table              # run nothing; print the tables
    python benchmarks/noisy_labels.py --figure             # run nothing; draw the figure

Data: T1 has 4,000 training images with noisy labels, T2 500 clean ones for validation, the test set 10,000.
"sym": 40 % of the labels are replaced by another class, drawn at random. "pair": 30 % are replaced by the
next class. A seed draws the images, the noise, the initial weights and the batches. Model: MLP 784-64-10;
Adam, lr 1e-3, batches of 100, 20 epochs.

arm              weights of examples, and the score by which the worst k are "found bad"
plain            none; the loss at the end
small loss       plain until the epoch with the least T2 loss; the loss there. Then a new training without the
                 k examples of the highest loss (Han et al. 2018); k is the true number of wrong labels
meta-weight-net  a learned function of the loss (Shu et al. 2019); the function at the end
reweight         from the present batches alone (Ren et al. 2018); the mean weight of the last ten epochs
clean            trained on T2 alone; the loss
midflight        `mf.ExampleWeights`, its tuner with defaults and T1 batches of all 4,000; the weight

Precision is the share of wrong labels among the k examples of the worst score. AUROC is the chance that a
wrong label has a worse score than a right one. Ties are broken at random. "Precision by loss" ranks the
examples by their loss under the final model instead. The final model has the weights with the least T2 loss
of all epochs, or for midflight those that `finish()` chose. Time is that of the process, over plain's.

midflight's steps were chosen on all four tasks, seeds 100 and 101, the other constants on fashion_mnist,
seed 100. Rows: docs/results/noisy_labels.jsonl.
"""

import copy
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from noisy_rules import MetaWeightNet, Reweight, small_loss
from sklearn.metrics import roc_auc_score
from tasks import RESULTS, Row, append, compute, interval, one_thread, parser_of, rows
from torch import Tensor, nn

import midflight as mf
from midflight._reporting.machine import machine
from midflight.datasets import load

ROWS = RESULTS / "noisy_labels.jsonl"
TASKS = [f"{name}/{noise}" for name in ("fashion_mnist", "mnist") for noise in ("sym", "pair")]
ARMS = ["plain", "small loss", "meta-weight-net", "reweight", "clean", "midflight"]
ABLATIONS = {
    "midflight": {},
    "signs": {"signs": True},
    'horizon="step"': {"horizon": "step"},
    "T1 batches of 1,000": {"t1": 1000},
    "T1 batches of 100": {"t1": 100},
    "schedule=5": {"schedule": 5},
    "schedule=5, T1 batches of 500": {"schedule": 5, "t1": 500},
}
"""What is changed of midflight's arm; "signs" is `mf.Float(0, 1, init=1, shape=(n,))`."""
N, VALID, BATCH, EPOCHS, WIDTH = 4000, 500, 100, 20, 64
SHARE = {"sym": 0.4, "pair": 0.3}
VIRTUAL_LR = 0.1
"""Of meta-weight-net; chosen from 0.01, 0.1 and 1."""
COLUMNS = {
    "precision": "precision", "precision by loss": "by_loss", "AUROC": "auroc", "test error": "error",
    "test error of the last weights": "last",
}  # fmt: skip
"""Heading of the tables -> key of the rows."""
SIZES = (10**3, 10**4, 10**5, 10**6)
Triple = tuple[Tensor, Tensor, Tensor]


class Data:
    """The images of a task and a seed: training x, y, which are `wrong`; T2; test."""

    def __init__(self, task: str, seed: int) -> None:
        name, noise = task.split("/")
        arrays = load(name)
        x, y = torch.from_numpy(arrays.train_x), torch.from_numpy(arrays.train_y)
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(y), generator=rng)
        own, valid = order[:N], order[N : N + VALID]
        self.wrong = torch.rand(N, generator=rng) < SHARE[noise]
        shift = torch.randint(1, 10, (N,), generator=rng) if noise == "sym" else 1
        self.x, self.y = x[own], torch.where(self.wrong, (y[own] + shift) % 10, y[own])
        self.valid = x[valid], y[valid]
        self.test = torch.from_numpy(arrays.test_x), torch.from_numpy(arrays.test_y)


class Batches:
    """Batches (x, y, index) in random order; each pass has all examples of `rows`."""

    def __init__(self, x: Tensor, y: Tensor, rows: Tensor, size: int, seed: int) -> None:
        self.x, self.y, self.rows, self.size = x, y, rows, size
        self.rng = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[Triple]:
        for index in self.rows[torch.randperm(len(self.rows), generator=self.rng)].split(self.size):
            yield self.x[index], self.y[index], index


def losses_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Run:
    """A training, whose examples are weighed by `loss_fn`.

    Attributes:
        best: T2 loss, weights of the model and losses of the training examples, at the best epoch.
    """

    def __init__(self, data: Data, seed: int, rows: Tensor | None = None) -> None:
        torch.manual_seed(seed)
        self.data, self.seed = data, seed
        self.model = nn.Sequential(nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)
        self.loader = Batches(data.x, data.y, torch.arange(N) if rows is None else rows, BATCH, seed + 1000)
        self.loss_fn: Callable[[nn.Module, Triple], Tensor] = loss_of
        self.best: tuple[float, dict[str, Tensor], Tensor] | None = None

    def train(self, after_epoch: Callable[[int], None] = lambda epoch: None) -> None:
        for epoch in range(EPOCHS):
            for batch in self.loader:
                self.optimizer.zero_grad()
                self.loss_fn(self.model, batch).backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
            with torch.no_grad():
                valid = float(loss_of(self.model, self.data.valid))
            if self.best is None or valid < self.best[0]:
                self.best = valid, copy.deepcopy(self.model.state_dict()), self.losses()
            after_epoch(epoch)

    @torch.no_grad()
    def losses(self) -> Tensor:
        return losses_of(self.model(self.data.x), self.data.y)

    @torch.no_grad()
    def error(self) -> float:
        x, y = self.data.test
        return float((self.model(x).argmax(1) != y).float().mean())

    def row(self, score: Tensor, finished: bool = False) -> Row:
        """Return what is reported; `finished`: the model has its final weights already.

        Args:
            score: of the training examples, high for bad labels.
        """
        last = self.error()
        assert self.best is not None
        if not finished:
            self.model.load_state_dict(self.best[1])
        with torch.no_grad():
            valid = float(loss_of(self.model, self.data.valid))
        return {
            "precision": self.precision(score), "by_loss": self.precision(self.losses()),
            "auroc": float(roc_auc_score(self.data.wrong.numpy(), score.numpy())),
            "error": self.error(), "last": last, "valid": valid,
        }  # fmt: skip

    def precision(self, score: Tensor) -> float:
        """Return the share of wrong labels among the k examples of the highest score, k their true number."""
        wrong, k = self.data.wrong, int(self.data.wrong.sum())
        shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(self.seed))
        return float(wrong[shuffled[score[shuffled].argsort(descending=True)[:k]]].float().mean())


def by_plain(data: Data, seed: int) -> Row:
    run = Run(data, seed)
    run.train()
    return run.row(run.losses())


def by_small_loss(data: Data, seed: int) -> Row:
    first = Run(data, seed)
    first.train()
    assert first.best is not None
    run = Run(data, seed, small_loss(first.best[2], N - int(data.wrong.sum())))
    run.train()
    return run.row(first.best[2])


def by_rule(data: Data, seed: int, lr: float = VIRTUAL_LR, net: bool = True) -> Row:
    """Train by meta-weight-net, or by reweight."""
    run = Run(data, seed)
    rule = MetaWeightNet(losses_of, lr) if net else Reweight(losses_of)
    rng = torch.Generator().manual_seed(seed + 2000)
    sums = torch.zeros(N)

    def loss_fn(model: nn.Module, batch: Triple) -> Tensor:
        x, y, index = batch
        clean = torch.randint(VALID, (BATCH,), generator=rng)
        weights = rule(model, (x, y), (data.valid[0][clean], data.valid[1][clean]))
        sums[index] += weights
        return (weights * losses_of(model(x), y)).mean()

    def after_epoch(epoch: int) -> None:
        if epoch == EPOCHS // 2 - 1:
            sums.zero_()

    run.loss_fn = loss_fn
    run.train(after_epoch)
    if isinstance(rule, MetaWeightNet):
        return run.row(-rule.of(run.losses()).detach())
    return run.row(-sums)


def by_clean(data: Data, seed: int) -> Row:
    """Train on T2 alone, for as many steps; the best epoch is chosen on the data of the training."""
    run = Run(data, seed)
    x, y = data.valid
    run.loader = Batches(x, y, torch.arange(VALID).repeat(N // VALID), BATCH, seed + 1000)
    run.train()
    return run.row(run.losses())


def by_midflight(
    data: Data, seed: int, t1: int = N, horizon: str = "run", signs: bool = False, schedule: int | None = None
) -> Row:
    run = Run(data, seed)
    weights = mf.ExampleWeights(N)
    space = mf.Space(w=mf.Float(0.0, 1.0, init=1.0, shape=(N,)) if signs else weights)

    def loss_fn(model: nn.Module, batch: Triple) -> Tensor:
        x, y, index = batch
        losses = losses_of(model(x), y)
        return (space["w"][index] * losses).mean() if signs else weights.loss(losses, index)

    run.loss_fn = loss_fn
    loader = Batches(data.x, data.y, torch.arange(N), t1, seed + 3000)
    tuner = mf.Tuner(
        run.model, run.optimizer, space, loss_fn, loader, [data.valid], valid_loss_fn=loss_of,
        total_steps=EPOCHS * len(run.loader), examples=None,
        horizon=horizon, schedule=schedule,  # type: ignore
    )  # fmt: skip
    run.train()
    last = run.error()
    tuner.finish()
    row = run.row(-space["w"].value.detach(), finished=True)
    counts = int(tuner.log()["hypersteps"])
    mean = [round(float(space["w"].value.detach()[data.wrong == bad].mean()), 3) for bad in (False, True)]
    return {**row, "last": last, "hypersteps": counts, "mean_weight": mean}


METHODS: dict[str, Callable[[Data, int], Row]] = {
    "plain": by_plain,
    "small loss": by_small_loss,
    "meta-weight-net": by_rule,
    "reweight": lambda data, seed: by_rule(data, seed, net=False),
    "clean": by_clean,
    "midflight": by_midflight,
}


@cache
def data_of(task: str, seed: int) -> Data:
    return Data(task, seed)


def run_arm(job: tuple[str, str, int, bool]) -> Row:
    """Return the row of an arm, or of an ablation, on a task."""
    task, arm, seed, ablation = job
    data = data_of(task, seed)
    began = time.process_time()
    row = by_midflight(data, seed, **ABLATIONS[arm]) if ablation else METHODS[arm](data, seed)
    seconds = round(time.process_time() - began, 2)
    return {"task": task, "arm": arm, "index": seed, "ablation": ablation, "seconds": seconds, **row}


def scaled(n: int) -> Row:
    """Measure time and memory of hyper-steps with n weights, on one model, T1 batches of 1,000."""
    one_thread()
    torch.manual_seed(0)
    x, y = torch.randn(n, 20), torch.randint(10, (n,))
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    weights = mf.ExampleWeights(n)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    valid = torch.randn(500, 20), torch.randint(10, (500,))
    index = [torch.randint(n, (1000,)) for _ in range(10)]
    t1 = [(x[i], y[i], i) for i in index]

    def loss_fn(model: nn.Module, batch: Triple) -> Tensor:
        return weights.loss(losses_of(model(batch[0]), batch[1]), batch[2])

    def steps(count: int) -> float:
        times = []
        for i in range(count):
            batch = [part[:100] for part in t1[i % 10]]
            began = time.process_time()
            optimizer.zero_grad()
            loss_fn(model, batch).backward()  # type: ignore
            optimizer.step()
            times.append(time.process_time() - began)
        return float(np.median(times[5:]))

    plain = steps(100)
    tuner = mf.Tuner(
        model, optimizer, mf.Space(w=weights), loss_fn, t1, [valid], valid_loss_fn=loss_of, schedule=1,
        total_steps=1000,
    )  # fmt: skip
    tuned = steps(100)
    tuner.detach()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "task": "scaling", "arm": str(n), "index": 0, "plain_ms": 1e3 * plain,
        "hyperstep_ms": 1e3 * (tuned - plain), "memory_mb": (after - before) / 1024,
    }  # fmt: skip


def table(found: Sequence[Row]) -> str:
    """Print means over seeds with bootstrap intervals: of arms, of ablations, and the scaling."""
    lines = []
    for ablation in (False, True):
        own = [r for r in found if r.get("ablation") is ablation]
        if not own:
            continue
        lines += ["Parts of the rule replaced" if ablation else "All methods", ""]
        head = "task", "method", "seeds", *COLUMNS, "time / plain"
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for task in dict.fromkeys(r["task"] for r in own):
            plain = {r["index"]: r["seconds"] for r in found if (r["task"], r["arm"]) == (task, "plain")}
            for arm in ABLATIONS if ablation else ARMS:
                of = [r for r in own if (r["task"], r["arm"]) == (task, arm)]
                if of:
                    ratios = [r["seconds"] / plain[r["index"]] for r in of if r["index"] in plain]
                    cells = [
                        "{:.3f} [{:.3f}, {:.3f}]".format(*interval([r[key] for r in of]))
                        for key in COLUMNS.values()
                    ]
                    times = f"{np.median(ratios):.1f}" if ratios else "-"
                    lines.append(f"| {task} | {arm} | {len(of)} | {' | '.join(cells)} | {times} |")
        lines.append("")
    sizes = {r["arm"]: r for r in found if r["task"] == "scaling"}
    if sizes:
        first = next(iter(sizes.values()))
        lines += ["| examples | hyper-step, ms | over that of 1,000 | memory, MB |", "|---" * 4 + "|"]
        for n, r in sizes.items():
            ratio = r["hyperstep_ms"] / first["hyperstep_ms"]
            lines.append(f"| {int(n):,} | {r['hyperstep_ms']:.1f} | {ratio:.2f} | {r['memory_mb']:.0f} |")
    return "\n".join(lines)


def figure(found: Sequence[Row]) -> None:
    """Draw precision and test error of each arm, a point per seed, a column per task."""
    fig = Figure(figsize=(11, 5), layout="constrained")
    axes = fig.subplots(2, len(TASKS), sharey="row")
    for column, task in enumerate(TASKS):
        for ax, key in zip(axes[:, column], ("precision", "error"), strict=True):
            for i, arm in enumerate(ARMS):
                values = [
                    r[key] for r in found if (r["task"], r["arm"], r.get("ablation")) == (task, arm, False)
                ]
                colour = "#D55E00" if arm == "midflight" else "#56748c"
                ax.plot([i] * len(values), values, "o", color=colour, alpha=0.6, markersize=5)
                if values:
                    ax.plot([i - 0.3, i + 0.3], [np.mean(values)] * 2, color=colour)
            ax.set_xticks(range(len(ARMS)), ARMS if key == "error" else [], rotation=60, ha="right")
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", alpha=0.3)
        axes[0, column].set_title(task, loc="left", fontsize=10)
    axes[0, 0].set_ylabel("precision of found bad labels")
    axes[1, 0].set_ylabel("test error")
    fig.savefig(ROWS.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = parser_of(__doc__, ROWS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *ABLATIONS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--ablation", action="store_true", help="replace parts of midflight's rule")
    parser.add_argument("--scaling", action="store_true", help="measure time and memory over n")
    parser.add_argument("--figure", action="store_true", help="run nothing; draw the figure")
    options = parser.parse_args()
    if options.scaling:
        append(options.rows, {"machine": machine()})
        for n in SIZES:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                append(options.rows, pool.apply(scaled, (n,)))
    elif not (options.table or options.figure):
        arms = options.arms or list(ABLATIONS if options.ablation else ARMS)
        done = {(r["task"], r["arm"], r["index"], r.get("ablation")) for r in rows(options.rows)}
        jobs = [(t, a, s, options.ablation) for s in options.seeds for t in options.tasks for a in arms]
        for name in ("mnist", "fashion_mnist"):
            load(name)  # downloads before the workers start
        compute(options.rows, [job for job in jobs if job not in done], run_arm, options.workers)
    found = rows(options.rows)
    if options.figure:
        figure(found)
    print(table(found))


if __name__ == "__main__":
    main()
