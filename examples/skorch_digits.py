"""A skorch network, by one callback
=================================

Tune learning rate, weight decay and input noise of a skorch net, by one callback::

    python examples/skorch_digits.py            # half a minute; needs midflight[skorch,study]
    python examples/skorch_digits.py --quick

The net clips and stops early, as it does without the callback. It starts with almost no regularisation on 400
images of digits, of which `train_split` holds a fifth out, and is judged on others.
"""

import argparse
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from skorch.callbacks import EarlyStopping, GradientNormClipping
from torch import Tensor, nn

import midflight as mf
from midflight.integrations.skorch import Tune


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.space = mf.Space(
            lr=mf.Float(1e-4, 1e-1, log=True, init=1e-3),
            weight_decay=mf.Float(1e-5, 1.0, log=True, init=1e-4),
            noise=mf.Float(0.0, 1.0, init=0.05),
        )
        noise = mf.nn.GaussianNoise(self.space["noise"])
        self.net = nn.Sequential(noise, nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def train(epochs: int, tune: bool, seed: int = 0) -> tuple[NeuralNetClassifier, float]:
    """Return the net after `epochs`, and its loss on images that it has never seen."""
    torch.manual_seed(seed)
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order].astype(np.float32) / 16, y[order]
    callbacks = [GradientNormClipping(1.0), EarlyStopping(patience=epochs // 2)]
    net = NeuralNetClassifier(
        Network, optimizer=torch.optim.AdamW, criterion=nn.CrossEntropyLoss, lr=1e-3, batch_size=32,
        optimizer__weight_decay=1e-4, max_epochs=epochs, verbose=0,
        callbacks=[*callbacks, Tune(lambda net: net.module_.space)] if tune else callbacks,
    )  # fmt: skip
    net.fit(x[:400], y[:400])
    logits = net.forward(x[400:]).detach()
    return net, float(F.cross_entropy(logits, torch.tensor(y[400:])))


def main(quick: bool = False) -> dict[str, Any]:
    epochs = 60 if quick else 150
    _, fixed = train(epochs, tune=False)
    net, tuned = train(epochs, tune=True)
    print(net.module_.space)
    print(f"loss on unseen images: fixed {fixed:.3f}, tuned {tuned:.3f}")
    return {"valid": {"fixed": fixed, "tuned": tuned}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="train for 60 epochs")
    main(parser.parse_args().quick)
