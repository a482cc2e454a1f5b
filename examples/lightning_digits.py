"""A Lightning trainer, by one callback
====================================

Tune learning rate, weight decay and input noise in a Lightning trainer, by one callback::

    python examples/lightning_digits.py            # half a minute; needs midflight[lightning,study]
    python examples/lightning_digits.py --quick

The trainer accumulates, clips, follows a schedule and stops early, as without the callback. The network
starts with almost no regularisation on 400 images of digits, so it overfits.
"""

import argparse
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf
from midflight.integrations.lightning import Tune


class Digits(pl.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.space = mf.Space(
            lr=mf.Float(1e-4, 1e-1, log=True, init=1e-3),
            weight_decay=mf.Float(1e-5, 1.0, log=True, init=1e-4),
            noise=mf.Float(0.0, 1.0, init=0.05),
        )
        noise = mf.nn.GaussianNoise(self.space["noise"])
        self.net = nn.Sequential(noise, nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.steps = steps

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("valid", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data() -> tuple[TensorDataset, TensorDataset]:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]
    return TensorDataset(x[:400], y[:400]), TensorDataset(x[400:1100], y[400:1100])


def train(epochs: int, tune: bool, seed: int = 0) -> tuple[Digits, float]:
    """Return the module after `epochs`, and its validation loss."""
    pl.seed_everything(seed, verbose=False)
    t1, t2 = data()
    train_loader, valid_loader = DataLoader(t1, 32, shuffle=True), DataLoader(t2, 350)
    module = Digits(steps=epochs * len(train_loader) // 2)
    callbacks = [EarlyStopping("valid", patience=epochs // 2)]
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, Tune(module.space)] if tune else callbacks,
    )  # fmt: skip
    trainer.fit(module, train_loader, valid_loader)
    return module, trainer.validate(module, valid_loader, verbose=False)[0]["valid"]


def main(quick: bool = False) -> dict[str, Any]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    epochs = 40 if quick else 150
    _, fixed = train(epochs, tune=False)
    module, tuned = train(epochs, tune=True)
    print(module.space)
    print(f"validation loss: fixed {fixed:.3f}, tuned {tuned:.3f}")
    return {"valid": {"fixed": fixed, "tuned": tuned}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="train for 40 epochs")
    main(parser.parse_args().quick)
