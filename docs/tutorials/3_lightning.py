"""With Lightning
==============

A Lightning trainer accumulates, clips, follows a schedule and stops early. One callback, ``Tune``,
puts a tuner into it. You need ``pip install 'midflight[lightning]'``.
"""

import logging
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf
from midflight.integrations.lightning import Tune

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
pl.seed_everything(0, verbose=False)
images, digits = load_digits(return_X_y=True)
order = torch.randperm(len(digits))
x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(digits)[order]
train_loader = DataLoader(TensorDataset(x[:400], y[:400]), batch_size=32, shuffle=True)
valid_loader = DataLoader(TensorDataset(x[400:1100], y[400:1100]), batch_size=350)
EPOCHS = 60

# %%
# The module
# ----------
#
# It makes the space, because a layer of it reads ``noise``. All else is as usual.


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.space = mf.Space(
            lr=mf.default_range("lr", init=1e-3),
            weight_decay=mf.default_range("decoupled_weight_decay", init=1e-3),
            noise=mf.default_range("noise", init=0.05),
        )
        noise = mf.nn.GaussianNoise(self.space["noise"])
        self.net = nn.Sequential(noise, nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("valid", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-3)
        steps = EPOCHS * len(train_loader) // 2
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# %%
# The trainer
# -----------
#
# The callback takes the trainer's own loaders, and tunes on its validation data.


def fit(*callbacks):
    pl.seed_everything(1, verbose=False)
    module = Digits()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[EarlyStopping("valid", patience=30), *(make(module) for make in callbacks)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_loader, valid_loader)
    print(f"validation loss: {trainer.validate(module, valid_loader, verbose=False)[0]['valid']:.3f}")
    return module


fit()  # not tuned
module = fit(lambda module: Tune(module.space))
print(module.space)
