"""Compare ways to weigh the loss terms of two tasks that share a network.

    python benchmarks/multitask.py                       # everything, seeds 0 to 9; resumes
    python benchmarks/multitask.py --problems digits_help wine_units --arms midflight equal
    python benchmarks/multitask.py --tune                # constants of the other rules, on seeds 100 to 102
    python benchmarks/multitask.py --table               # run nothing; print the tables
    python benchmarks/multitask.py --figure              # run nothing; draw the figure

problem         main task                         other task                            shared  goal
digits_help     the digit, 200 labels             whether it is even, 10,000 labels     64      main
digits_fight    one of two digits that overlap    the other digit                       16      main
boston_few      price, 50 rows                    nitric oxides (a column), 300 rows    32      main
concrete_help   strength, 60 rows                 water (a column), 600 rows            32      main
concrete_fight  strength, 500 rows                water (a column), the same rows       4       main
wine_units      quality (variance 0.65)           free sulphur dioxide (variance 109)   32      both

T2 is the validation data. "Shared" is the width of the two shared layers. The goal is the main task's loss,
or the mean of both losses, each over the variance of its targets. The columns were chosen by the ratio of
the main task's test losses, equal weights over main alone, on two seeds from 100 on. concrete_help was
chosen on ten seeds, after ten seeds had shown that boston_few hardly helps. All arms of a seed share data,
initial weights and batches: 64 examples of each task, 600 steps of Adam, its lr 0.003 falling as a cosine.
The test loss is that of the last weights.

arm          weights of the two terms
equal        1 : 1
uncertainty  Kendall et al. 2018, learned with the network
GradNorm     Chen et al. 2018
midflight    `mf.Mixture` with its defaults, one run
floor 0      the same with floor=0
main alone   1 : 0
best of 9    the best on T2 of 9 constant ratios from 1 : 1,000 to 1,000 : 1; 9 trainings

Rows: docs/results/multitask.jsonl.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from multitask_rules import Fixed, GradNorm, Uncertainty
from tables import DATA
from tasks import RESULTS, Row, compute, endless, interval, parser_of, rows
from torch import Tensor, nn

import midflight as mf
from midflight.datasets import Shuffled, Split, load

ROWS = RESULTS / "multitask.jsonl"
BATCH, LR = 64, 3e-3
EACH = 30
"""Steps between two shares in a row."""
Both = tuple[Split, Split]
"""The data of the main and of the other task."""


@dataclass(frozen=True)
class Problem:
    """Two tasks that share a network.

    Attributes:
        data: seed -> (T1, T2, test).
        width: units of the two shared layers.
        outputs: of the two heads; 1 means a regression.
        both: whether the target is the mean of both tasks' losses, each over the variance of its targets;
            else it is the main task's loss.
    """

    data: Callable[[int], tuple[Both, Both, Both]]
    width: int
    outputs: tuple[int, int]
    steps: int = 600
    both: bool = False


def drawn(seed: int, whole: Both, sizes: Sequence[tuple[int, int]]) -> tuple[Both, ...]:
    """Return parts of both tasks' data, in a random order of the rows; T1, T2 and so on are disjoint."""
    order = torch.randperm(len(whole[0]), generator=torch.Generator().manual_seed(seed))
    parts, begin = [], 0
    for size in sizes:
        main, other = (split[order[begin : begin + n]] for split, n in zip(whole, size, strict=True))
        parts.append((main, other))
        begin += max(size)
    return tuple(parts)


@cache
def mnist() -> tuple[Split, Split]:
    """Load MNIST at half its resolution: training and test images, shape (n, 1, 14, 14)."""
    a = load("mnist")
    parts = ((a.train_x, a.train_y), (a.test_x, a.test_y))
    x, y = zip(
        *[(torch.from_numpy(x).view(-1, 1, 28, 28), torch.from_numpy(y)) for x, y in parts], strict=True
    )
    return Split(F.avg_pool2d(x[0], 2), y[0]), Split(F.avg_pool2d(x[1], 2), y[1])


def digits_help(seed: int) -> Any:
    """Main: the digit, 200 labels. Other: whether it is even, 10,000 labels."""
    tasks = [(Split(part.x.flatten(1), part.y), Split(part.x.flatten(1), part.y % 2)) for part in mnist()]
    t1, t2 = drawn(seed, tasks[0], [(200, 10_000), (200, 200)])
    return t1, t2, tasks[1]


def digits_fight(seed: int) -> Any:
    """Main: the upper left digit of two that overlap. Other: the lower right digit."""
    parts = []
    for part in mnist():
        partner = part[torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))]
        x = torch.maximum(F.pad(part.x, (0, 4, 0, 4)), F.pad(partner.x, (4, 0, 4, 0))).flatten(1)
        parts.append((Split(x, part.y), Split(x, partner.y)))
    t1, t2 = drawn(seed, parts[0], [(10_000, 10_000), (1_000, 1_000)])
    return t1, t2, parts[1]


@cache
def table(name: str, column: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a table's inputs without a column, its target, and this column."""
    file = np.load(DATA / f"{name}.npz")
    x, y = (torch.tensor(file[part], dtype=torch.float32) for part in ("x", "y"))
    return torch.cat([x[:, :column], x[:, column + 1 :]], 1), y, x[:, column : column + 1]


def of_table(
    name: str, column: int, sizes: Sequence[tuple[int, int]], scaled: bool = True
) -> Callable[[int], Any]:
    def data(seed: int) -> Any:
        x, *targets = table(name, column)
        x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
        main, other = (y - y.mean(0) for y in targets)
        if scaled:
            main, other = main / main.std(0), other / other.std(0)
        left = len(x) - sum(max(size) for size in sizes)
        return drawn(seed, (Split(x, main), Split(x, other)), [*sizes, (left, left)])

    return data


PROBLEMS: dict[str, Problem] = {
    "digits_help": Problem(digits_help, 64, (10, 2)),
    "digits_fight": Problem(digits_fight, 16, (10, 10)),
    "boston_few": Problem(of_table("boston", 4, [(50, 300), (50, 50)]), 32, (1, 1)),
    "concrete_help": Problem(of_table("concrete", 3, [(60, 600), (60, 60)]), 32, (1, 1)),
    "concrete_fight": Problem(of_table("concrete", 3, [(500, 500), (200, 200)]), 4, (1, 1)),
    "wine_units": Problem(of_table("wine", 5, [(800, 800), (300, 300)], False), 32, (1, 1), both=True),
}
MIXTURES: dict[str, Row] = {"midflight": {}, "floor 0": {"floor": 0.0}}
"""Arm -> options of its mixture."""
STATIC = {f"10^{e:+.2f}": e for e in (-3, -2.25, -1.5, -0.75, 0.75, 1.5, 2.25, 3)}
"""Arm -> log10 of the main task's weight over the other's."""
TRAINED = ["equal", "uncertainty", "GradNorm", *MIXTURES, "main alone", *STATIC]
MOVING = ["uncertainty", "GradNorm", *MIXTURES]
SHOWN = ["equal", *MOVING, "main alone", "best of 9"]
CONSTANTS: dict[str, tuple[float, ...]] = {"uncertainty": (0.001,), "GradNorm": (3.0, 0.1)}
"""Arm -> the step of s, or alpha and the step of w."""
TRIED = {
    "uncertainty": [(0.001,), (0.003,), (0.01,), (0.03,), (0.1,)],
    "GradNorm": [(alpha, lr) for alpha in (0.0, 0.5, 1.5, 3.0) for lr in (0.005, 0.025, 0.1)],
}


class Pairs:
    """Yields pairs of batches, of the main and of the other task; a pass takes the longer one once."""

    def __init__(self, data: Both, seed: int) -> None:
        self.parts = [Shuffled(split, min(BATCH, len(split)), seed + n) for n, split in enumerate(data)]

    def __len__(self) -> int:
        return max(len(part) for part in self.parts)

    def __iter__(self) -> Iterator[Any]:
        main, other = (endless(part) for part in self.parts)
        for _ in range(len(self)):
            yield next(main), next(other)


class Shared(nn.Module):
    """Two shared layers and a head per task."""

    def __init__(self, inputs: int, width: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.last = nn.Linear(width, width)
        self.trunk = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), self.last, nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in outputs)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        units = self.trunk(torch.cat(list(inputs))).split([len(x) for x in inputs])
        return [head(u) for head, u in zip(self.heads, units, strict=True)]


def terms_of(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of each task, shape (2,)."""
    (x0, y0), (x1, y1) = batch
    outputs = model((x0, x1))
    pairs = zip(outputs, (y0, y1), strict=True)
    return torch.stack([F.cross_entropy(o, y) if o.shape[1] > 1 else F.mse_loss(o, y) for o, y in pairs])


class Run:
    """A training of a problem."""

    def __init__(self, name: str, seed: int) -> None:
        self.problem, self.seed = PROBLEMS[name], seed
        self.t1, self.t2, self.test = self.problem.data(seed)
        torch.manual_seed(seed)
        self.model = Shared(self.t1[0].x.shape[1], self.problem.width, self.problem.outputs)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LR, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.problem.steps)
        self.mixture = mf.Mixture(["main", "other"])  # equal weights
        self.scale = torch.ones(2)
        if self.problem.both:
            self.scale = torch.stack([split.y.var() for split in self.t1])
        self.history: list[float] = []

    def goal(self, model: nn.Module, batch: Any) -> Tensor:
        terms = terms_of(model, batch) / self.scale
        return terms.mean() if self.problem.both else terms[0]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.mixture.value @ terms_of(model, batch)

    def tuner(self, **options: Any) -> mf.Tuner:
        return mf.Tuner(
            self.model, self.optimizer, mf.Space(mixture=self.mixture), self.loss,
            Pairs(self.t1, self.seed + 3), Pairs(self.t2, self.seed + 5), valid_loss_fn=self.goal,
            total_steps=self.problem.steps, **options,
        )  # fmt: skip

    def train(self, rule: Any) -> None:
        """Train with a rule; without one, with the mixture's weights."""
        batches = endless(Pairs(self.t1, self.seed + 1))
        for step in range(self.problem.steps):
            batch = next(batches)
            self.optimizer.zero_grad()
            if rule is None:
                self.loss(self.model, batch).backward()  # type: ignore[no-untyped-call]
            else:
                terms = terms_of(self.model, batch)
                rule.loss(terms).backward(retain_graph=True)
                rule.update(terms, list(self.model.last.parameters()))
            self.optimizer.step()
            self.schedule.step()
            if step % EACH == 0:
                weights = self.mixture.value.detach() if rule is None else rule.weights
                self.history.append(float(weights[0] / weights.sum()))

    @torch.no_grad()
    def measured(self, data: Both) -> Row:
        batch = [(split.x, split.y) for split in data]
        outputs = self.model([x for x, _ in batch])
        errors = [
            float((o.argmax(1) != y).float().mean()) if o.shape[1] > 1 else float(F.mse_loss(o, y) / y.var())
            for o, (_, y) in zip(outputs, batch, strict=True)
        ]
        return {
            "goal": float(self.goal(self.model, batch)), "losses": terms_of(self.model, batch).tolist(),
            "errors": errors,
        }  # fmt: skip


def rule_of(arm: str, problem: Problem, constants: Sequence[float] | None) -> Any:
    given = CONSTANTS.get(arm, ()) if constants is None else constants
    if arm == "uncertainty":
        return Uncertainty([n == 1 for n in problem.outputs], *given)
    if arm == "GradNorm":
        return GradNorm(2, *given)
    if arm == "main alone":
        return Fixed([1.0, 0.0])
    odds = 10.0 ** STATIC.get(arm, 0.0)
    return Fixed([odds / (1 + odds), 1 / (1 + odds)])


def run(job: tuple[str, str, int, Sequence[float] | None]) -> Row:
    """Run a job (problem, arm, seed, constants of the rule or None); return its row."""
    name, arm, seed, constants = job
    run = Run(name, seed)
    began = time.perf_counter()
    if arm in MIXTURES:
        run.mixture = mf.Mixture(["main", "other"], **MIXTURES[arm])
        tuner = run.tuner()
        run.train(None)
        tuner.detach()  # the last weights, as in the other arms
    else:
        run.train(rule_of(arm, run.problem, constants))
    seconds = round(time.perf_counter() - began, 2)
    valid = {"goal": run.measured(run.t2)["goal"]}
    row = {"task": name, "arm": arm, "index": seed, "seconds": seconds, "valid": valid}
    if constants is None:
        shares = run.history if arm in MOVING else run.history[:1]
        return shortened(row | {"test": run.measured(run.test), "shares": shares})
    return shortened(row | {"constants": list(constants)})


def shortened(value: Any) -> Any:
    """Return a row with numbers of five digits."""
    if isinstance(value, dict):
        return {name: shortened(part) for name, part in value.items()}
    if isinstance(value, list):
        return [shortened(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def tuning_jobs() -> list[Any]:
    """Return the jobs for choosing constants: seeds 100 to 102 of all problems."""
    tried = [("equal", None)] + [(arm, constants) for arm, all_ in TRIED.items() for constants in all_]
    return [(name, arm, seed, c) for seed in (100, 101, 102) for name in PROBLEMS for arm, c in tried]


def key_of(row: Row) -> tuple[Any, ...]:
    return row["task"], row["arm"], row["index"], tuple(row["constants"]) if "constants" in row else None


Found = dict[tuple[str, str], dict[int, Row]]
"""(problem, arm) -> seed -> row"""


def by_arm(found: Sequence[Row]) -> Found:
    """Return the rows of seeds below 100, with "best of 9", the best on T2 of the constant ratios."""
    arms: Found = {}
    for row in found:
        if row["index"] < 100:
            arms.setdefault((row["task"], row["arm"]), {})[row["index"]] = row
    for name in PROBLEMS:
        grid = [arms.get((name, arm), {}) for arm in ("equal", *STATIC)]
        for seed in set.intersection(*(set(rows_) for rows_ in grid)):
            tried = [rows_[seed] for rows_ in grid]
            arms.setdefault((name, "best of 9"), {})[seed] = min(tried, key=lambda row: row["valid"]["goal"])
    return arms


def of_ratios(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the geometric mean, and the ends of its 95 % bootstrap interval."""
    mean, low, high = np.exp(interval(np.log(values).tolist())).tolist()
    return mean, low, high


def ratios(arms: Found, name: str, arm: str) -> list[float]:
    """Return the test goals over those of equal weights, one per seed that has both."""
    equal, own = arms.get((name, "equal"), {}), arms.get((name, arm), {})
    return [own[seed]["test"]["goal"] / equal[seed]["test"]["goal"] for seed in sorted(own) if seed in equal]


def results(found: Sequence[Row]) -> str:
    """Return the tables."""
    arms, names = by_arm(found), list(PROBLEMS)
    head = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines = [
        "Test loss over that of equal weights, geometric mean over the seeds, 95 % bootstrap interval",
        "",
    ]
    lines += head
    for arm in SHOWN[1:]:
        cells = []
        for name in names:
            values = ratios(arms, name, arm)
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*of_ratios(values)) if values else "-")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += [
        "",
        "Test error of the main task: share misclassified, or squared error over variance",
        "",
        *head,
    ]
    for arm in SHOWN:
        errors = [[r["test"]["errors"][0] for r in arms.get((name, arm), {}).values()] for name in names]
        lines.append(f"| {arm} | {' | '.join(f'{np.mean(e):.4f}' if e else '-' for e in errors)} |")
    lines += ["", "Last share of the main task's weight, mean", "", *head]
    for arm in SHOWN:
        last = [[r["shares"][-1] for r in arms.get((name, arm), {}).values()] for name in names]
        lines.append(f"| {arm} | {' | '.join(f'{np.mean(s):.3f}' if s else '-' for s in last)} |")
    return "\n".join(lines)


def tuning(found: Sequence[Row]) -> str:
    """Return T2 losses over those of equal weights, by constant; geometric means over seeds 100 to 102."""
    of_tuning = {key_of(row): row["valid"]["goal"] for row in found if row["index"] >= 100}
    lines = [
        "| method | constants | " + " | ".join(PROBLEMS) + " | all |",
        "|---" * (len(PROBLEMS) + 3) + "|",
    ]
    for arm, all_ in TRIED.items():
        for constants in all_:
            logs = [
                [
                    np.log(of_tuning[name, arm, seed, constants] / of_tuning[name, "equal", seed, None])
                    for seed in (100, 101, 102)
                    if {(name, arm, seed, constants), (name, "equal", seed, None)} <= of_tuning.keys()
                ]
                for name in PROBLEMS
            ]
            if all(logs):
                cells = [f"{np.exp(np.mean(log)):.3f}" for log in [*logs, list(chain(*logs))]]
                lines.append(f"| {arm} | {', '.join(map(str, constants))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(path: Path, found: Sequence[Row]) -> None:
    """Draw the losses over those of equal weights, and the main task's share over the steps."""
    arms = by_arm(found)
    fig = Figure(figsize=(15, 6), layout="constrained")
    axes = fig.subplots(2, len(PROBLEMS), squeeze=False)
    for (upper, lower), name in zip(axes.T, PROBLEMS, strict=True):
        odds = [10.0**e for e in sorted([0, *STATIC.values()])]
        grid = [ratios(arms, name, arm) for arm in sorted(["equal", *STATIC], key=lambda a: STATIC.get(a, 0))]
        if all(grid):
            upper.plot(
                odds, [of_ratios(values)[0] for values in grid], ".-", color="0.6", label="constant ratio"
            )
        for n, arm in enumerate(MOVING):
            own = list(arms.get((name, arm), {}).values())
            if not own:
                continue
            shares = np.array([row["shares"] for row in own])
            odds_of = np.exp(np.log(shares / (1 - shares)).mean(0))
            level = of_ratios(ratios(arms, name, arm))
            error = [[level[0] - level[1]], [level[2] - level[0]]]
            upper.errorbar(odds_of.mean(), level[0], error, fmt="o", color=f"C{n}", label=arm, capsize=3)
            lower.plot(EACH * np.arange(len(odds_of)), odds_of, color=f"C{n}")
        alone = ratios(arms, name, "main alone")
        if alone:
            upper.axhline(of_ratios(alone)[0], color="0.6", ls=":", label="main alone")
        upper.axhline(1, color="0.8", lw=1)
        upper.set(title=name, xscale="log", xlabel="mean of main / other")
        lower.set(yscale="log", xlabel="step", ylim=(1e-3, 1e3))
    axes[0, 0].set_ylabel("test loss / that of equal weights")
    axes[1, 0].set_ylabel("weight of main / other")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    fig.savefig(path.with_suffix(".png"), dpi=100)


def main() -> None:
    parser = parser_of(__doc__, ROWS)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--arms", nargs="+", choices=TRAINED, default=TRAINED, metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--tune", action="store_true", help="try constants of the other rules")
    parser.add_argument("--figure", action="store_true", help="run nothing; draw the figure")
    options = parser.parse_args()
    path = options.rows
    if not (options.table or options.figure):
        mnist()  # downloads before the workers start
        jobs = (
            tuning_jobs()
            if options.tune
            else [(n, a, s, None) for a in options.arms for s in options.seeds for n in options.problems]
        )
        done = {key_of(row) for row in rows(path)}
        compute(path, [job for job in jobs if job not in done], run, options.workers)
    found = rows(path)
    if options.figure:
        figure(path, found)
    print(tuning(found) if options.tune else results(found))


if __name__ == "__main__":
    main()
