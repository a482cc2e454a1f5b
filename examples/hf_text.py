"""Hugging Face's Trainer, by one callback
=======================================

Tune learning rate, weight decay and dropout in Hugging Face's Trainer, by one callback::

    python examples/hf_text.py            # a minute; needs midflight[hf]
    python examples/hf_text.py --quick

A small Llama learns characters of the standard library, 300 lines of them, so it overfits. The trainer
accumulates, clips, warms up and evaluates, as it does without the callback.
"""

import argparse
import inspect
import string
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

import midflight as mf
from midflight.integrations.hf import Tune

LENGTH = 32


class Text(Dataset[dict[str, Tensor]]):
    """Pieces of LENGTH characters."""

    def __init__(self, first: int, count: int) -> None:
        code = inspect.getsource(argparse) + inspect.getsource(inspect)
        numbers = [string.printable.find(c) + 1 for c in code[first * LENGTH : (first + count) * LENGTH]]
        self.rows = torch.tensor(numbers).view(count, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def llama(dropout: mf.Hyperparameter) -> LlamaForCausalLM:
    """Return a Llama of 70,000 weights with dropout after each layer's MLP."""
    config = LlamaConfig(
        vocab_size=len(string.printable) + 1, hidden_size=48, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(layer.mlp, mf.nn.Dropout(dropout))
    return model


def train(steps: int, tune: bool, seed: int = 0) -> tuple[mf.Space, float]:
    """Return the hyperparameters after `steps`, and the validation loss."""
    set_seed(seed)
    space = mf.Space(
        lr=mf.Float(1e-4, 1e-1, log=True, init=1e-3),
        weight_decay=mf.Float(1e-4, 1.0, log=True, init=1e-2),
        dropout=mf.Float(0.0, 0.5, init=0.02),
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, gradient_accumulation_steps=2,
            per_device_eval_batch_size=100, learning_rate=1e-3, weight_decay=1e-2, max_grad_norm=1.0,
            lr_scheduler_type="cosine", warmup_steps=20, eval_strategy="steps", eval_steps=steps // 4,
            report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, seed=seed,
        )  # fmt: skip
        trainer = Trainer(
            llama(space["dropout"]), args, train_dataset=Text(0, 300), eval_dataset=Text(300, 400)
        )
        trainer.remove_callback(PrinterCallback)
        if tune:
            trainer.add_callback(Tune(trainer, space))
        trainer.train()
        return space, trainer.evaluate()["eval_loss"]


def main(quick: bool = False) -> dict[str, Any]:
    warnings.filterwarnings("ignore", module="torch")
    steps = 200 if quick else 600
    _, fixed = train(steps, tune=False)
    space, tuned = train(steps, tune=True)
    print(space)
    print(f"validation loss: fixed {fixed:.3f}, tuned {tuned:.3f}")
    return {"valid": {"fixed": fixed, "tuned": tuned}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="train for 200 steps")
    main(parser.parse_args().quick)
