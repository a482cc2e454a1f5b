"""What a hypergradient is
=======================

Draw the validation loss after one step as a function of weight decay, and the slope that midflight computes::

    python examples/hypergradient.py            # a second; needs midflight[study]
    python examples/hypergradient.py --save hypergradient.png
"""

import argparse
import copy

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def main(save: str | None = None) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(400, 20, dtype=torch.float64)
    y = (x[:, 0] + torch.randn(400) > 0).long()
    train, valid = (x[:40], y[:40]), (x[40:], y[40:])
    model = nn.Linear(20, 2).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model, train).backward()
        optimizer.step()

    for _ in range(60):  # until the model has memorised a little
        step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def loss_after(weight_decay: float) -> float:
        model.load_state_dict(before[0])
        optimizer.load_state_dict(copy.deepcopy(before[1]))
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        step()
        return float(loss_fn(model, valid).detach())

    here = 10.0
    decays = torch.linspace(0, 25, 51).tolist()
    curve = [loss_after(decay) for decay in decays]
    difference = (loss_after(here + 1e-4) - loss_after(here - 1e-4)) / 2e-4

    model.load_state_dict(before[0])
    optimizer.load_state_dict(copy.deepcopy(before[1]))
    space = mf.Space(weight_decay=mf.Float(0.0, 25.0, init=here), dtype=torch.float64)
    found: list[float] = []
    tuner = mf.Tuner(
        model, optimizer, space, loss_fn, [train], [valid], schedule=1, horizon="step",
        on_hyperstep=lambda step, numbers: found.append(numbers["hypergradient/weight_decay"] / 25),
    )  # fmt: skip
    step()
    tuner.detach()
    print(f"hypergradient {found[0]:.8f}, central difference {difference:.8f}")

    fig, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(decays, curve, label="validation loss after one step")
    ends = torch.tensor([here - 4, here + 4])
    axes.plot(ends, loss_after(here) + found[0] * (ends - here), "C1", lw=3, label="hypergradient")
    axes.plot([here], [loss_after(here)], "C1o")
    axes.set_title("The hypergradient is the slope")
    axes.set(xlabel="weight decay", ylabel="validation loss after one step")
    axes.legend()
    if save:
        fig.savefig(save, dpi=150)
    return {"hypergradient": found[0], "difference": difference}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", metavar="FILE", help="write the figure to a file")
    parser.add_argument("--quick", action="store_true", help="has no effect; the program is quick")
    main(parser.parse_args().save)
