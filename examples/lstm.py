"""An LSTM
=======

Tune weight decay and the noise on inputs and states of an LSTM that forecasts a noisy chaotic series::

    python examples/lstm.py            # one to two minutes
    python examples/lstm.py --quick

The LSTM predicts a noisy Mackey-Glass series from its last 30 values, trained on 250 values for many epochs.
Initially there is almost no regularisation, so the network overfits the noise. The tuned run keeps its last
or averaged weights, whichever has the lower validation loss; the other two keep their last.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import midflight as mf

PAST = 30


def data() -> tuple[Tensor, ...]:
    """Return windows of 31 values from 250 training, 1,000 validation and 1,000 test values."""
    x = [1.2] * 18  # Euler steps of x' = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x
    while len(x) < 2850:
        x.append(0.9 * x[-1] + 0.2 * x[-18] / (1 + x[-18] ** 10))
    series = torch.tensor(x[600:])
    series = (series - series.mean()) / series.std()
    series += 0.3 * torch.randn(len(series), generator=torch.Generator().manual_seed(0))
    return tuple(part.unfold(0, PAST + 1, 1) for part in series.split([250, 1000, 1000]))


class Forecaster(nn.Module):
    def __init__(self, space: mf.Space) -> None:
        super().__init__()
        self.input_noise = mf.nn.GaussianNoise(space["input_noise"])
        self.lstm = nn.LSTM(1, 64, batch_first=True)
        self.hidden_noise = mf.nn.GaussianNoise(space["hidden_noise"])
        self.out = nn.Linear(64, 1)

    def forward(self, past: Tensor) -> Tensor:
        states, _ = self.lstm(self.input_noise(past)[..., None])
        return self.out(self.hidden_noise(states[:, -1]))[:, 0]


def squared_error(model: nn.Module, windows: Tensor) -> Tensor:
    return F.mse_loss(model(windows[:, :-1]), windows[:, -1])


def train(space: mf.Space, windows: Tensor, valid: Tensor, epochs: int, tune: bool) -> nn.Module:
    """Train a network from seed 0 with the values of `space`; tune them if `tune`."""
    torch.manual_seed(0)
    model = Forecaster(space)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    loader = DataLoader(windows, batch_size=32, shuffle=True)
    tuner = mf.Tuner(
        model, optimizer, space, squared_error, loader, valid.split(250),
        schedule=5, total_steps=epochs * len(loader),
    )  # fmt: skip
    if not tune:
        tuner.detach()  # the optimiser keeps the initial values

    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()
    tuner.finish()
    return model.eval()


def main(quick: bool = False) -> dict[str, Any]:
    epochs = 20 if quick else 250
    windows, valid, test = data()
    space = mf.Space(
        weight_decay=mf.Float(1e-6, 1e-1, log=True, init=1e-5),
        input_noise=mf.Float(0.0, 1.0, init=0.02),
        hidden_noise=mf.Float(0.0, 1.0, init=0.02),
    )
    start = space.as_dict()
    models = {"fixed": train(space, windows, valid, epochs, tune=False)}
    models["tuned"] = train(space, windows, valid, epochs, tune=True)
    end = space.as_dict()
    models["re-run"] = train(space, windows, valid, epochs, tune=False)

    print("\n".join(f"{name:17} {start[name]:8.3g} -> {end[name]:.3g}" for name in space))
    with torch.no_grad():
        losses = {name: float(squared_error(model, valid)) for name, model in models.items()}
        tested = {name: float(squared_error(model, test)) for name, model in models.items()}
    print("validation loss  ", "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    print("test loss        ", "  ".join(f"{name} {loss:.4f}" for name, loss in tested.items()))
    return {"start": start, "end": end, "valid": losses, "test": tested}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shortened run")
    torch.set_num_threads(1)  # faster for small networks
    main(**vars(parser.parse_args()))
