"""In your own loop
================

Real loops clip gradients, follow a schedule, and save checkpoints. Here the learning rate, weight
decay and dropout of such a loop are tuned. The data are scikit-learn's images of digits.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digits)
order = torch.randperm(len(x))
x, y = x[order], y[order]
train_loader = DataLoader(TensorDataset(x[:400], y[:400]), batch_size=40, shuffle=True)
valid_loader = DataLoader(TensorDataset(x[400:800], y[400:800]), batch_size=200, shuffle=True)
test = x[800:], y[800:]

# %%
# The loop as it was
# ------------------
#
# Adam with warm-up and a cosine schedule, and clipping at norm 1. The learning rate of 0.0003 is
# too low.


def loss_fn(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


EPOCHS = 80
steps = EPOCHS * len(train_loader)


def build(dropout):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), dropout, nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-4, total_steps=steps)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler):
    for _ in range(EPOCHS):
        for batch in train_loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()


def error(model):
    model.eval()
    wrong = (model(test[0]).argmax(1) != test[1]).float().mean()
    model.train()
    return float(wrong)


model, optimizer, scheduler = build(nn.Dropout(0.1))
train(model, optimizer, scheduler)
print(f"test error, as it was: {error(model):.3f}")

# %%
# The same loop, tuned
# --------------------
#
# ``train`` does not change. ``mf.default_range`` returns a usual range. ``lr`` and ``weight_decay`` are
# options of the optimiser. The schedule's factor multiplies the tuned ``lr``, so the schedule stays.
# Dropout is a layer of midflight, because torch's own has a fixed rate. AdamW shrinks the weights itself,
# so the range of its decay is ``decoupled_weight_decay``. A run of under 400 steps also needs ``schedule=5``.

space = mf.Space(
    lr=mf.default_range("lr", init=3e-4),
    weight_decay=mf.default_range("decoupled_weight_decay", init=1e-3),
    dropout=mf.default_range("dropout", init=0.1),
)
model, optimizer, scheduler = build(mf.nn.Dropout(space["dropout"]))
tuner = mf.Tuner(
    model,
    optimizer,
    space,
    loss_fn,
    train_loader,
    valid_loader,
    total_steps=steps,
    max_grad_norm=1.0,  # where the loop clips; without it, the tuner finds out
)
train(model, optimizer, scheduler)
tuner.finish()
print(f"test error, tuned: {error(model):.3f}")
print(space)

# %%
tuner.trajectory.plot(space)

# %%
# If something looks wrong, ask. An empty report means that nothing was found.

print(tuner.report() or "nothing to report")
