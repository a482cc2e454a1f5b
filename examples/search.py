"""Search what has no gradient, tune the rest
==========================================

Search layers, optimiser and learning rate; tune weight decay, noise and dropout during each trial::

    python examples/search.py             # about a minute; needs midflight[search]
    python examples/search.py --quick
    midflight search examples/search.py:objective --engine smac --trials 60 --epochs 27    # stores the trials

The objective contains the training loop. It starts from `trial.load()` and calls `trial.report` after each
epoch with all the state that a continuation needs. Optuna's TPE with Hyperband ends most trials early. An
interrupted trial continues from its last report, with its tuner. The baseline is the best of three random
configurations without tuning.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf
from midflight import search

space = search.Space(
    layers=mf.Int(1, 3),
    width=mf.Int(16, 256, log=True),
    activation=mf.Categorical(["relu", "tanh"]),
    optimizer=mf.Categorical(["adam", "sgd"]),
    lr=mf.Float(1e-4, 0.3, log=True),  # searched, because a one-step hypergradient favours small rates
    momentum=mf.Float(0.0, 0.98, when={"optimizer": "sgd"}),
    weight_decay=mf.Float(1e-6, 1e-1, log=True, init=1e-4, online=True),
    noise=mf.Float(0.0, 0.8, init=0.2, online=True),
    dropout=mf.Float(0.01, 0.8, logit=True, init=0.1, online=True),
)


def data() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,000 training and 437 validation images; the other 360 are left for a test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return TensorDataset(x[:1000], y[:1000]), TensorDataset(x[1000:1437], y[1000:1437])


def network(params: dict[str, Any]) -> nn.Sequential:
    """Build a network; tuned hyperparameters in `params` are read during training, the others here."""
    layers: list[nn.Module] = [mf.nn.GaussianNoise(params["noise"])]
    inputs = 64
    for _ in range(params["layers"]):
        activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[params["activation"]]
        layers += [nn.Linear(inputs, params["width"]), activation(), mf.nn.Dropout(params["dropout"])]
        inputs = params["width"]
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def cross_entropy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def objective(trial: search.Trial) -> None:
    """Train one configuration and tune its online hyperparameters."""
    train, valid = data()
    order = torch.Generator().manual_seed(trial.seed)
    loader = DataLoader(train, batch_size=50, shuffle=True, generator=order)
    params, tuned = trial.params, trial.online()
    model = network({**params, **({name: tuned[name] for name in tuned} if tuned else {})})
    names = {"lr", "momentum", "weight_decay"} & (params.keys() - set(tuned or ()))
    options = {name: params[name] for name in names}  # the tuner sets the tuned ones
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[params["optimizer"]]
    optimizer = kind(model.parameters(), **options)
    tuner = tuned and mf.Tuner(
        model, optimizer, tuned, cross_entropy, loader, DataLoader(valid, batch_size=128, shuffle=True),
        total_steps=trial.epochs * len(loader),
    )  # fmt: skip

    state = trial.load()
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0].update(options)  # population-based training loads another trial's state
        order.set_state(state["order"])
        if tuner:
            tuner.load_state_dict(state["tuner"])

    for epoch in range(state["epoch"] + 1 if state else 1, trial.epochs + 1):
        for batch in loader:
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
        if tuner and epoch == trial.epochs:
            tuner.finish()
        model.eval()
        with torch.no_grad():
            loss = cross_entropy(model, valid.tensors)
        model.train()
        state = {
            "epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "order": order.get_state(), "tuner": tuner and tuner.state_dict(),
        }  # fmt: skip
        trial.report(epoch, float(loss), state, space=tuned)


def main(quick: bool = False) -> dict[str, Any]:
    epochs = 3 if quick else 27
    random = search.run(objective, space.offline(), engine="random", trials=3, epochs=epochs)
    found = search.run(objective, space, engine="bohb", trials=8 if quick else 40, epochs=epochs)
    for name, value in found.best.params.items():
        start = found.best.starts.get(name)
        print(f"{name:14} {value!s:>22}" + (f"   tuned from {start:.3g}" if start is not None else ""))
    losses = {"fixed": random.best.loss, "tuned": found.best.loss}
    print("validation loss", "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return {"valid": losses, "best": found.best.params}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shortened run")
    torch.set_num_threads(1)  # faster for small networks
    main(**vars(parser.parse_args()))
