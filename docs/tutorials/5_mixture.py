"""Weights of data sources
=======================

You have several sources of training data and do not know how much each is worth. ``mf.Mixture``
finds out during the training. Here three sources have images of digits: clean ones, some with half
of the labels drawn at random, and some turned by 90 degrees. The model is for clean images, so the
validation data are clean ones.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
order = torch.randperm(len(digits))
x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(digits)[order]
guessed = torch.where(torch.rand(600) < 0.5, torch.randint(10, (600,)), y[100:700])
turned = x[700:1200].view(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)

clean = TensorDataset(x[:100], y[:100])
wrong = TensorDataset(x[100:700], guessed)
rotated = TensorDataset(turned, y[700:1200])
valid_loader = DataLoader(TensorDataset(x[1200:1400], y[1200:1400]), batch_size=100, shuffle=True)
test = x[1400:], y[1400:]

# %%
# A loader by weights
# -------------------
#
# The loader draws each source by its weight. Each batch has one more part, ``drawn``: the source of
# each example. ``mixture.loss`` takes the loss of each example.


def valid_loss_fn(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def build(mixture):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = mixture.loader([clean, wrong, rotated], batch_size=32)

    def loss_fn(model, batch):
        inputs, targets, drawn = batch
        return mixture.loss(F.cross_entropy(model(inputs), targets, reduction="none"), drawn)

    return model, optimizer, loader, loss_fn


def train(model, optimizer, loader, loss_fn, steps):
    done = 0
    while done < steps:
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break


def error(model):
    return float((model(test[0]).argmax(1) != test[1]).float().mean())


STEPS = 1000
model, optimizer, loader, loss_fn = build(mf.Mixture(["clean", "wrong", "rotated"]))
train(model, optimizer, loader, loss_fn, STEPS)
print(f"test error with equal weights: {error(model):.3f}")

# %%
# Tune the weights
# ----------------

mixture = mf.Mixture(["clean", "wrong", "rotated"])
model, optimizer, loader, loss_fn = build(mixture)
space = mf.Space(mixture=mixture)
tuner = mf.Tuner(
    model, optimizer, space, loss_fn, loader, valid_loader, valid_loss_fn=valid_loss_fn, total_steps=STEPS
)
train(model, optimizer, loader, loss_fn, STEPS)
tuner.finish()
print(f"test error with tuned weights: {error(model):.3f}")
print(mixture)

# %%
# "clean" cannot reach 1: all sources share a fifth of the whole equally, unless you pass `floor=0`.

tuner.trajectory.plot(space)

# %%
# What did each source do at the end of the run? Below 0 means that more of it lowers the
# validation loss.

tuner.trajectory.plot_effects(mixture)
