"""What a user should know about a run: numbers for a logger, and sentences."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from midflight.space import Space
from midflight.tuner.binding import Binding
from midflight.tuner.controller import Controller
from midflight.tuner.diagnostics import overfitted
from midflight.tuner.hyperstep import HyperStep

FEW = 10
"""Hyper-steps in a whole run, and the report says that they are few."""


def numbers(space: Space, binding: Binding, controller: Controller, hyperstep: HyperStep) -> dict[str, float]:
    """What a logger takes: values of the hyperparameters, losses and counts, name -> number."""
    values = {f"value/{name}": float(space[name].value.detach().mean()) for name in space}
    options = {f"option/{name}": value for name, value in binding.actual().items()}
    counts = {"hypersteps": controller.hypersteps, "undecided": controller.undecided}
    found = {**values, **options, **controller.log, **counts}
    found |= {**controller.guard.counts(), **hyperstep.mixed.log(), **controller.horizon.log()}
    if controller.cost is not None:
        found["cost"] = controller.cost
    return {name: float(number) for name, number in found.items()}


def sentences(space: Space, controller: Controller, hyperstep: HyperStep) -> list[str]:
    """What a run shows without further data; empty if there is nothing to say."""
    run, total = controller, controller.total_steps
    found = run.guard.report() + run.bounds.report(space)
    if run.undecided:
        found.append(
            f"{run.undecided} hyper-steps were left out: what happened to the gradient before the step "
            "was not clear; pass max_grad_norm= if it is clipped."
        )
    if total and not 0.5 <= run.steps / total <= 1:
        found.append(
            f"the run had {run.steps} optimiser steps, but total_steps={total}; hyper-steps "
            "anneal over total_steps."
        )
    if run.hypersteps < FEW and run.steps >= 10 * FEW:
        took = "" if run.cost is None else f", which took {run.cost:.1%} of the training time"
        found.append(
            f"there were {run.hypersteps} hyper-steps in {run.steps} optimiser steps{took}; "
            "hyperparameters hardly move in so few: train longer, or allow more with schedule=."
        )
    found += run.reach.report()
    if hyperstep.read_in_validation:
        found.append(
            f"the validation loss itself reads {', '.join(hyperstep.read_in_validation)}, which is "
            "then tuned to make it small; pass a valid_loss_fn that does not."
        )
    return found


def beside_third(hyperstep: HyperStep, third: Iterable[Any]) -> list[str]:
    """A sentence if T2 is overfitted; see `overfitted`."""
    live = hyperstep.live
    with live.borrowed(), torch.no_grad():
        loss = partial(live.valid_loss, hyperstep.valid_loss)
        return overfitted(loss, hyperstep.t2.whole_pass(), third)
