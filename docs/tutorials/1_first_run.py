"""Your first run
==============

A network overfits, because it starts with almost no regularisation. In one training, midflight
finds how much it needs. You need ``pip install midflight`` and five minutes.

Data: 100 inputs, of which 95 say nothing about the class. There are 500 examples to train on (T1)
and 1,500 to validate on (T2).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf

torch.manual_seed(0)
x = torch.randn(2000, 100)
y = (x[:, :5].sum(1) + torch.randn(2000) > 0).long()
train_loader = DataLoader(TensorDataset(x[:500], y[:500]), batch_size=50, shuffle=True)
valid_loader = DataLoader(TensorDataset(x[500:], y[500:]), batch_size=250, shuffle=True)

# %%
# Say what to tune
# ----------------
#
# A *space* has a name, a range and a first value for each hyperparameter. ``weight_decay`` is an
# option of AdamW, so the tuner finds it by its name. ``noise`` is read by a layer of the model. It
# has an entry for each input.

space = mf.Space(
    weight_decay=mf.Float(1e-4, 10.0, log=True, init=1e-3),
    noise=mf.Float(0.0, 2.0, init=0.1, shape=(100,)),
)
net = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2))
model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), net)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def loss_fn(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


# %%
# Add the tuner
# -------------
#
# The tuner is one line before the loop. It listens to ``optimizer.step()``, so the loop stays as it is. At
# about one step in twenty it moves the hyperparameters. For this it calls ``loss_fn`` on batches of both
# loaders, in eval mode for T2. So ``loss_fn`` must move a batch to the device.

epochs = 100
steps = epochs * len(train_loader)  # of the optimiser, in the whole run
tuner = mf.Tuner(model, optimizer, space, loss_fn, train_loader, valid_loader, total_steps=steps)

for _ in range(epochs):
    for batch in train_loader:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()

# %%
# End the run
# -----------
#
# ``finish`` compares the last weights, their recent average, and the best earlier average on T2.
# The model keeps the best.

for name, loss in tuner.finish().items():
    print(f"{name:8} {loss:.3f}")

# %%
# See what happened
# -----------------
#
# The noise stayed low on the five inputs that count, and rose on the others.

noise = space["noise"].value
print(f"noise: {noise[:5].mean():.2f} on inputs that count, {noise[5:].mean():.2f} on others")
print(f"weight decay: {space['weight_decay'].value:.3g}, from 0.001")

# %%
# The trajectory has the values after each move; of noise, the mean over the inputs.

tuner.trajectory.plot(space)

# %%
# What next
# ---------
#
# Train and test with other data than T2: it has chosen the hyperparameters, so its loss looks
# better than it is. The next tutorial puts the tuner into a loop with a schedule and clipping.
