"""A training script, unchanged
============================

Tune an ordinary training script without a change to its loop::

    python examples/train_gpt.py                 # train without tuning
    python examples/train_gpt.py --tune          # tune weight decay, dropout and learning rate

The script trains a small GPT on source code of Python's standard library, with flash attention,
torch.compile, autocast, gradient accumulation and clipping. AdamW has two parameter groups: matrices with
weight decay, other parameters without. The loop sets the learning rate of the groups at each step. Comments
mark what tuning adds: two parts before the loop, and `tuner.finish()` after it.
"""

import argparse
import inspect
import json
import math
from contextlib import nullcontext
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import midflight as mf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tune", action="store_true", help="tune while training")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--backend", default="inductor", help="backend of torch.compile, or none")
parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
args = parser.parse_args()

torch.manual_seed(1337)
device = "cuda" if torch.cuda.is_available() else "cpu"
block_size, batch_size, n_embd, n_head, n_layer = 64, 8, 64, 4, 2
gradient_accumulation_steps, grad_clip = 4, 1.0
learning_rate, min_lr, warmup_iters, weight_decay = 1e-3, 1e-4, 20, 0.1
ctx = torch.autocast(device, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()

modules = ("argparse", "ast", "collections", "csv", "dataclasses", "enum", "functools", "heapq", "inspect")
text = "".join(inspect.getsource(import_module(name)) for name in modules)
data = torch.tensor([min(ord(c), 127) for c in text], dtype=torch.long)
cut = int(0.8 * len(data))
splits = {
    "train": data[:cut],
    "valid": data[cut : int(0.9 * len(data))],
    "test": data[int(0.9 * len(data)) :],
}


def get_batch(split: str) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(splits[split]) - block_size - 1, (batch_size,))
    x = torch.stack([splits[split][i : i + block_size] for i in starts])
    y = torch.stack([splits[split][i + 1 : i + 1 + block_size] for i in starts])
    return x.to(device), y.to(device)


class Block(nn.Module):
    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn, self.proj = (
            nn.Linear(n_embd, 3 * n_embd, bias=False),
            nn.Linear(n_embd, n_embd, bias=False),
        )
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        heads = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in self.attn(self.ln_1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.dropout(self.proj(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(128, n_embd), nn.Embedding(block_size, n_embd)
        self.dropout = dropout
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(n_layer)))
        self.ln, self.head = nn.LayerNorm(n_embd), nn.Linear(n_embd, 128, bias=False)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.token(idx) + self.position(torch.arange(idx.shape[1], device=idx.device))
        logits = self.head(self.ln(self.blocks(self.dropout(x))))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def get_lr(it: int) -> float:
    if it < warmup_iters:
        return learning_rate * (it + 1) / warmup_iters
    ratio = (it - warmup_iters) / max(1, args.steps - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


# --- tuning adds: the space, and a dropout layer that reads it ---
space = mf.Space(
    weight_decay=mf.Float(1e-3, 10.0, log=True, init=weight_decay),
    dropout=mf.Float(0.0, 0.6, init=0.1),
    lr=mf.Float(1e-4, 1e-2, log=True, init=learning_rate),
)
model = GPT(mf.nn.Dropout(space["dropout"])).to(device)
# --- the script, unchanged ---
decay = [p for p in model.parameters() if p.dim() >= 2]
nodecay = [p for p in model.parameters() if p.dim() < 2]
groups = [{"params": decay, "weight_decay": weight_decay}, {"params": nodecay, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
raw_model = model
if args.backend != "none":
    model = torch.compile(model, backend=args.backend)


# --- tuning adds: the loss, the batches and the tuner ---
def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with ctx:
        return model(*batch)[1]


class Batches:
    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return 50

    def __iter__(self):
        return (get_batch(self.split) for _ in range(len(self)))


if args.tune:
    tuner = mf.Tuner(
        model, optimizer, space, loss_fn, Batches("train"), Batches("valid"), total_steps=args.steps,
        max_grad_norm=grad_clip,
    )  # fmt: skip
# --- the loop, unchanged ---

X, Y = get_batch("train")
for iter_num in range(args.steps):
    lr = get_lr(iter_num)
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    for _ in range(gradient_accumulation_steps):
        with ctx:
            logits, loss = model(X, Y)
            loss = loss / gradient_accumulation_steps
        X, Y = get_batch("train")
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if iter_num % 50 == 0:
        print(f"iter {iter_num}: loss {loss.item() * gradient_accumulation_steps:.4f}")
# --- the loop ends ---

if args.tune:
    tuner.finish()
raw_model.eval()
with torch.no_grad():
    test = sum(raw_model(*get_batch("test"))[1].item() for _ in range(50)) / 50
print(json.dumps({"test_loss": round(test, 4), **space.as_dict(), **(tuner.log() if args.tune else {})}))
