"""A network for a table
=====================

Tune eight hyperparameters of five kinds at once: an MLP on scikit-learn's breast cancer table::

    python examples/tabular.py            # about 20 seconds; needs scikit-learn
    python examples/tabular.py --quick

Kinds: options of Adam (weight decay, learning rate, beta1), noise on inputs and hidden units, dropout, label
smoothing, and an L1 penalty. The network trains on 100 rows and tunes on 200 others. The tuned run keeps its
last or averaged weights, whichever has the lower validation loss; the other two keep their last.

A one-step hypergradient favours small learning rates, so give `lr` a range in which every value works.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf

Split = tuple[Tensor, Tensor]


def data() -> tuple[Split, Split, Split]:
    """Return 100 training, 200 validation and 269 test rows, standardised by the training rows."""
    x, y = load_breast_cancer(return_X_y=True)
    train_x, x, train_y, y = train_test_split(x, y, train_size=100, stratify=y, random_state=0)
    valid_x, test_x, valid_y, test_y = train_test_split(x, y, train_size=200, stratify=y, random_state=0)
    mean, std = train_x.mean(0), train_x.std(0)

    def split(x: Any, y: Any) -> Split:
        return torch.tensor((x - mean) / std, dtype=torch.float32), torch.tensor(y)

    return split(train_x, train_y), split(valid_x, valid_y), split(test_x, test_y)


def search_space() -> mf.Space:
    """Return untuned initial values: near Adam's defaults, with almost no regularisation."""
    return mf.Space(
        weight_decay=mf.Float(1e-6, 1e-1, log=True, init=1e-5),
        lr=mf.Float(3e-4, 1e-2, log=True, init=3e-3),
        beta1=mf.Float(0.5, 0.99, logit=True, init=0.9),
        input_noise=mf.Float(0.0, 1.0, init=0.02),
        hidden_noise=mf.Float(0.0, 1.0, init=0.02),
        dropout=mf.Float(0.01, 0.8, logit=True, init=0.05),
        label_smoothing=mf.Float(0.0, 0.3, init=0.1),
        l1=mf.Float(1e-6, 1e-2, log=True, init=1e-5),
    )


def cross_entropy(model: nn.Module, batch: Split) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(space: mf.Space, epochs: int, tune: bool) -> nn.Module:
    """Train a network from seed 0 with the values of `space`; tune them if `tune`."""
    torch.manual_seed(0)
    rows, valid, _ = data()
    loader = DataLoader(TensorDataset(*rows), batch_size=25, shuffle=True)
    model = nn.Sequential(
        mf.nn.GaussianNoise(space["input_noise"]), nn.Linear(30, 64), nn.ReLU(),
        mf.nn.GaussianNoise(space["hidden_noise"]), nn.Linear(64, 64), nn.ReLU(),
        mf.nn.Dropout(space["dropout"]), nn.Linear(64, 2),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters())

    def loss_fn(model: nn.Module, batch: Split) -> Tensor:
        loss = mf.nn.losses.cross_entropy(model(batch[0]), batch[1], label_smoothing=space["label_smoothing"])
        return loss + space["l1"] * mf.nn.penalties.l1(model.parameters())

    tuner = mf.Tuner(
        model, optimizer, space, loss_fn, loader, [valid], valid_loss_fn=cross_entropy,
        schedule=4, total_steps=epochs * len(loader),
    )  # fmt: skip
    if not tune:
        tuner.detach()  # the optimiser keeps the initial values

    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    tuner.finish()
    return model.eval()


def main(quick: bool = False) -> dict[str, Any]:
    epochs = 30 if quick else 300
    _, valid, test = data()
    space = search_space()
    start = space.as_dict()
    models = {"fixed": train(space, epochs, tune=False), "tuned": train(space, epochs, tune=True)}
    end = space.as_dict()
    models["re-run"] = train(space, epochs, tune=False)

    print("\n".join(f"{name:18} {start[name]:8.3g} -> {end[name]:.3g}" for name in space))
    with torch.no_grad():
        losses = {name: float(cross_entropy(model, valid)) for name, model in models.items()}
        tested = {name: float(cross_entropy(model, test)) for name, model in models.items()}
    print("validation loss   ", "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    print("test loss         ", "  ".join(f"{name} {loss:.4f}" for name, loss in tested.items()))
    return {"start": start, "end": end, "valid": losses, "test": tested}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shortened run")
    torch.set_num_threads(1)  # faster for small networks
    main(**vars(parser.parse_args()))
