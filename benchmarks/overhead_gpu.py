"""Measure time and memory of tuning a GPT on a GPU over the same training without tuning.

    python benchmarks/overhead_gpu.py            # table; stores docs/results/overhead_gpu.json
    python benchmarks/overhead_gpu.py --table    # the stored numbers

Training: bfloat16 autocast, flash attention, torch.compile, fused AdamW with two groups, gradient
accumulation over 4 micro-batches of 16 x 512 random tokens, clipping. `mf.Tuner` tunes weight decay and
dropout, with its defaults or with `central_difference`.

    time     turns of 20 optimiser steps alternate, each with one hyperparameter step; median ratio, quartiles
    memory   peak of allocated bytes of one training alone
"""

import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tasks import markdown, parser_of
from torch import Tensor, nn

import midflight as mf
from midflight._reporting.machine import machine

OUT = Path(__file__).parent.parent / "docs/results/overhead_gpu.json"
VOCABULARY, CONTEXT, MICRO, ACCUMULATED, TURN, TURNS = 8192, 512, 16, 4, 20, 8
SIZES = {"21 million weights": (384, 8), "98 million weights": (768, 12)}
ESTIMATORS = ["one_step", "central_difference"]
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self, width: int, dropout: nn.Module) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, 64)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Gpt(nn.Module):
    def __init__(self, width: int, layers: int, dropout: nn.Module) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, code: Tensor) -> Tensor:
        places = torch.arange(code.shape[1], device=code.device)
        return self.head(self.norm(self.blocks(self.token(code) + self.place(places))))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(batch[0])
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


class Training:
    """A training, with a tuner or without."""

    def __init__(self, width: int, layers: int, estimator: str | None) -> None:
        tuned = estimator is not None
        torch.manual_seed(0)
        space = mf.Space(
            weight_decay=mf.Float(1e-3, 1.0, log=True, init=0.1), dropout=mf.Float(0.0, 0.6, init=0.1)
        )
        self.batches = [
            tuple(torch.randint(VOCABULARY, (MICRO, CONTEXT), device="cuda") for _ in range(2))
            for _ in range(8)
        ]
        dropout = mf.nn.Dropout(space["dropout"] if tuned else 0.1)
        model = Gpt(width, layers, dropout).cuda()
        self.weights = sum(p.numel() for p in model.parameters())
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, fused=True)
        self.model = torch.compile(model)
        self.tuner = None
        if estimator:
            self.tuner = mf.Tuner(
                self.model, self.optimizer, space, loss_fn, self.batches[:6], self.batches[6:], schedule=TURN,
                max_grad_norm=1.0, estimator=estimator,
            )  # fmt: skip

    def turn(self) -> float:
        """Run one turn; return its seconds."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(TURN):
            self.optimizer.zero_grad()
            for n in range(ACCUMULATED):
                (loss_fn(self.model, self.batches[n]) / ACCUMULATED).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        torch.cuda.synchronize()
        return time.perf_counter() - began


def peak(size: str, estimator: str | None) -> int:
    training = Training(*SIZES[size], estimator)
    training.turn()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    training.turn()
    return torch.cuda.max_memory_allocated()


def measured(size: str) -> Iterator[dict[str, Any]]:
    """Return one row per estimator."""
    memory = {}
    for estimator in (None, *ESTIMATORS):
        memory[estimator] = peak(size, estimator)
        gc.collect()
        torch.cuda.empty_cache()
    trainings = {estimator: Training(*SIZES[size], estimator) for estimator in memory}
    for training in [*trainings.values()] * 2:
        training.turn()
    turns = np.array([[training.turn() for training in trainings.values()] for _ in range(TURNS)])
    for i, estimator in enumerate(ESTIMATORS, 1):
        training, ratios = trainings[estimator], turns[:, i] / turns[:, 0]
        assert training.tuner is not None
        yield {
            "size": size, "weights": training.weights, "estimator": estimator,
            "mixed_partial": training.tuner.mixed_partial,
            "ms_per_step": round(1e3 * float(np.median(turns[:, 0])) / TURN, 2),
            "ratio": round(float(np.median(ratios)), 3),
            "quartiles": np.percentile(ratios, [25, 75]).round(3).tolist(),
            "memory_mib": round(memory[None] / 2**20),
            "memory_ratio": round(memory[estimator] / memory[None], 3),
        }  # fmt: skip


def main() -> None:
    if not parser_of(__doc__, workers=False).parse_args().table:
        rows = []
        for size in SIZES:
            for row in measured(size):
                rows.append(row)
                print(row, flush=True)
            torch.compiler.reset()
        OUT.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    head = [
        "network", "estimator", "mixed partial", "plain step, ms", "time over plain", "quartiles",
        "memory over plain",
    ]  # fmt: skip
    print(markdown(head, map(_cells, json.loads(OUT.read_text())["rows"])))


def _cells(r: dict[str, Any]) -> list[object]:
    low, high = r["quartiles"]
    spread = f"{low:.2f} to {high:.2f}"
    return [
        r["size"], r["estimator"], r["mixed_partial"], r["ms_per_step"], f"{r['ratio']:.2f}", spread,
        f"{r['memory_ratio']:.1f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
