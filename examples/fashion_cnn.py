"""A convolutional network: augmentation, dropout and weight decay
===============================================================

Tune six augmentation magnitudes and weight decay of a CNN on 1,000 Fashion-MNIST images::

    python examples/fashion_cnn.py            # one to two minutes; needs pip install 'midflight[augment]'
    python examples/fashion_cnn.py --quick

Rotation, translation, scale, shear, brightness and contrast all start at 0, which is no augmentation. Each
magnitude has its own unit (degrees, share of the width, ...) and a default range. One-step hypergradients
suit this task of few images and many epochs, where regularisation matters.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf
from midflight.datasets import load

MAGNITUDES = ("rotation", "translation", "scale", "shear", "brightness", "contrast")
Split = tuple[Tensor, Tensor]


def data() -> tuple[Split, Split, Split]:
    """Return 1,000 training, 2,000 validation and 10,000 test images with labels."""
    arrays = load("fashion_mnist")
    images, labels = torch.from_numpy(arrays.train_x).view(-1, 1, 28, 28), torch.from_numpy(arrays.train_y)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, valid = order[:1000], order[1000:3000]
    test = torch.from_numpy(arrays.test_x).view(-1, 1, 28, 28), torch.from_numpy(arrays.test_y)
    return (images[train], labels[train]), (images[valid], labels[valid]), test


def cross_entropy(model: nn.Module, batch: Split) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(space: mf.Space, train: Split, valid: Split, epochs: int, tune: bool) -> nn.Module:
    """Train a network from seed 0 with the values of `space`; tune them if `tune`."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*train), batch_size=50, shuffle=True)
    model = nn.Sequential(
        mf.nn.Augment(**{name: space[name] for name in MAGNITUDES}),
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    tuner = mf.Tuner(
        model, optimizer, space, cross_entropy, loader, DataLoader(TensorDataset(*valid), batch_size=500),
        schedule=5, total_steps=epochs * len(loader),
    )  # fmt: skip
    if not tune:
        tuner.detach()  # the optimiser keeps the initial values

    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
    tuner.finish()
    return model.eval()


def main(quick: bool = False) -> dict[str, Any]:
    epochs = 8 if quick else 60
    images, valid, test = data()
    space = mf.Space(
        {
            "weight_decay": mf.default_range("weight_decay", init=1e-5),
            **{name: mf.default_range(name, init=0.0) for name in MAGNITUDES},
        }
    )
    start = space.as_dict()
    models = {"fixed": train(space, images, valid, epochs, tune=False)}
    models["tuned"] = train(space, images, valid, epochs, tune=True)
    end = space.as_dict()
    models["re-run"] = train(space, images, valid, epochs, tune=False)

    print("\n".join(f"{name:17} {start[name]:8.3g} -> {end[name]:.3g}" for name in space))
    with torch.no_grad():
        losses = {name: float(cross_entropy(model, valid)) for name, model in models.items()}
        tested = {name: float(cross_entropy(model, test)) for name, model in models.items()}
    print("validation loss  ", "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    print("test loss        ", "  ".join(f"{name} {loss:.4f}" for name, loss in tested.items()))
    return {"start": start, "end": end, "valid": losses, "test": tested}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shortened run")
    torch.set_num_threads(1)  # faster for small networks
    try:
        main(**vars(parser.parse_args()))
    except mf.errors.MissingExtra as error:
        parser.exit(1, f"{error}\n")
