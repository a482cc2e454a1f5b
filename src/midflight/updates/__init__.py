"""Update rules theta' = U(theta, s, g, phi) as pure functions, one file per family.

A new rule is one file here and one row in `RULES`; the row gives it every test.
"""

import torch

from midflight.errors import UnsupportedOptimizer
from midflight.updates.adam import Adam
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
from midflight.updates.sgd import SGD

RULES: dict[type[torch.optim.Optimizer], UpdateRule] = {
    torch.optim.SGD: SGD(),
    torch.optim.Adam: Adam(),
    torch.optim.AdamW: Adam(),
}


def rule_for(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """The pure twin of a torch optimiser.

    Raises:
        UnsupportedOptimizer: there is none; a subclass counts as another optimiser, for its step
            may differ.
    """
    rule = RULES.get(type(optimizer))
    if rule is None:
        names = ", ".join(sorted(o.__name__ for o in RULES))
        raise UnsupportedOptimizer(
            f"the optimiser must be one of {names} of torch.optim, but got {type(optimizer).__name__}; "
            "use one of these, or add an UpdateRule for it to midflight.updates.RULES."
        )
    return rule


__all__ = [
    "RULES",
    "SGD",
    "Adam",
    "Options",
    "State",
    "Update",
    "UpdateRule",
    "read_option",
    "read_options",
    "rule_for",
    "tuned_options",
    "write_option",
]
