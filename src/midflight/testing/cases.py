"""The conformance table: every update rule with every kind of hyperparameter, on a small smooth network.

A new rule or kind of hyperparameter is one row in `OPTIMIZERS` or `KINDS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midflight.capture import trained_parameters
from midflight.nn import GaussianNoise
from midflight.problem import Problem
from midflight.space import Float, Hyperparameter, Space
from midflight.trees import Tensors, detach
from midflight.updates import State, Update, read_options, rule_for

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "SGD Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.5), amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, betas=(0.9, 0.95)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=0.02),
}

KINDS: dict[str, tuple[Float, str | None]] = {
    "weight_decay": (Float(1e-4, 1e-1, log=True, init=1e-2), "weight_decay"),
    "noise": (Float(0.0, 0.8, init=0.3), None),
}
"""Hyperparameter -> its range and the optimiser option it is bound to, if any."""


@dataclass(frozen=True)
class Case:
    """A problem with a state in the middle of training, in float64.

    Attributes:
        optimizer: the row of `OPTIMIZERS`.
        hyperparameter: the row of `KINDS`.
        hparams: its raw coordinate; `values` maps it to what the model sees.
    """

    optimizer: str
    hyperparameter: str
    problem: Problem
    params: Tensors
    hparams: Tensors
    state: dict[str, State]


def make_case(optimizer: str, hyperparameter: str, seed: int = 0, steps: int = 20) -> Case:
    """A row of `OPTIMIZERS` with a row of `KINDS`, after some steps of training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _trained(optimizer, hyperparameter, steps, seed)


def _trained(optimizer_name: str, kind: str, steps: int, seed: int) -> Case:
    spec, option = KINDS[kind]
    space = Space({kind: spec}, dtype=torch.float64)
    noise: Hyperparameter | float = space["noise"] if kind == "noise" else 0.1
    model = nn.Sequential(
        GaussianNoise(noise), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    ).double()
    teacher = nn.Linear(12, 3).double()
    x_train, x_valid = torch.randn(2, 40, 12, dtype=torch.float64)
    y_train, y_valid = (teacher(x).argmax(1) for x in (x_train, x_valid))
    optimizer = OPTIMIZERS[optimizer_name](list(model.parameters()))
    weights = trained_parameters(model, optimizer)
    rule = rule_for(optimizer)
    options = read_options(optimizer.param_groups[0])
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x_train), y_train).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def loss(params: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    def train_loss(params: Tensors, hparams: Tensors) -> Tensor:
        with torch.random.fork_rng(devices=[]), space.using(hparams):
            torch.manual_seed(seed)
            return loss(params, x_train, y_train)

    def valid_loss(params: Tensors) -> Tensor:
        model.eval()
        try:
            return loss(params, x_valid, y_valid)
        finally:
            model.train()

    def updates(hparams: Tensors) -> dict[str, Update]:
        with space.using(hparams):
            tuned = {} if option is None else {option: space[kind].value}
        return {name: Update(rule, {**options, **tuned}) for name in weights}

    return Case(
        optimizer_name,
        kind,
        Problem(train_loss, valid_loss, updates),
        detach(weights),
        detach(space.raws),
        {name: optimizer.state.get(p, {}) for name, p in weights.items()},
    )
