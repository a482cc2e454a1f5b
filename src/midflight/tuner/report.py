"""Report what a user should know about a run: numbers for a logger, and sentences."""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from midflight.space import Space
from midflight.tuner.binding import Binding
from midflight.tuner.controller import Controller
from midflight.tuner.diagnostics import overfitted
from midflight.tuner.hyperstep import HyperStep

FEW = 20
"""The number of hyper-steps in a run below which the report says that they are few."""
NORMALLY_UNDECIDED = 2
"""So many hyper-steps are left out where a loop clips, until the norm is known."""
SHORT = 0.5
"""The share of `total_steps` below which the report says that the run was short."""
EARLIER = 0.9
"""The report says that validation rises, or after `finish` that tuning did not finish, if earlier weights
have less than this share of the loss of the last or average weights."""


def numbers(space: Space, binding: Binding, controller: Controller, hyperstep: HyperStep) -> dict[str, float]:
    """Return numbers for a logger: values of hyperparameters, losses and counts, name -> number."""
    values = {f"value/{name}": float(space[name].value.detach().mean()) for name in space}
    options = {f"option/{name}": value for name, value in binding.actual().items()}
    counts = {
        "hypersteps": controller.hypersteps,
        "undecided": controller.undecided,
        "skipped": controller.failures.skipped,
        "restored": controller.guard.restored if controller.guard else 0,
    }
    found = {**values, **options, **controller.log, **counts}
    found |= {**hyperstep.mixed.log(), **controller.horizon.log()}
    if (used := "mixed_partial/examples") in found:  # 0 if they cannot be counted, so whole batches are used
        found[used] = min(found[used], hyperstep.t1.examples or 0)
    if controller.cost is not None:
        found["cost"] = controller.cost
    return {name: float(number) for name, number in found.items()}


def sentences(
    space: Space, controller: Controller, hyperstep: HyperStep, finished: Mapping[str, float]
) -> list[str]:
    """Return what a run shows without further data, one sentence each; empty if there is nothing to say.

    Args:
        finished: what `Tuner.finish` returned; empty before it.
    """
    run, total = controller, controller.total_steps
    found = run.failures.report() + run.bounds.report(space)
    if run.guard is not None:
        found = run.guard.report() + found
    if run.undecided > NORMALLY_UNDECIDED:
        found.append(
            f"hyper-steps left out: {run.undecided}, since it was not clear what happened to the gradient "
            "before the step; pass max_grad_norm= if it is clipped."
        )
    if not run.steps:
        found.append(
            "the tuner's optimiser never stepped; build the tuner after the optimiser that the loop uses."
        )
    elif total and not SHORT <= run.steps / total <= 1:
        other = " Did the loop take more? Build the tuner after the optimiser that the loop uses."
        found.append(
            f"the run had {run.steps} optimiser steps, but total_steps={total}; hyper-steps "
            f"anneal over total_steps.{other * (run.steps < total)}"
        )
    if run.hypersteps < FEW and run.steps >= 5 * FEW:
        took = "" if run.cost is None else f", which took {run.cost:.1%} of the training time"
        found.append(
            f"only {run.hypersteps} of {run.steps} optimiser steps had a hyper-step{took}; "
            "hyperparameters hardly move in so few: train longer, or allow more with schedule=."
        )
    found += _earlier(space, run, finished) if finished else _rising(run)
    return found + run.signal.report() + run.reach.report() + hyperstep.about_validation()


def _earlier(space: Space, run: Controller, finished: Mapping[str, float]) -> list[str]:
    """Return a sentence if weights of an earlier moment won clearly, with the values at that moment."""
    earlier, *others = (finished.get(n, math.inf) for n in ("earlier", "average", "last"))
    if not earlier < EARLIER * min(others):
        return []
    then = run.trajectory.at(min(1.0, run.best_step / max(1, run.steps)))
    values = ", ".join(
        f"{name} {float(space[name].transform.value(raw).mean()):.3g} there and "
        f"{float(space[name].value.detach().mean()):.3g} now"
        for name, raw in then.items()
    )
    return [
        f"finish kept the average weights of step {run.best_step} of {run.steps}: they validate at "
        f"{earlier:.4g}, those of the end at {min(others):.4g} ({values}). Tuning did not finish: train "
        "longer, allow more hyper-steps with schedule=, or start from the values now."
    ]


def _rising(run: Controller) -> list[str]:
    """Return a sentence if the validation loss has risen since an earlier moment."""
    losses = run.horizon.log()
    best, now = (losses.get(name, math.nan) for name in ("best_loss", "recent_loss"))
    if not (0 < best < EARLIER * now):
        return []
    return [
        f"the validation loss has risen from {best:.4g} at step {run.best_step} to {now:.4g}; "
        "finish() takes the weights of that step."
    ]


def beside_third(hyperstep: HyperStep, third: Iterable[Any]) -> list[str]:
    """Return a sentence if T2 is overfitted; see `overfitted`.

    Args:
        third: batches of data used neither to train nor to tune.
    """
    live = hyperstep.live

    def loss(batch: Any) -> float:
        return live.number(partial(live.valid_loss, hyperstep.valid_loss, batch))

    with live.borrowed():
        return overfitted(loss, hyperstep.t2.whole_pass(), third)
