"""A small language model
======================

Tune dropout, weight decay and label smoothing of a small Transformer on Python's documentation::

    python examples/language_model.py            # one to two minutes
    python examples/language_model.py --quick

The text is that of `help()`. The model predicts a letter from the previous 64. The initial values suit larger
data: dropout 0.3, label smoothing 0.1, AdamW's default weight decay. Here, 10,000 letters are read about 60
times. The tuned run can beat the re-run for two reasons: its values change during training, and it keeps its
last or averaged weights, whichever has the lower validation loss.
"""

import argparse
import pydoc_data.topics
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import midflight as mf

CONTEXT, WIDTH, HEADS = 64, 64, 4


def data() -> tuple[Tensor, Tensor, Tensor, int]:
    """Return windows of 10,000 training, 20,000 validation, 20,000 test letters, and the alphabet's size."""
    paragraphs = "\n".join(pydoc_data.topics.topics.values()).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))  # no duplicates, so that validation text is new
    alphabet = sorted(set(text))
    code = torch.tensor([alphabet.index(letter) for letter in text[:50_000]])
    train, valid, test = code.split([10_000, 20_000, 20_000])
    valid, test = (part.unfold(0, CONTEXT + 1, CONTEXT) for part in (valid, test))
    return train.unfold(0, CONTEXT + 1, 1), valid, test, len(alphabet)


class Block(nn.Module):
    def __init__(self, rate: mf.Hyperparameter) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = mf.nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(heads.transpose(1, 2).reshape(n, t, WIDTH)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    def __init__(self, letters: int, rate: mf.Hyperparameter) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(mf.nn.Dropout(rate), Block(rate), Block(rate), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, letters)

    def forward(self, code: Tensor) -> Tensor:
        x = self.letter(code) + self.place.weight[: code.shape[1]]
        return self.head(self.blocks(x)).transpose(1, 2)  # (N, letters, CONTEXT), as F.cross_entropy expects


def cross_entropy(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]), batch[:, 1:])


def train(space: mf.Space, texts: Tensor, valid: Tensor, letters: int, steps: int, tune: bool) -> nn.Module:
    """Train a network from seed 0 with the values of `space`; tune them if `tune`."""
    torch.manual_seed(0)
    model = Transformer(letters, space["dropout"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(texts, batch_size=16, shuffle=True)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        logits, smoothing = model(batch[:, :-1]), space["label_smoothing"]
        return mf.nn.losses.cross_entropy(logits, batch[:, 1:], label_smoothing=smoothing)

    tuner = mf.Tuner(
        model, optimizer, space, loss_fn, loader, valid.split(16), valid_loss_fn=cross_entropy,
        schedule=5, total_steps=steps,
    )  # fmt: skip
    if not tune:
        tuner.detach()  # the optimiser keeps the initial values

    for batch in islice(loader, steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    tuner.finish()
    return model.eval()


def main(quick: bool = False) -> dict[str, Any]:
    steps = 40 if quick else 600
    texts, valid, test, letters = data()
    space = mf.Space(
        dropout=mf.Float(0.01, 0.8, logit=True, init=0.3),
        weight_decay=mf.Float(1e-3, 1.0, log=True, init=1e-2),
        label_smoothing=mf.Float(0.0, 0.3, init=0.1),
    )
    start = space.as_dict()
    models = {"fixed": train(space, texts, valid, letters, steps, tune=False)}
    models["tuned"] = train(space, texts, valid, letters, steps, tune=True)
    end = space.as_dict()
    models["re-run"] = train(space, texts, valid, letters, steps, tune=False)

    print("\n".join(f"{name:17} {start[name]:8.3g} -> {end[name]:.3g}" for name in space))
    with torch.no_grad():
        losses = {name: float(cross_entropy(model, valid)) for name, model in models.items()}
        tested = {name: float(cross_entropy(model, test)) for name, model in models.items()}
    print("validation loss  ", "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    print("test loss        ", "  ".join(f"{name} {loss:.4f}" for name, loss in tested.items()))
    return {"start": start, "end": end, "valid": losses, "test": tested}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shortened run")
    torch.set_num_threads(1)  # faster for small networks
    main(**vars(parser.parse_args()))
