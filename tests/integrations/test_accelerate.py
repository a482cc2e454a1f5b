"""Tuning with Accelerate needs no callback: the loop stays, and checkpoints hold the tuner."""

import math

import pytest
import torch
import torch.nn.functional as F
from comparing import STOPS, assert_detached, at_call, same, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = torch.Generator().manual_seed(0)
X = torch.randn(96, 6, generator=DATA)
Y = X[:, :1] * 2 + 0.3 * torch.randn(96, 1, generator=DATA)
EPOCHS = 6


def run(folder, epochs, accumulate=1, precision="no", load=False, at_each_loss=lambda: None):
    torch.manual_seed(1)
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
    )
    space = mf.Space(
        lr=mf.Float(1e-4, 1e-1, log=True, init=3e-3), weight_decay=mf.Float(1e-4, 1.0, log=True, init=1e-2)
    )
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    train, valid = TensorDataset(X[:64], Y[:64]), TensorDataset(X[64:], Y[64:])
    prepared = accelerator.prepare(model, optimizer, DataLoader(train, 16), DataLoader(valid, 16), schedule)
    model, optimizer, batches, valid_batches, schedule = prepared

    def loss_fn(model, batch):
        at_each_loss()
        return F.mse_loss(model(batch[0]), batch[1])

    tuner = mf.Tuner(
        model, optimizer, space, loss_fn, batches, valid_batches, schedule=3,
        total_steps=EPOCHS * 4 // accumulate,
    )  # fmt: skip
    accelerator.register_for_checkpointing(tuner)
    if load:
        accelerator.load_state(folder)
    try:
        with tuner:
            for _ in range(epochs):
                for batch in batches:
                    with accelerator.accumulate(model):
                        accelerator.backward(loss_fn(model, batch))
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(model.parameters(), 1.0)
                        optimizer.step()
                        schedule.step()
                        optimizer.zero_grad()
                accelerator.save_state(folder)
    finally:
        factor = 0.5 * (1 + math.cos(math.pi * tuner.steps / 100))
        assert_detached(optimizer.optimizer, space, factor)
    return tuner.steps, state(model, space)


@pytest.mark.parametrize(("accumulate", "precision"), [(1, "no"), (2, "no"), (1, "bf16")])
def test_a_resumed_training_goes_on_bit_for_bit(tmp_path, accumulate, precision):
    steps, whole = run(tmp_path / "whole", EPOCHS, accumulate, precision)
    assert steps == EPOCHS * 4 // accumulate
    run(tmp_path / "half", EPOCHS // 2, accumulate, precision)
    steps, resumed = run(tmp_path / "half", EPOCHS // 2, accumulate, precision, load=True)
    assert steps == EPOCHS * 4 // accumulate
    assert whole["lr"] != pytest.approx(3e-3)
    assert same(whole, resumed)


@pytest.mark.parametrize(("at", "do"), list(zip((60, 62, 65), STOPS, strict=True)))
def test_a_training_that_was_stopped_goes_on_bit_for_bit(tmp_path, at, do):
    _, whole = run(tmp_path / "whole", EPOCHS)
    with pytest.raises((KeyboardInterrupt, ArithmeticError)):
        run(tmp_path / "stopped", EPOCHS, at_each_loss=at_call(at, do))
    states = (tmp_path / "stopped").glob("custom_checkpoint_*")
    done = torch.load(next(states), weights_only=False)["steps"] // 4
    assert 0 < done < EPOCHS
    steps, resumed = run(tmp_path / "stopped", EPOCHS - done, load=True)
    assert steps == EPOCHS * 4
    assert same(whole, resumed)
