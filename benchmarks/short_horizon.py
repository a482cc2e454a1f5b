"""Measure how strongly a one-step objective favours small learning rates, and compare remedies.

    python benchmarks/short_horizon.py            # tables, docs/results/short_horizon.json and .png
    python benchmarks/short_horizon.py --table    # tables of the stored numbers
    python benchmarks/short_horizon.py --figure   # also the figure

Noisy quadratic (Wu et al. 2018): loss 1/2 sum_i h_i (theta_i - c_i)^2 with a new c ~ N(0, 1) at each step.
With A_i = E theta_i^2 and learning rate lr

    A_i' = (1 - lr h_i)^2 A_i + lr^2 h_i^2,     E loss = 1/2 sum_i h_i (A_i + 1).

The best lr for one step is sum h_i^2 A_i / sum h_i^3 (A_i + 1). Gradient descent through the recursion finds
the best schedule for the whole run. Both are compared with the best constant rate and with `mf.Tuner` on
simulated weights (many copies in one tensor, so that the validation loss is close to its expectation).

Real task: digits, MLP 64-64, SGD with momentum, 30 epochs, three initial learning rates.
"""

import itertools
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tasks import RESULTS, captioned, markdown, parser_of
from torch import Tensor, nn

import midflight as mf
from midflight._reporting.machine import machine
from midflight.datasets import Shuffled, Split, load
from midflight.hypergrad import ImplicitNeumann, Unrolled

OUT = RESULTS / "short_horizon.json"
CURVATURES = torch.logspace(0, -2, 20)
STEPS, COPIES, LOW, HIGH = 200, 2000, 1e-3, 1.0
ESTIMATORS: dict[str, mf.hypergrad.Estimator] = {
    "one_step": mf.hypergrad.ESTIMATORS["one_step"],
    "unrolled 5": Unrolled(steps=5),
    "unrolled 20": Unrolled(steps=20),
    "implicit_neumann 20": ImplicitNeumann(terms=20),
}


def final_loss(rates: Tensor, moments: Tensor | None = None) -> Tensor:
    """Return the expected loss after the schedule, in closed form; differentiable in the rates."""
    h = CURVATURES
    a = torch.full_like(h, 100.0) if moments is None else moments
    for lr in rates:
        a = (1 - lr * h) ** 2 * a + lr**2 * h**2
    return 0.5 * (h * (a + 1)).sum()


def greedy() -> Tensor:
    """Return the schedule that is best for one step ahead at each step."""
    h, rates = CURVATURES, []
    a = torch.full_like(h, 100.0)
    for _ in range(STEPS):
        lr = (h**2 * a).sum() / (h**3 * (a + 1)).sum()
        a = (1 - lr * h) ** 2 * a + lr**2 * h**2
        rates.append(lr)
    return torch.stack(rates)


def best_constant() -> Tensor:
    """Return the best constant learning rate."""
    grid = torch.logspace(-3, 0, 200)
    losses = torch.stack([final_loss(lr.expand(STEPS)) for lr in grid])
    return grid[losses.argmin()].expand(STEPS)


def best_schedule() -> Tensor:
    """Return the schedule with the lowest final loss, found by Adam through the recursion."""
    raw = best_constant().log().clone().requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.03)
    for _ in range(400):
        optimizer.zero_grad()
        final_loss(raw.exp().clamp(max=1.5)).backward()
        optimizer.step()
    return raw.detach().exp().clamp(max=1.5)


class Targets:
    """Endless batches of c, shape (COPIES, number of curvatures)."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.randn(COPIES, len(CURVATURES))


def tuned(estimator: mf.hypergrad.Estimator) -> tuple[Tensor, float]:
    """Return (schedule, final expected loss) of SGD with a tuned learning rate that starts at 0.3."""
    torch.manual_seed(0)
    weights = nn.Parameter(10 * torch.randn(COPIES, len(CURVATURES)))
    space = mf.Space(lr=mf.Float(LOW, HIGH, log=True, init=0.3))
    optimizer = torch.optim.SGD([weights], lr=0.3)
    model = nn.Module()
    model.register_parameter("weights", weights)

    def loss(model: nn.Module, target: Tensor | float) -> Tensor:
        return 0.5 * (CURVATURES * (model.weights - target) ** 2).sum(1).mean()

    def loss_fn(model: nn.Module, target: Tensor) -> Tensor:
        # a mean over copies would scale each copy's gradient by 1/COPIES
        return COPIES * loss(model, target)

    mf.Tuner(
        model, optimizer, space, loss_fn, Targets(), [0.0], valid_loss_fn=loss, schedule=1, horizon="step",
        estimator=estimator, hyper_optimizer=partial(mf.SignSteps, lr=0.02, agreement=0.0),
    )  # fmt: skip
    rates = []
    for target in itertools.islice(Targets(), STEPS):
        rates.append(float(space["lr"]))
        optimizer.zero_grad()
        loss_fn(model, target).backward()
        optimizer.step()
    return torch.tensor(rates), float(loss(model, 0.0).detach() + 0.5 * CURVATURES.sum())


def digits(start: float, estimator: mf.hypergrad.Estimator | None) -> dict[str, float]:
    """Return the validation loss of an MLP with a learning rate that starts at `start`, tuned or fixed."""
    torch.manual_seed(0)
    data = load("digits")
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    t1, t2 = Split(x[:1000], y[:1000]), Split(x[1000:], y[1000:])
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=start, momentum=0.9)
    space = mf.Space(lr=mf.Float(1e-4, 1.0, log=True, init=start))
    steps = 30 * (1000 // 50)
    batches = [(t2.x[i::4], t2.y[i::4]) for i in range(4)]

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    if estimator is not None:
        mf.Tuner(
            model, optimizer, space, loss_fn, Shuffled(t1, 50, seed=1), batches, schedule=5, horizon="step",
            estimator=estimator, total_steps=steps,
        )  # fmt: skip
    for _ in range(30):
        for batch in torch.randperm(1000).split(50):
            optimizer.zero_grad()
            loss_fn(model, (t1.x[batch], t1.y[batch])).backward()
            optimizer.step()
    with torch.no_grad():
        return {"lr": float(space["lr"]), "valid_loss": float(loss_fn(model, (t2.x, t2.y)))}


STARTS = (3e-4, 1e-2, 0.3)


def main() -> None:
    """Measure, print and store."""
    options = parser_of(__doc__, workers=False, figure=True).parse_args()
    if not (options.table or options.figure):
        measure()
    found = json.loads(OUT.read_text())
    quadratic = [
        [name, f"{r['final_loss']:.2f}", f"{sum(r['rates']) / len(r['rates']):.3f}"]
        for name, r in found["quadratic"].items()
    ]
    digits = [
        [name, *(f"{r['valid_loss']:.3f} ({r['lr']:.4f})" for r in row.values())]
        for name, row in found["digits"].items()
    ]
    tables = {
        "Noisy quadratic": markdown(["learning rate", "final loss", "mean learning rate"], quadratic),
        "Validation loss (last learning rate), by initial learning rate": markdown(
            ["learning rate", *(f"from {start}" for start in STARTS)], digits
        ),
    }
    print(captioned(tables))
    if not options.table:
        draw(found["quadratic"]).savefig(OUT.with_suffix(".png"), dpi=150)


def measure() -> None:
    """Store the schedules of the noisy quadratic, and the losses of digits."""
    torch.set_num_threads(1)
    schedules = {
        "best schedule": best_schedule(),
        "best constant": best_constant(),
        "greedy, closed form": greedy(),
    }
    losses = {name: float(final_loss(rates)) for name, rates in schedules.items()}
    for name, estimator in ESTIMATORS.items():
        schedules[f"midflight {name}"], losses[f"midflight {name}"] = tuned(estimator)
    real: dict[str, dict[str, Any]] = {"fixed": {str(s): digits(s, None) for s in STARTS}}
    for name, estimator in ESTIMATORS.items():
        real[name] = {str(s): digits(s, estimator) for s in STARTS}
    kept = {
        "machine": machine(),
        "quadratic": {
            n: {"final_loss": losses[n], "rates": [round(x, 4) for x in r.tolist()]}
            for n, r in schedules.items()
        },
        "digits": real,
    }
    OUT.write_text(json.dumps(kept) + "\n")


def draw(found: dict[str, Any]) -> Figure:
    """Draw the learning rates over the steps; the labels show the final losses."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, row), colour in zip(found.items(), plot_colours(), strict=False):
        dashed = "--" if not name.startswith("midflight") else "-"
        axes.plot(row["rates"], dashed, color=colour, label=f"{name}: final loss {row['final_loss']:.1f}")
    axes.set(yscale="log", xlabel="step", ylabel="learning rate", ylim=(LOW, 2))
    axes.set_title("Looking one step ahead shrinks the learning rate (noisy quadratic)", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def plot_colours() -> list[str]:
    """Return Okabe and Ito's palette, safe for colour-blind readers."""
    return ["#000000", "#7f7f7f", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7"]


if __name__ == "__main__":
    main()
