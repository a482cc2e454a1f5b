"""Search around it
================

The number of layers and the optimiser have no gradient. A search engine chooses them; within each
trial, weight decay, noise and dropout are tuned during the training. You need ``pip install
'midflight[search]'``.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf
from midflight import search

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
order = torch.randperm(len(digits))
x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(digits)[order]
train_loader = DataLoader(TensorDataset(x[:400], y[:400]), batch_size=40, shuffle=True)
valid_loader = DataLoader(TensorDataset(x[400:800], y[400:800]), batch_size=200, shuffle=True)

# %%
# One space for both
# ------------------
#
# ``online=True`` marks what is tuned during a trial; the engine searches the rest.

space = search.Space(
    layers=mf.Int(1, 3),
    width=mf.Int(16, 256, log=True),
    optimizer=mf.Categorical(["adam", "sgd"]),
    lr=mf.Float(1e-4, 0.3, log=True),
    weight_decay=mf.Float(1e-6, 1e-1, log=True, init=1e-4, online=True),
    noise=mf.Float(0.0, 0.8, init=0.05, online=True),
)

# %%
# The objective is your training
# ------------------------------
#
# ``trial.report`` stores the state of a training after each epoch. If the engine continues this
# training later, or after a crash, ``trial.load`` gives it back.


def loss_fn(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def objective(trial):
    tuned = trial.online()  # an mf.Space of weight_decay and noise
    p = trial.params
    torch.manual_seed(0)
    sizes = [64] + [p["width"]] * p["layers"]
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(mf.nn.GaussianNoise(tuned["noise"]), *hidden, nn.Linear(sizes[-1], 10))
    make = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}[p["optimizer"]]
    optimizer = make(model.parameters(), lr=p["lr"])
    steps = trial.epochs * len(train_loader)
    tuner = mf.Tuner(model, optimizer, tuned, loss_fn, train_loader, valid_loader, total_steps=steps)

    parts = {"model": model, "optimizer": optimizer, "tuner": tuner}
    done = 0
    if state := trial.load():
        done = state.pop("epoch")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(done + 1, trial.epochs + 1):
        for batch in train_loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(loss_fn(model.eval(), (x[400:800], y[400:800])))
        model.train()
        state = {name: part.state_dict() for name, part in parts.items()}
        trial.report(epoch, loss, {"epoch": epoch, **state}, space=tuned)


found = search.run(objective, space, engine="tpe", trials=12, epochs=9, seed=0)
for name, value in found.best.params.items():
    print(f"{name:12} {value}" if isinstance(value, str) else f"{name:12} {value:.3g}")
