"""Run the code of all pages: each block is a test, and the blocks of a page share the names made here.

A hidden block (`<!--- invisible-code-block: python`) makes what else a page needs.
"""

import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def setup(names: dict[str, Any]) -> None:
    """Make a small loop, before its tuner."""
    torch.manual_seed(0)
    x = torch.randn(400, 20)
    y = (x[:, :5].sum(1) > 0).long()
    dataset = TensorDataset(x[:200], y[:200])
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))
    folder = TemporaryDirectory()
    os.chdir(folder.name)
    names |= {
        "torch": torch, "F": F, "nn": nn, "mf": mf, "partial": partial, "DataLoader": DataLoader,
        "TensorDataset": TensorDataset,
        "x": x, "y": y, "dataset": dataset, "model": model, "loss_fn": loss_fn, "valid_loss_fn": loss_fn,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=3e-3),
        "space": mf.Space(weight_decay=mf.default_range("decoupled_weight_decay", init=1e-3)),
        "train_loader": DataLoader(dataset, batch_size=20, shuffle=True),
        "valid_loader": DataLoader(TensorDataset(x[200:], y[200:]), batch_size=100, shuffle=True),
        "steps": 50, "folder": folder,
    }  # fmt: skip


def teardown(names: dict[str, Any]) -> None:
    os.chdir(Path(__file__).parent)
    names["folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()], pattern="*.md", setup=setup, teardown=teardown
).pytest()
