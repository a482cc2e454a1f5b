"""Report what a user should know about a run: numbers for a logger, and sentences."""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from midflight._tensors import all_finite
from midflight.hypergrad import ESTIMATORS
from midflight.space import Space
from midflight.tuner.binding import Binding
from midflight.tuner.controller import Controller
from midflight.tuner.diagnostics import overfitted
from midflight.tuner.hyperstep import HyperStep
from midflight.tuner.sharded import part

FEW = 20
"""The number of hyper-steps in a run below which the report says that they are few."""
FEW_OF_SHARES = 8
"""The same if nothing but mixtures is tuned, whose hyper-steps come evenly and are longer."""
NORMALLY_UNDECIDED = 2
"""The number of left-out hyper-steps that is normal if the loop clips."""
SHORT = 0.5
"""The share of `total_steps` below which the report says that the run was short."""
STANDS_STILL = 0.01
"""The share of its first value below which the report says that a learning rate fell."""
EARLIER = 0.9
"""The report warns if earlier weights have less than this share of the loss of the last or average
weights."""


def numbers(space: Space, binding: Binding, controller: Controller, hyperstep: HyperStep) -> dict[str, float]:
    """Return numbers for a logger: values of hyperparameters, losses and counts, name -> number."""
    values = {f"value/{part}": x for name in space for part, x in space[name].parts().items()}
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


def card(
    space: Space,
    binding: Binding,
    controller: Controller,
    hyperstep: HyperStep,
    finished: Mapping[str, float],
) -> str:
    """Return what is tuned, how, and what it has cost so far, a line each.

    Args:
        finished: what `Tuner.finish` returned; empty before it.
    """
    run, mixed = controller, hyperstep.mixed
    of = "" if run.total_steps is None else f" of {run.total_steps}"
    took = "" if run.seconds is None else f", which took {run.seconds:.3g} s"
    log, estimator = run.horizon.log(), hyperstep.estimator
    name = next((n for n, known in ESTIMATORS.items() if known is estimator), type(estimator).__name__)
    losses = f"validation loss {log['recent_loss']:.4g} at averaged weights; " if "recent_loss" in log else ""
    if finished:
        losses = f"finished with {next(iter(finished))}, validation loss {min(finished.values()):.4g}; "
    method = "not needed" if hyperstep.reads_loss is False else mixed.method or "not computed yet"
    actual = binding.actual()
    lines = [
        f"step {run.steps}{of}, {run.hypersteps} hyper-steps{took}",
        f"estimator {name}, mixed partial: {method}",
        f"schedule {type(run.schedule).__name__}, horizon {type(run.horizon).__name__}, "
        f"hyper_optimizer {type(run.move.optimizer).__name__}, guard {'on' if run.guard else 'off'}",
        f"{losses}left out: {run.undecided} unclear, {run.failures.skipped} not finite; went back "
        f"{run.guard.restored if run.guard else 0} times",
    ]
    for name in space:
        option = binding.options.get(name)
        where = "read by the loss" if option is None else f"option {option}, {actual[option]:.4g} now"
        lines.append(f"{space[name]!r}: {where}")
    return "\n".join(lines)


def sentences(
    space: Space, controller: Controller, hyperstep: HyperStep, finished: Mapping[str, float]
) -> list[str]:
    """Return what a run shows without further data, one sentence each; empty if there is nothing to say.

    Args:
        finished: what `Tuner.finish` returned; empty before it.
    """
    run, total = controller, controller.total_steps
    about_loss = _earlier(space, run, finished) if finished else _rising(run)
    found = run.returns() + run.failures.report() + run.bounds.report(space, paid=not about_loss)
    groups = (group for optimizer in hyperstep.optimizers for group in optimizer.param_groups)
    # a process looks at its own parts of sharded weights, because it may ask for the report alone
    finite = all_finite(part(p).detach() for group in groups for p in group["params"])
    if not finite:
        guarded = "" if run.guard is not None else 'keep guard=True and horizon="run", or '
        found.append(f"the weights are not finite; {guarded}start from a lower lr.")
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
    few = FEW_OF_SHARES if all(space[name].spec.is_shares for name in space) else FEW
    if run.hypersteps < few and run.steps >= 5 * FEW and finite and not (total and run.steps > total):
        took = "" if run.cost is None else f", which took {run.cost:.1%} of the training time"
        found.append(
            f"only {run.hypersteps} of {run.steps} optimiser steps had a hyper-step{took}; "
            "hyperparameters hardly move in so few: train longer, or pass "
            f"schedule={max(1, run.steps // (2 * few))}."
        )
    moves = _moves(space, run)
    found += about_loss + _fallen(space, run, moves) + run.signal.report(moves)
    return found + run.reach.report() + hyperstep.about_validation()


def _moves(space: Space, run: Controller) -> dict[str, str]:
    """Return name -> "from its first to its last value", in words; means of tensors."""
    first = run.trajectory.at(0.0)
    return {
        name: f"from {_mean(space, name, first[name]):.3g} to {_mean(space, name, raw):.3g}"
        for name, raw in space.raws.items()
    }


def _mean(space: Space, name: str, raw: Tensor) -> float:
    return float(space[name].transform.value(raw.detach()).mean())


def _most_changed(space: Space, name: str, raw: Tensor) -> tuple[str, float, float]:
    """Return name, value then and value now: means, or of a mixture the source whose share changed most."""
    if not space[name].spec.is_shares:
        return name, _mean(space, name, raw), _mean(space, name, space.raws[name])
    now = space[name].parts()
    then = space[name].transform.value(raw.detach()).tolist()
    changes = zip(now, then, now.values(), strict=True)
    return max(changes, key=lambda change: abs(change[2] - change[1]))


def _fallen(space: Space, run: Controller, moves: Mapping[str, str]) -> list[str]:
    """Return a sentence for each learning rate that is far below its start, where the run stands still."""
    first = run.trajectory.at(0.0)
    rates = [name for name, option in run.options.items() if option == "lr"]
    return [
        f"{name} fell {moves[name]}, so the weights hardly move any more; compare with a fixed run, or raise "
        "the lower bound of its range."
        for name in rates
        if _mean(space, name, space.raws[name]) < STANDS_STILL * _mean(space, name, first[name])
    ]


def _earlier(space: Space, run: Controller, finished: Mapping[str, float]) -> list[str]:
    """Return a sentence if weights of an earlier moment won clearly, with the values at that moment."""
    earlier, *others = (finished.get(n, math.inf) for n in ("earlier", "average", "last"))
    if not earlier < min(others) - (1 - EARLIER) * abs(min(others)):
        return []
    then = run.trajectory.at(min(1.0, run.best_step / max(1, run.steps)))
    values = ", ".join(
        "{} was {:.3g} there, and is {:.3g} at the end".format(*_most_changed(space, name, raw))
        for name, raw in then.items()
    )
    return [
        f"finish kept the average weights of step {run.best_step} of {run.steps}: their validation loss is "
        f"{earlier:.4g}; that of the weights at the end is {min(others):.4g} ({values}). Train longer, allow "
        "more hyper-steps with schedule=, or start again from the values at the end."
    ]


def _rising(run: Controller) -> list[str]:
    """Return a sentence if the validation loss has risen since an earlier moment."""
    losses = run.horizon.log()
    best, now = (losses.get(name, math.nan) for name in ("best_loss", "recent_loss"))
    if not (0 < best < EARLIER * now) or (run.guard is not None and run.guard.replaced):
        return []
    return [
        f"the validation loss of the averaged weights has risen from {best:.4g} at step {run.best_step} to "
        f"{now:.4g}, on single batches; finish() compares the two on all of T2."
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
