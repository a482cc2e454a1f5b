"""Provide the optimisers of `torch.optim` as pure functions theta' = U(theta, s, g, phi), one per file.

`base` defines the symbols. A rule is one file and one row of `RULES`; CONTRIBUTING.md says how to test it.

There are four kinds of optimisers:

- The step is differentiable with respect to g: any hyperparameter can be tuned. Most rules are of this kind.
- dU/dg is 0 almost everywhere, because the step rounds g or takes its sign. But the step has derivatives with
  respect to options such as lr. Its rule says so in `why_not_differentiable`, and these options can be tuned.
- An optimiser that is not here, of another package for example, is a `BlackBox`: it runs on copies.
- The step is no function of one dense gradient, or neither g nor an option has a useful derivative. A row of
  `REFUSED` says why.
"""

import inspect

import torch

from midflight.errors import UnsupportedOptimizer
from midflight.updates.adadelta import Adadelta
from midflight.updates.adafactor import Adafactor
from midflight.updates.adagrad import Adagrad
from midflight.updates.adam import Adam
from midflight.updates.adamax import Adamax
from midflight.updates.asgd import ASGD
from midflight.updates.base import (
    Options,
    State,
    Update,
    UpdateRule,
    read_option,
    read_options,
    tuned_options,
    write_option,
)
from midflight.updates.black_box import BlackBox
from midflight.updates.blocks import Updates, step_ahead, step_pullback
from midflight.updates.compiled_adam import CompiledAdam
from midflight.updates.muon import Muon
from midflight.updates.nadam import NAdam
from midflight.updates.radam import RAdam
from midflight.updates.rmsprop import RMSprop
from midflight.updates.sgd import SGD

RULES: dict[type[torch.optim.Optimizer], UpdateRule] = {
    torch.optim.SGD: SGD(),
    torch.optim.Adam: Adam(),
    torch.optim.AdamW: Adam(),
    torch.optim.NAdam: NAdam(),
    torch.optim.RAdam: RAdam(),
    torch.optim.Adamax: Adamax(),
    torch.optim.RMSprop: RMSprop(),
    torch.optim.Adagrad: Adagrad(),
    torch.optim.Adadelta: Adadelta(),
    torch.optim.Adafactor: Adafactor(),
    torch.optim.ASGD: ASGD(),
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    RULES[torch.optim.Muon] = Muon()

REFUSED: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: "each step evaluates the loss many times, so it is no function of one gradient; "
    "use SGD with momentum or Adam.",
    torch.optim.Rprop: "its step uses only the sign of the gradient, so hyperparameters of the loss have "
    "no derivative, and lr acts at the first step only; use RMSprop.",
    torch.optim.SparseAdam: "it takes sparse gradients; build the embedding with sparse=False and use Adam.",
}
"""Optimiser of torch without a rule -> the reason."""


def rule_for(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Return the update rule of a torch optimiser.

    An optimiser without a row in `RULES` is a `BlackBox`. A subclass that overrides `step` counts as another
    optimiser.

    Raises:
        UnsupportedOptimizer: it is among `REFUSED`, or no `BlackBox`.
    """
    kind = _stepping(type(optimizer))
    if kind in REFUSED:
        raise UnsupportedOptimizer(f"{kind.__name__} cannot be differentiated: {REFUSED[kind]}")
    return RULES[kind] if kind in RULES else BlackBox(optimizer)


def compiled(rule: UpdateRule, device: torch.device) -> UpdateRule:
    """Return the rule compiled by torch.compile for Adam and AdamW, and any other rule unchanged.

    Raises:
        NoCompiler: torch.compile does not work on the device.
    """
    return CompiledAdam(device) if isinstance(rule, Adam) else rule


def _stepping(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return the torch class whose `step` this class uses: its base if it does not override `step`."""
    for base in kind.__mro__:
        if base in RULES or base in REFUSED:
            same = inspect.unwrap(kind.step) is inspect.unwrap(base.step)
            return base if same else kind
    return kind


__all__ = [
    "ASGD",
    "REFUSED",
    "RULES",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "BlackBox",
    "Muon",
    "NAdam",
    "Options",
    "RAdam",
    "RMSprop",
    "State",
    "Update",
    "UpdateRule",
    "Updates",
    "compiled",
    "read_option",
    "read_options",
    "rule_for",
    "step_ahead",
    "step_pullback",
    "tuned_options",
    "write_option",
]
