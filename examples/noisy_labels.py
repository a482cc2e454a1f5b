"""Wrong labels, found by a weight for each example
================================================

Find wrong labels: tune a weight for each training example during training::

    python examples/noisy_labels.py            # one to two minutes
    python examples/noisy_labels.py --quick

Of 10,000 Fashion-MNIST training images, 40 % have a wrong label; 1,000 validation images are clean. Each
training example has a weight in [0, 1], an entry of `mf.ExampleWeights`. The weight of an example falls if
training on it raises the validation loss.

- A batch contains the indices of its examples, so that the loss can look up their weights. Two forward passes
  give the derivatives for all weights, without a double backward.
- A hyper-step moves the weights of its own training batch only. So the tuner's batches have 5,000 examples,
  the loop's 100.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import midflight as mf
from midflight.datasets import load

EXAMPLES, BATCH, TUNED_BATCH, WRONG = 10_000, 100, 5_000, 0.4
Split = tuple[Tensor, Tensor]


def data() -> tuple[Split, Tensor, Split, Split]:
    """Return training images with noisy labels, which labels are wrong, and validation and test images."""
    arrays = load("fashion_mnist")
    x, y = torch.from_numpy(arrays.train_x), torch.from_numpy(arrays.train_y)
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=random)
    rows, valid = order[:EXAMPLES], order[EXAMPLES : EXAMPLES + 1000]
    shift = torch.randint(1, 10, (EXAMPLES,), generator=random)  # 0 would keep the label
    wrong = torch.rand(EXAMPLES, generator=random) < WRONG
    noisy = torch.where(wrong, (y[rows] + shift) % 10, y[rows])
    test = torch.from_numpy(arrays.test_x), torch.from_numpy(arrays.test_y)
    return (x[rows], noisy), wrong, (x[valid], y[valid]), test


def cross_entropy(model: nn.Module, batch: Split) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(weights: mf.ExampleWeights, train: Split, valid: Split, epochs: int, tune: bool) -> nn.Module:
    """Train a network from seed 0 with these example weights; tune them if `tune`."""
    torch.manual_seed(0)
    data = TensorDataset(*train)
    loader = weights.loader(data, BATCH)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, index = batch
        return weights.loss(F.cross_entropy(model(x), y, reduction="none"), index)

    tuner = mf.Tuner(
        model, optimizer, mf.Space(weight=weights), loss_fn, weights.loader(data, TUNED_BATCH), [valid],
        valid_loss_fn=cross_entropy, total_steps=epochs * len(loader),
    )  # fmt: skip
    if not tune:
        tuner.detach()

    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    tuner.finish()
    return model.eval()


def main(quick: bool = False) -> dict[str, Any]:
    epochs = 3 if quick else 20
    noisy, wrong, valid, test = data()
    weights = mf.ExampleWeights(EXAMPLES)
    models = {"fixed": train(weights, noisy, valid, epochs, tune=False)}
    models["tuned"] = train(weights, noisy, valid, epochs, tune=True)
    models["re-run"] = train(weights, noisy, valid, epochs, tune=False)

    weight, count = weights.value.detach(), int(wrong.sum())
    mean_correct, mean_wrong = float(weight[~wrong].mean()), float(weight[wrong].mean())
    precision, chance = float(wrong[weights.lowest(count)].float().mean()), count / EXAMPLES
    low = weight < 0.5
    precision_low, recall_low = float(wrong[low].float().mean()), float(low[wrong].float().mean())
    print(f"mean weight       1 -> {mean_correct:.3f} for correct labels, {mean_wrong:.3f} for wrong ones")
    print(
        f"wrong labels      precision of the {count} lowest weights {precision:.3f}, by chance {chance:.3f}"
    )
    print(f"weight below 0.5  precision {precision_low:.3f}  recall {recall_low:.3f}")
    with torch.no_grad():
        losses = {name: float(cross_entropy(model, valid)) for name, model in models.items()}
        tested = {name: float((m(test[0]).argmax(1) == test[1]).float().mean()) for name, m in models.items()}
    print("validation loss  ", "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    print("test accuracy    ", "  ".join(f"{name} {share:.4f}" for name, share in tested.items()))
    return {
        "precision": precision, "chance": chance, "recall_low": recall_low,
        "valid": losses, "test": tested,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shortened run")
    torch.set_num_threads(1)  # faster for small networks
    main(**vars(parser.parse_args()))
