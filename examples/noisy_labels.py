"""Wrong labels found and defused: a weight for each training example, tuned while the network trains.

    python examples/noisy_labels.py            # a minute or two
    python examples/noisy_labels.py --quick

Of 10,000 Fashion-MNIST images, 40 % carry the label of another class; 1,000 clean ones validate. Each
training example has a weight in [0, 1], a hyperparameter of shape (10000,): an example that pulls the
network away from the clean data loses weight.

- A batch carries the places of its examples, by which the loss finds their weights. It is linear in them, so
  the tuner finds all their derivatives in one forward-mode pass, without a double backward.
- A batch touches few of the weights; the hypergradient of the others is 0. Sign steps suit that: sign(0) is
  0, so they stay, and the scale of the derivatives, which carries the learning rate, does not matter. An
  optimiser with momentum, such as Adam, would drag the untouched ones along. The steps are large, 0.2 of
  the range at first, for each weight has its turn only once per epoch.
- Each step is judged by the next one, `horizon="step"`: averaged weights lag behind what an example does now,
  and right labels would lose weight, too.
"""

import argparse
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf
from midflight.datasets import load

EXAMPLES, BATCH, WRONG = 10_000, 100, 0.4
Split = tuple[Tensor, Tensor]


def data() -> tuple[Split, Tensor, Split, Split]:
    """Training images with their labels as given, which of these are wrong, validation and test images."""
    arrays = load("fashion_mnist")
    x, y = torch.from_numpy(arrays.train_x), torch.from_numpy(arrays.train_y)
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=random)
    rows, valid = order[:EXAMPLES], order[EXAMPLES : EXAMPLES + 1000]
    shift = torch.randint(1, 10, (EXAMPLES,), generator=random)  # never 0: a wrong label is another one
    wrong = torch.rand(EXAMPLES, generator=random) < WRONG
    given = torch.where(wrong, (y[rows] + shift) % 10, y[rows])
    test = torch.from_numpy(arrays.test_x), torch.from_numpy(arrays.test_y)
    return (x[rows], given), wrong, (x[valid], y[valid]), test


def cross_entropy(model: nn.Module, batch: Split) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(space: mf.Space, train: Split, valid: Split, epochs: int, tune: bool) -> nn.Module:
    """A network trained from seed 0 with the weights of `space`, which move if `tune`."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*train, torch.arange(EXAMPLES)), batch_size=BATCH, shuffle=True)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, places = batch
        return mf.nn.losses.cross_entropy(model(x), y, example_weight=space["weight"][places])

    tuner = mf.Tuner(
        model, optimizer, space, loss_fn, loader, [valid], valid_loss_fn=cross_entropy,
        schedule=1, examples=BATCH, horizon="step", total_steps=epochs * len(loader),
        hyper_optimizer=partial(mf.SignSteps, lr=0.2, agreement=0.0),
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
    given, wrong, valid, test = data()
    space = mf.Space(weight=mf.Float(0.0, 1.0, init=1.0, shape=(EXAMPLES,)))
    models = {"fixed": train(space, given, valid, epochs, tune=False)}
    models["tuned"] = train(space, given, valid, epochs, tune=True)
    models["re-run"] = train(space, given, valid, epochs, tune=False)

    weight, count = space["weight"].value.detach(), int(wrong.sum())
    of_right, of_wrong = float(weight[~wrong].mean()), float(weight[wrong].mean())
    precision, chance = float(wrong[weight.argsort()[:count]].float().mean()), count / EXAMPLES
    low = weight < 0.5
    precision_low, recall_low = float(wrong[low].float().mean()), float(low[wrong].float().mean())
    print(f"weight            1 -> {of_right:.3f} of right labels, {of_wrong:.3f} of wrong ones, in the mean")
    print(f"wrong labels      precision among the {count} lightest {precision:.3f}, by chance {chance:.3f}")
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
    torch.set_num_threads(1)  # more would only get into each other's way on networks this small
    main(**vars(parser.parse_args()))
