r"""Measure bias and spread of estimators of the derivative with respect to a dropout rate.

    python benchmarks/dropout_gradient.py        # a few minutes on one core

A 4-8-3 tanh network has 2^8 masks of its hidden layer. For any f(mask), enumeration gives the exact

    d/dp E f = d/dp sum_m p^(dropped) (1 - p)^(kept) f(m / (1 - p)).

f is the training loss, or <w, dloss/dtheta>, which a hypergradient differentiates. Each estimator returns
f'(mask) d mask/dp for one drawn mask:

* trapezoid: exact Bernoulli masks, d mask/dp = (mask - 1) / (2 p (1 - p)); used by `midflight.nn.Dropout`;
* concrete: a relaxed mask (Gal et al. 2017, Eq. 5) at a temperature;
* concrete, straight through: exact Bernoulli masks with the derivative of the relaxed mask.

The bias is |mean - truth| / |truth|. The spread is the standard deviation of one draw / |truth|. The
trapezoid is enumerated; the others use 50,000 draws (the standard error of their bias is spread / 220). The
table shows medians over networks.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

UNITS, DRAWS, NETWORKS = 8, 50_000, 16
MASKS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=UNITS)), dtype=torch.float64)
Objective = Callable[[Tensor], Tensor]


def objectives(examples: int, gain: float) -> dict[str, Objective]:
    """Return functions f: masks, shape (n, UNITS), scaled by 1 / (1 - p) -> values, shape (n,)."""
    x = torch.randn(examples, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (examples,))
    w1, w2 = (gain * torch.randn(s, dtype=torch.float64) / s[1] ** 0.5 for s in ((UNITS, 4), (3, UNITS)))
    u1, u2 = torch.randn_like(w1), torch.randn_like(w2)

    def loss(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(((x @ a.T).tanh() * mask) @ b.T, y)

    def along(mask: Tensor) -> Tensor:
        g1, g2 = torch.func.grad(loss, argnums=(1, 2))(mask, w1, w2)
        return (u1 * g1).sum() + (u2 * g2).sum()

    return {
        "loss": lambda masks: torch.vmap(lambda m: loss(m, w1, w2))(masks),
        "<w, gradient>": torch.vmap(along),
    }


def weights(p: Tensor) -> Tensor:
    """Return the probability of each row of MASKS."""
    return torch.where(MASKS > 0, 1 - p, p).prod(1)


def truth(f: Objective, rate: float) -> float:
    p = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((weights(p) * f(MASKS / (1 - p))).sum(), p)
    return float(slope)


def slopes(f: Objective, masks: Tensor, tangents: Tensor) -> Tensor:
    """Return f'(mask) . tangent for each row."""
    slope: Tensor = torch.func.jvp(f, (masks,), (tangents,))[1]
    return slope


def trapezoid(f: Objective, rate: float) -> tuple[float, float]:
    masks = MASKS / (1 - rate)
    found, q = slopes(f, masks, (masks - 1) / (2 * rate * (1 - rate))), weights(torch.tensor(rate))
    mean = (q * found).sum()
    return float(mean), float((q * (found - mean) ** 2).sum().sqrt())


def concrete(f: Objective, rate: float, temperature: float, hard: bool) -> tuple[float, float]:
    u = torch.rand(DRAWS, UNITS, dtype=torch.float64)

    def relaxed(p: Tensor) -> Tensor:
        dropped = ((p.logit() + u.logit()) / temperature).sigmoid()
        return (1 - dropped) / (1 - p)

    p = torch.tensor(rate, dtype=torch.float64)
    masks, tangents = torch.func.jvp(relaxed, (p,), (torch.ones_like(p),))
    if hard:
        kept = (u < 1 - rate).double()
        masks = kept / (1 - p)
    found = torch.cat(
        [slopes(f, m, t) for m, t in zip(masks.split(20_000), tangents.split(20_000), strict=True)]
    )
    return float(found.mean()), float(found.std())


ESTIMATORS: dict[str, Callable[[Objective, float], tuple[float, float]]] = {
    "trapezoid": trapezoid,
    "concrete, temperature 0.1": lambda f, p: concrete(f, p, 0.1, hard=False),
    "concrete, temperature 0.5": lambda f, p: concrete(f, p, 0.5, hard=False),
    "concrete 0.1, straight through": lambda f, p: concrete(f, p, 0.1, hard=True),
    "concrete 0.5, straight through": lambda f, p: concrete(f, p, 0.5, hard=True),
}


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'f':>14} {'gain':>5} {'rate':>5}   {'estimator':31} {'bias':>7} {'spread':>7} {'sign':>5}")
    for gain, rate in itertools.product((1.0, 3.0), (0.1, 0.5, 0.8)):
        rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for seed in range(NETWORKS):
            torch.manual_seed(seed)
            for name, f in objectives(examples=16, gain=gain).items():
                true = truth(f, rate)
                for estimator, estimate in ESTIMATORS.items():
                    mean, spread = estimate(f, rate)
                    row = (abs(mean - true) / abs(true), spread / abs(true), float(mean * true > 0))
                    rows.setdefault((name, estimator), []).append(row)
        for (name, estimator), found in sorted(rows.items()):
            table = torch.tensor(found)
            bias, spread = table[:, :2].median(0).values.tolist()
            sign = float(table[:, 2].mean())
            print(f"{name:>14} {gain:5} {rate:5}   {estimator:31} {bias:7.3f} {spread:7.2f} {sign:5.0%}")


if __name__ == "__main__":
    main()
