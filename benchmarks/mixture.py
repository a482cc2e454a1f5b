"""Compare ways to set the weights of eight sources of text, for a small Transformer and a target text.

    python benchmarks/mixture.py                         # everything, seeds 0 to 2; resumes
    python benchmarks/mixture.py --workers 2
    python benchmarks/mixture.py --pairs german/scarce --arms midflight uniform
    python benchmarks/mixture.py --tune                  # steps of FastMix and DGA, on other targets
    python benchmarks/mixture.py --agreement             # cosine of each rule's direction with the true one
    python benchmarks/mixture.py --table                 # run nothing; print the tables
    python benchmarks/mixture.py --figure                # run nothing; draw the figure
    python benchmarks/mixture.py --large --rows FILE     # 55 million weights, bf16, compiled; needs a GPU

The sources are eight texts of benchmarks/texts.py: manual pages in six languages, Python and C++. The targets
are German pages (one of the sources), Dutch pages (none of them), and a blend of Python code and French
pages. A target has validation data, T2, and a test set. A pair is a target with a regime: "ample" has up to
8 MB of a source, "scarce" 1 % of that.

Model: a Transformer on bytes with hashed embeddings, 1.19 million weights; AdamW with warm-up, cosine
schedule and clipping; 600 steps. All arms of a pair share initial weights, and draw 1,024 bytes a step by
their weights.

arm         weights of the sources
uniform     equal
natural     proportional to their sizes
midflight   `mf.Mixture` with its defaults, one run
FastMix     Tan et al. 2026; its step was chosen with --tune, like that of DGA
DGA         Fan et al. 2024
DoReMi      Xie et al. 2023: a reference model, a proxy, and the final run; three trainings
TPE         the best of 16 static mixtures on T2, proposed by Optuna; 16 trainings

T2 has 16 kB; rules read it to tune, and TPE to choose. The test loss, in bits per byte, is that of the last
weights. A training with static weights does not read the target, so the arms and targets of a regime share
its row. `seconds` counts it each time. The table's times are those of seed 3 on german/ample, which ran
alone and has no other use. Rows: docs/results/mixture.jsonl.
"""

import argparse
import copy
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mixture_rules import Alignment, DoReMi, FastMix, Fixed, alignments
from tasks import RESULTS, Row, append, interval, one_thread, rows
from texts import LARGE, SMALL, SOURCES, Transformer, Windows, bits, losses_of, text
from torch import Tensor, nn
from torch.utils.data import DataLoader

import midflight as mf
from midflight._reporting.machine import machine

ROWS = RESULTS / "mixture.jsonl"
TARGETS = {"german": ["german"], "dutch": ["dutch"], "blend": ["python", "french"]}
"""Name -> texts of the target."""
FOR_TUNING = {"swedish": ["swedish"], "polish": ["polish"], "mix": ["english", "c++"]}
"""Targets on which steps are chosen, with seed 100; they are not reported."""
REGIMES = {"ample": 1.0, "scarce": 0.01}
"""Share of each source that there is."""
PAIRS = [f"{target}/{regime}" for target in TARGETS for regime in REGIMES]
ARMS = ["uniform", "natural", "midflight", "FastMix", "DGA", "DoReMi", "TPE"]
TRAININGS = 16
TIMED = 3
"""The seed whose times are reported; its losses are not."""
VALID_BYTES, TEST_BYTES = 16_384, 65_536
OF_EACH = 4
"""Windows of each source in an update of FastMix, DGA and DoReMi."""
STEP_OF = {"FastMix": 0.1, "DGA": 10.0}
STEPS_TRIED = {"FastMix": (0.03, 0.1, 0.3, 1.0), "DGA": (1.0, 10.0, 100.0)}
IS_LARGE = "--large" in sys.argv
SIZE, DEVICE = (LARGE, "cuda") if IS_LARGE else (SMALL, "cpu")


class Problem:
    """The sources of a regime, and T2 and test set of each target."""

    def __init__(self, regime: str) -> None:
        self.regime = regime
        all_ = [text(name)["train"] for name in SOURCES]
        share = REGIMES[regime]
        self.sources = [Windows([data], SIZE.context, int(share * len(data))) for data in all_]
        self.valid = {target: _joined(target, "valid", VALID_BYTES) for target in (*TARGETS, *FOR_TUNING)}
        self.test = {target: _joined(target, "test", TEST_BYTES) for target in TARGETS}


def _joined(target: str, part: str, length: int) -> Windows:
    texts = [text(name)[part] for name in (TARGETS | FOR_TUNING)[target]]
    return Windows(texts, SIZE.context, min(length // len(texts), *(len(data) for data in texts)))


def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return losses_of(model, batch[0].to(DEVICE)).mean()


class Run:
    """A training, whose steps draw the sources by `mixture`."""

    def __init__(self, problem: Problem, target: str, seed: int, steps: int = SIZE.steps) -> None:
        torch.manual_seed(seed)
        self.problem, self.target, self.steps = problem, target, steps
        self.model = Transformer(SIZE).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=SIZE.lr, weight_decay=0.1, fused=True)
        warm_up = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda n: min((n + 1) / warm_up, 0.5 + 0.5 * np.cos(np.pi * min(1.0, n / steps))),
        )
        self.mixture = mf.Mixture(SOURCES, ratio=1e6, floor=0.0)
        self.history: list[list[float]] = []
        if IS_LARGE:
            self.model.compile()

    def batches(self) -> DataLoader[Any]:
        return self.mixture.loader(self.problem.sources, SIZE.batch)

    def train(self, rule: Any = None) -> None:
        """Train; a rule sets the weights and moves them every `rule.every` steps."""
        if rule is not None:
            self.mixture.set(rule.weights)
        for step, batch in zip(range(self.steps), _again(self.batches()), strict=False):
            if rule is not None and rule.every and step % rule.every == 0:
                rule.update(self.model, self.losses, list(self.model.last.parameters()))
                self.mixture.set(rule.weights.clamp(min=1e-5))
            self.optimizer.zero_grad()
            self.loss(self.model, batch).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            if (step + 1) % 10 == 0:
                self.history.append([round(w, 4) for w in self.mixture.tolist()])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        windows, drawn = batch
        with torch.autocast(DEVICE, torch.bfloat16, enabled=IS_LARGE):
            return self.mixture.loss(losses_of(model, windows.to(DEVICE)), drawn)

    def losses(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the losses that the other rules read."""
        windows = torch.cat([_some(data, OF_EACH) for data in self.problem.sources]).to(DEVICE)
        target = loss_of(model, (_some(self.problem.valid[self.target], SIZE.batch),))
        return losses_of(model, windows).view(-1, OF_EACH).mean(1), target

    def tuner(self) -> mf.Tuner:
        """Tune the mixture by midflight, with the defaults of `mf.Mixture`."""
        self.mixture = mf.Mixture(SOURCES)
        t2 = DataLoader(self.problem.valid[self.target], SIZE.batch, shuffle=True)
        return mf.Tuner(
            self.model, self.optimizer, mf.Space(mixture=self.mixture), self.loss, self.batches(), t2,
            valid_loss_fn=loss_of, total_steps=self.steps, max_grad_norm=1.0,
        )  # fmt: skip


def _again(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _some(data: Windows, n: int) -> Tensor:
    return torch.stack([data[int(i)][0] for i in torch.randint(len(data), (n,))])


Outcome = dict[str, Any]
""""losses": target -> [T2, test] in bits per byte; "seconds"; "weights": those of every tenth step"""


def trained(run: Run, rule: Any = None) -> Outcome:
    """Train and return the outcome; without a rule, midflight tunes the mixture."""
    began = time.perf_counter()
    tuner = run.tuner() if rule is None else None
    run.train(rule)
    if tuner is not None:
        tuner.detach()  # the last weights, as in the other arms
    seconds = time.perf_counter() - began
    problem = run.problem
    losses = {
        target: [bits(run.model, valid), bits(run.model, problem.test[target]) if target in TARGETS else None]
        for target, valid in problem.valid.items()
    }
    return {"losses": losses, "seconds": round(seconds, 1), "weights": run.history}


class Arms:
    """Trains the arms of a target, regime and seed; static trainings are looked up in the rows first."""

    def __init__(self, path: Path, pair: str, seed: int) -> None:
        self.path, self.seed = path, seed
        self.target, self.regime = pair.split("/")
        self.problem = Problem(self.regime)

    def run(self, arm: str) -> Outcome:
        if arm == "midflight":
            return trained(self._new())
        if arm in ("FastMix", "DGA"):
            return trained(self._new(), moving(arm))
        return {"uniform": self.uniform, "natural": self.natural, "DoReMi": self.doremi, "TPE": self.tpe}[
            arm
        ]()

    def _new(self) -> Run:
        return Run(self.problem, self.target, self.seed)

    def static(self, weights: Tensor) -> Outcome:
        shares = [round(w, 4) for w in (weights / weights.sum()).tolist()]
        return self._once("static", shares, lambda: trained(self._new(), Fixed(torch.tensor(shares))))

    def _once(self, name: str, shares: list[float], work: Callable[[], Outcome]) -> Outcome:
        """Return the outcome of the stored row, else compute and store it."""
        key = {"task": f"any/{self.regime}", "arm": name, "index": self.seed, "shares": shares}
        for row in rows(self.path):
            if key.items() <= row.items():
                return row
        outcome = work() | {"weights": [shares]}
        append(self.path, key | outcome)
        return outcome

    def uniform(self) -> Outcome:
        return self.static(torch.ones(len(SOURCES)))

    def natural(self) -> Outcome:
        return self.static(torch.tensor([float(len(data)) for data in self.problem.sources]))

    def doremi(self) -> Outcome:
        """Train a reference model, then a proxy that moves the weights; train with the proxy's mean."""
        found = self._once("DoReMi's weights", [], self._doremi)
        final = self.static(torch.tensor(found["found"]))
        return final | {"seconds": final["seconds"] + found["seconds"]}

    def _doremi(self) -> Outcome:
        began = time.perf_counter()
        reference = Run(self.problem, self.target, self.seed + 1000)
        reference.train(Fixed(torch.ones(len(SOURCES))))
        rule = DoReMi(len(SOURCES), reference.model)
        self._new().train(rule)
        return {"found": rule.mean.tolist(), "seconds": round(time.perf_counter() - began, 1)}

    def tpe(self) -> Outcome:
        """Return the best of 16 static mixtures on T2, proportional to numbers in [0.001, 1]."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(multivariate=True, seed=self.seed))
        tried: list[Outcome] = []

        def objective(trial: optuna.Trial) -> float:
            weights = torch.tensor([trial.suggest_float(name, 1e-3, 1, log=True) for name in SOURCES])
            tried.append(self.static(weights))
            return float(tried[-1]["losses"][self.target][0])

        study.enqueue_trial(dict.fromkeys(SOURCES, 1.0))
        study.optimize(objective, TRAININGS)
        return tried[study.best_trial.number] | {"seconds": sum(outcome["seconds"] for outcome in tried)}


def moving(arm: str, step: float | None = None) -> Any:
    rule = {"FastMix": FastMix, "DGA": Alignment}[arm]
    return rule(len(SOURCES), STEP_OF[arm] if step is None else step)


def run_arm(path: Path, pair: str, arm: str, seed: int) -> Row:
    """Return the row of an arm on a pair."""
    one_thread()
    arms = Arms(path, pair, seed)
    outcome = arms.run(arm)
    valid, test = outcome["losses"][arms.target]
    return {
        "task": pair, "arm": arm, "index": seed, "seconds": outcome["seconds"], "valid": valid, "test": test,
        "weights": outcome["weights"],
    }  # fmt: skip


def tuned_step(pair: str, arm: str, step: float) -> Row:
    """Return the row of a rule with a step on a pair for tuning."""
    one_thread()
    target, regime = pair.split("/")
    outcome = trained(Run(Problem(regime), target, 100), moving(arm, step))
    return {"task": pair, "arm": arm, "index": 100, "step": step, "valid": outcome["losses"][target][0]}


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
    one_thread()
    target_name, regime = pair.split("/")
    problem = Problem(regime)
    run = Run(problem, target_name, seed)
    run.steps = after
    run.train(Fixed(torch.ones(len(SOURCES))))
    model, states = run.model.double(), run.optimizer.state
    for state in states.values():
        state.update({name: x.double() for name, x in state.items() if name != "step"})
    mixture = mf.Mixture(SOURCES)
    space = mf.Space(mixture=mixture, dtype=torch.float64)
    run.mixture = mixture
    batch = next(iter(mixture.loader(problem.sources, OF_EACH * len(SOURCES), by="loss")))
    target = (_some(problem.valid[target_name], SIZE.batch),)
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


def tests_of(found: Sequence[Row]) -> dict[tuple[str, str], dict[int, float]]:
    """Return (pair, arm) -> seed -> test loss."""
    tests: dict[tuple[str, str], dict[int, float]] = {}
    for row in found:
        if "test" in row and row["index"] != TIMED:
            tests.setdefault((row["task"], row["arm"]), {})[row["index"]] = row["test"]
    return tests


def table(found: Sequence[Row]) -> str:
    """Return the test losses, their differences from midflight's, and the time over uniform's."""
    tests = tests_of(found)
    pairs = [pair for pair in PAIRS if any(pair == task for task, _ in tests)]
    head = ["| target/amount | " + " | ".join(ARMS) + " |", "|---" * (len(ARMS) + 1) + "|"]
    lines = ["Test loss, bits per byte, mean over the seeds", "", *head]
    for pair in pairs:
        means = {arm: np.mean(list(tests[pair, arm].values())) for arm in ARMS if (pair, arm) in tests}
        best = min(means.values())
        cells = [
            "-"
            if arm not in means
            else f"**{means[arm]:.3f}**"
            if means[arm] == best
            else f"{means[arm]:.3f}"
            for arm in ARMS
        ]
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    seconds = {r["arm"]: r["seconds"] for r in found if r["index"] == TIMED and "test" in r}
    if "uniform" in seconds:
        times = [f"{seconds[arm] / seconds['uniform']:.2f}" if arm in seconds else "-" for arm in ARMS]
        lines.append(f"| time / uniform | {' | '.join(times)} |")
    lines += ["", "Peer minus midflight, with a 95 % bootstrap interval over the seeds", "", *head]
    for pair in pairs:
        own = tests.get((pair, "midflight"), {})
        cells = []
        for arm in ARMS:
            theirs = tests.get((pair, arm), {})
            both = [theirs[seed] - own[seed] for seed in own if seed in theirs]
            cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval(both)) if both else "-")
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    lines += [
        "",
        "Cosine with the true direction",
        "",
        "| method | least | median | largest |",
        "|---|---|---|---|",
    ]
    for rule in ("FastMix", "DGA", "midflight"):
        cosines = [row[rule] for row in found if row["task"] == "agreement"]
        if cosines:
            lines.append(f"| {rule} | {min(cosines):.2f} | {np.median(cosines):.2f} | {max(cosines):.2f} |")
    return "\n".join(lines)


def figure(path: Path, found: Sequence[Row]) -> None:
    """Draw the test losses of all arms, and midflight's mixtures over time as stacked areas."""
    tests = tests_of(found)
    shown = {row["task"]: row for row in found if row["arm"] == "midflight" and row["index"] == 0}
    fig = Figure(figsize=(14, 5.5), layout="constrained")
    axes = fig.subplots(2, len(PAIRS), squeeze=False)
    for column, pair in enumerate(PAIRS):
        upper, lower = axes[:, column]
        for place, arm in enumerate(ARMS):
            values = list(tests.get((pair, arm), {}).values())
            upper.plot(values, [place] * len(values), "o", ms=4, color="C3" if arm == "midflight" else "C0")
        upper.set(title=pair, xlabel="test loss, bits per byte")
        upper.set_yticks(range(len(ARMS)), ARMS if column == 0 else [""] * len(ARMS))
        upper.invert_yaxis()
        if pair in shown:
            shares = np.array(shown[pair]["weights"]).T
            lower.stackplot(10 * np.arange(1, shares.shape[1] + 1), shares, labels=SOURCES)
            lower.set(xlabel="step", ylim=(0, 1), xlim=(10, 10 * shares.shape[1]))
    axes[1, 0].set_ylabel("weight, midflight")
    handles = axes[1, 0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=len(SOURCES), fontsize=8)
    fig.savefig(path.with_suffix(".png"), dpi=110)


def compute(path: Path, work: Callable[..., Row], jobs: Sequence[tuple[Any, ...]], workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for future in [pool.submit(work, *job) for job in jobs]:
            row = future.result()
            append(path, row)
            print({name: value for name, value in row.items() if name != "weights"}, flush=True)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS, metavar="TARGET/REGIME")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--large", action="store_true", help="train the large model on a GPU")
    parser.add_argument("--tune", action="store_true", help="try steps of FastMix and DGA on other targets")
    parser.add_argument("--agreement", action="store_true", help="print each rule's cosine with the truth")
    parser.add_argument("--table", action="store_true", help="run nothing; print the tables")
    parser.add_argument("--figure", action="store_true", help="run nothing; draw the figure")
    options = parser.parse_args()
    path = options.rows
    found = rows(path)
    if not (options.table or options.figure):
        for name in {*SOURCES, *(name for texts in (TARGETS | FOR_TUNING).values() for name in texts)}:
            text(name)  # downloads before the workers start
        append(path, {"machine": machine(), "size": str(SIZE)})
    if options.tune:
        done = {(r["task"], r["arm"], r.get("step")) for r in found}
        pairs = [f"{target}/{regime}" for target in FOR_TUNING for regime in REGIMES]
        tried = [(pair, arm, s) for pair in pairs for arm, all_ in STEPS_TRIED.items() for s in all_]
        compute(path, tuned_step, [job for job in tried if job not in done], options.workers)
        return
    if options.agreement:
        jobs = [(p, s, n) for p in options.pairs for s in options.seeds for n in (20, 100, SIZE.steps - 10)]
        done = {(r["arm"], r["index"], r.get("after")) for r in found}
        compute(path, agreement, [job for job in jobs if job not in done], options.workers)
        return
    if not (options.table or options.figure):
        done = {(r["task"], r["arm"], r["index"]) for r in found}
        jobs = [(p, a, s) for s in options.seeds for a in options.arms for p in options.pairs]
        compute(path, partial(run_arm, path), [job for job in jobs if job not in done], options.workers)
    if options.figure:
        figure(path, found)
    print(table(rows(path)))


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
