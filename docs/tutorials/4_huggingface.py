"""With Hugging Face's Trainer
===========================

One callback tunes the learning rate, weight decay and dropout of a ``Trainer`` that accumulates,
clips and warms up. You need ``pip install 'midflight[hf]'``. A small Llama learns characters of
Python's own source code.
"""

import argparse
import inspect
import string
import tempfile

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

import midflight as mf
from midflight.integrations.hf import Tune

LENGTH = 32
code = inspect.getsource(argparse) + inspect.getsource(inspect)
numbers = torch.tensor([string.printable.find(c) + 1 for c in code])


def pieces(first, count):
    rows = numbers[first * LENGTH : (first + count) * LENGTH].view(count, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


# %%
# The model
# ---------
#
# Dropout of midflight is added after the MLP of each layer. It reads ``space["dropout"]``.


def llama(dropout):
    config = LlamaConfig(
        vocab_size=len(string.printable) + 1,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(layer.mlp, mf.nn.Dropout(dropout))
    return model


# %%
# The trainer
# -----------
#
# The model trains on ``train_dataset``, and ``Tune`` tunes on ``eval_dataset``. ``Tune`` ends with
# ``finish``, so the trainer evaluates the best of the last weights and averages of recent ones.


def train(tune):
    set_seed(0)
    space = mf.Space(
        lr=mf.default_range("lr", init=1e-3),
        weight_decay=mf.default_range("decoupled_weight_decay", init=1e-2),
        dropout=mf.default_range("dropout", init=0.05),
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=300,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            weight_decay=1e-2,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        data = {"train_dataset": pieces(0, 300), "eval_dataset": pieces(300, 400)}
        trainer = Trainer(llama(space["dropout"]), arguments, **data)
        trainer.remove_callback(PrinterCallback)
        if tune:
            trainer.add_callback(Tune(trainer, space, schedule=5))  # a run of under 400 steps
        trainer.train()
        print(f"validation loss: {trainer.evaluate()['eval_loss']:.3f}")
    return space


train(tune=False)
print(train(tune=True))
