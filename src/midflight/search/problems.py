"""The objectives of `midflight search`: a multilayer perceptron on images, or a function in a user's file."""

import sys
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import midflight.nn as mfnn
from midflight.datasets import Shuffled, Split, evaluate, load
from midflight.errors import MidflightError
from midflight.search.errors import SearchError
from midflight.search.space import Config, Space
from midflight.search.trial import Objective, Trial
from midflight.space import Categorical, Float, Int, default_range
from midflight.tuner import Tuner

BATCH = 128
VALID = 1 / 6  # share of the training images used for validation, as 10,000 of MNIST's 60,000 usually are
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
MLP_SPACE = Space(
    layers=Int(1, 4),
    width=Int(32, 512, log=True),
    activation=Categorical(list(ACTIVATIONS)),
    batch_norm=Categorical([False, True]),
    optimizer=Categorical(["adam", "adamw", "sgd"]),
    # searched, because a short horizon favours small learning rates (Wu et al. 2018)
    lr=Float(1e-4, 0.3, log=True),
    momentum=Float(0.0, 0.98, when={"optimizer": "sgd"}),
    weight_decay=default_range("weight_decay", online=True),
    noise=default_range("noise", online=True),
    dropout=default_range("dropout", online=True),
)


@dataclass(frozen=True)
class Problem:
    """An objective, its space, and its name in a study."""

    objective: Objective
    space: Space
    label: str


@dataclass(frozen=True)
class Mlp:
    """Trains a multilayer perceptron with a configuration of `MLP_SPACE`; an objective.

    It reports the validation loss of the current weights; after the last epoch, of the weights that
    `Tuner.finish` chose. It reports the test error after the last epoch, which the search ignores.
    """

    data: str
    """A dataset of `midflight.datasets`."""
    train: int | None = None
    """Number of training images; None: all."""

    def __call__(self, trial: Trial) -> None:
        t1, t2, test = splits(self.data, self.train)
        online, params = trial.online(), trial.params
        torch.manual_seed(trial.seed)
        levels: dict[str, Any] = {name: online[name] for name in online} if online else {}
        model = network(t1.x.shape[1], int(t1.y.max()) + 1, {**params, **levels})
        searched = {name: value for name, value in params.items() if name not in levels}
        optimizer = optimizer_for(model, searched)
        batches = Shuffled(t1, min(BATCH, len(t1)), trial.seed + 1)
        tuner = online and Tuner(
            model, optimizer, online, _cross_entropy, batches,
            Shuffled(t2, min(BATCH, len(t2)), trial.seed + 2), total_steps=trial.epochs * len(batches),
        )  # fmt: skip
        parts: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            **({"tuner": tuner} if tuner else {}),
        }
        before = trial.load()
        if before:
            batches.generator.set_state(before["batches"])
            for name, part in parts.items():
                part.load_state_dict(before[name])
        for epoch in range(before["epoch"] + 1 if before else 1, trial.epochs + 1):
            for batch in batches:
                optimizer.zero_grad()
                _cross_entropy(model, batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            last = epoch == trial.epochs
            if tuner and last:
                tuner.finish()
            valid, _ = evaluate(model, t2)
            extra = {"test_error": evaluate(model, test)[1]} if last else {}
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"epoch": epoch, "batches": batches.generator.get_state()}
            trial.report(epoch, valid, state, online, **extra)


def problem(what: str, data: str | None = None, train: int | None = None) -> Problem:
    """Return the problem named on the command line.

    Args:
        what: "mlp", or FILE.py:FUNCTION, where the file also defines `space`, a `midflight.search.Space`.
        data: dataset of mlp, a name in `midflight.datasets`; default: digits.
        train: number of training images of mlp; default: all.

    Raises:
        SearchError: the file, function or space does not exist, or the file cannot be imported.
        UnknownName: no dataset has this name.
        SpaceError: the space in the file is invalid.
    """
    if what == "mlp":
        data = "digits" if data is None else data
        split = splits(data, train)[0]
        return Problem(Mlp(data, train), MLP_SPACE, f"mlp on {data}, {len(split)} images")
    path, _, name = what.partition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise SearchError(f"the space must be mlp or FILE.py:FUNCTION, but got {what!r}.")
    if data is not None or train is not None:
        raise SearchError(f"--data and --train are for mlp only, because {path} loads its own data.")
    file = Path(path).resolve()
    module = _module(file)
    if not callable(getattr(module, name, None)):
        raise SearchError(f"{path} must define a function {name}(trial), but does not.")
    space = getattr(module, "space", None)
    if not isinstance(space, Space):
        raise SearchError(f"{path} must define space = midflight.search.Space(...), but space is {space!r}.")
    return Problem(partial(_in_file, file, name), space, f"{file.name}:{name}")


def _in_file(path: Path, name: str, trial: Trial) -> float | None:
    """Call the objective `name` in a Python file; every worker process imports the file again."""
    loss: float | None = getattr(_module(path), name)(trial)
    return loss


@cache
def splits(data: str, train: int | None = None) -> tuple[Split, Split, Split]:
    """Return the (training, validation, test) data of a dataset, the same in every process.

    Raises:
        UnknownName: no dataset has this name.
        SearchError: `train` exceeds the number of training images.
    """
    arrays = load(data)
    order = torch.randperm(len(arrays.train_y), generator=torch.Generator().manual_seed(0))
    valid = round(len(order) * VALID)
    most = len(order) - valid
    if train is not None and not 1 <= train <= most:
        raise SearchError(f"1 <= train <= {most} must hold for {data}, but train={train}.")
    images = Split(torch.from_numpy(arrays.train_x), torch.from_numpy(arrays.train_y))
    test = Split(torch.from_numpy(arrays.test_x), torch.from_numpy(arrays.test_y))
    return images[order[valid:][:train]], images[order[:valid]], test


def network(inputs: int, classes: int, params: Config) -> nn.Sequential:
    """Return a network: input noise, then linear, batch norm, activation and dropout layers; gives logits."""
    layers: list[nn.Module] = [mfnn.GaussianNoise(params["noise"])]
    for _ in range(params["layers"]):
        layers.append(nn.Linear(inputs, params["width"]))
        if params["batch_norm"]:
            layers.append(nn.BatchNorm1d(params["width"]))
        layers += [ACTIVATIONS[params["activation"]](), mfnn.Dropout(params["dropout"])]
        inputs = params["width"]
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def optimizer_for(model: nn.Module, params: Config) -> torch.optim.Optimizer:
    """Return the optimiser of a configuration; options it does not name keep torch's defaults."""
    options = {name: params[name] for name in ("lr", "momentum", "weight_decay") if name in params}
    if params["optimizer"] == "sgd":
        return torch.optim.SGD(model.parameters(), **options)
    kind = torch.optim.AdamW if params["optimizer"] == "adamw" else torch.optim.Adam
    return kind(model.parameters(), fused=True, **options)


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@cache
def _module(path: Path) -> ModuleType:
    name = f"midflight_search_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SearchError(f"the objective must be in a Python file, but {path} does not exist.")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look up their module here
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except MidflightError:
        raise
    except Exception as error:
        raise SearchError(f"{path.name} cannot be imported: {type(error).__name__}: {error}.") from error
    finally:
        sys.path.remove(str(path.parent))
    return module
