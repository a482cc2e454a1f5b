"""An LSTM forecasts a noisy chaotic series: weight decay and the noise on its inputs and states, tuned.

    python examples/lstm.py            # a minute or two
    python examples/lstm.py --quick

The next value of a Mackey-Glass series, seen through noise, from the 30 before it. 250 values train, many
times over. The start has next to no regularisation, so the network learns the noise by heart. The tuned run
ends with the best of its last and its averaged weights on the validation data; the other two with their last.
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
    """Windows of 30 values and the next: of 250 values to train on, 1,000 that tune, 1,000 to report on."""
    x = [1.2] * 18  # Euler's steps of x' = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x
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
    """A network trained from seed 0 with the values of `space`, which move if `tune`."""
    torch.manual_seed(0)
    model = Forecaster(space)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    loader = DataLoader(windows, batch_size=32, shuffle=True)
    tuner = mf.Tuner(
        model, optimizer, space, squared_error, loader, valid.split(250),
        schedule=5, total_steps=epochs * len(loader),
    )  # fmt: skip
    if not tune:
        tuner.detach()  # the optimiser keeps the values of the space

    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()
    tuner.finish()
    return model.eval()


def main(quick: bool = False) -> dict[str, Any]:
    epochs = 40 if quick else 250
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
    torch.set_num_threads(1)  # more would only get into each other's way on networks this small
    main(**vars(parser.parse_args()))
