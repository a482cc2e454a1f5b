"""The tuner: hyperparameters move now and then inside `optimizer.step()`, and the loop stays as it was."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from midflight._tensors import Tensors, all_finite
from midflight.errors import (
    SpaceError,
    UnknownGradient,
    UnknownName,
    UnreachedHyperparameter,
    UnsupportedSetting,
)
from midflight.hypergrad import Estimator, estimator_for
from midflight.space import Space
from midflight.tuner.binding import Bind, Binding
from midflight.tuner.diagnostics import Bounds, overfitted
from midflight.tuner.finish import choose
from midflight.tuner.hooks import StepHooks
from midflight.tuner.horizon import Averaged, Horizon, NextStep
from midflight.tuner.hyper_optimizer import Move, SignSteps
from midflight.tuner.hyperstep import HyperStep, Look
from midflight.tuner.live import Loss, signals_wait
from midflight.tuner.optimizers import Optimizers, unwrapped
from midflight.tuner.rollback import NonFiniteGuard, Rollback
from midflight.tuner.schedule import Schedule, schedule_for, whole
from midflight.tuner.trajectory import Trajectory

EXAMPLES = 32
"""Of a T1 batch for the mixed partial: with 8, runs end 7 % worse; with more, nothing is gained
(measured)."""
FEW = 10
"""Hyper-steps in a whole run, and `report` says that they are few."""
PATIENCE = 10
"""Hyper-steps without ever reaching a hyperparameter, and it counts as unreachable; undecided gradients
alike."""
MOST_ENTRIES = 10_000
"""Separate hyperparameters in one space; each costs its own small operations."""


class Tuner:
    """Moves the hyperparameters of `space` along the gradient of the validation loss, during training.

        tuner = mf.Tuner(model, optimizer, space, loss_fn, train_loader, valid_loader, total_steps=steps)
        ...                     # the training loop, unchanged
        tuner.finish()

    It hooks `optimizer.step`, where the gradient is what the optimiser really gets: accumulated, unscaled and
    clipped. The loop's own forward and backward see plain numbers. Weights, buffers, modes, gradients and
    random numbers are the same after a hyper-step as before.

    Args:
        model: the model being trained, compiled or not.
        optimizer: the torch optimiser that trains it, or the wrapper of Accelerate, Lightning or Fabric
            around it; a list if several train the model together, each stepping once in a training step. A
            tuner that holds it already is detached, with a warning.
        space: what is tuned.
        loss_fn: (model, batch) -> training loss, a scalar, the mean over the batch. It must be what the loop
            minimises over an optimiser step, and read the hyperparameters where the loop does. It must not
            change state of its own, such as a counter, a tensor or an iterator: the tuner calls it as well,
            and puts back modules and random generators only. It gets each batch in containers of its own.
        train_loader: batches of T1, such as the loop's own loader, which is not disturbed.
        valid_loader: batches of T2, validation data.
        valid_loss_fn: (model, batch) -> validation loss, a scalar, on batches of either loader; `loss_fn` by
            default. Called in eval mode, for the model and for other modules that it uses. It must read the
            weights that the optimiser moves, and change no state of its own either.
        bind: hyperparameters that are options of the optimiser, as names that are both or {hyperparameter:
            option}. None binds every name of the space that is an option; the loss must not read one of those
            as well. An option is the tuned value times the factor that the loop's scheduler gives, for the
            length of a step. Param groups whose option is 0 while others' is not are left alone.
        total_steps: optimiser steps of the whole run, over which hyper-steps anneal to zero. None: they
            shrink slowly and never end.
        schedule: when hyper-steps come: `FrontLoaded()` (one for 20 optimiser steps, most of them early),
            `Every(n)` or `TimeBudget(share)`; a whole number n is `Every(n)`.
        estimator: of the hypergradient, a name from `midflight.hypergrad.ESTIMATORS` or an `Estimator`.
        horizon: "run" judges each step for the run, at averaged weights (`Averaged`); "step" at the weights
            right after it (`NextStep`).
        hyper_optimizer: raw tensors -> torch optimiser that moves them.
        max_grad_norm: the norm to which the loop clips, `math.inf` if it does not; None finds out, at the
            price of a hyper-step or two.
        examples: of a T1 batch for the mixed partial, the first ones along dimension 0 of its tensors. None
            uses whole batches, and so does a model that holds a layer with `batch_first=False`.
        rollback: keep a copy of model, optimiser and hyperparameters, renewed at every so many good
            hyper-steps, and go back to it after three failed ones in a row. None keeps no copy.
        on_hyperstep: called with (optimiser steps so far, `log()`) after each hyper-step.

    Raises:
        BindingError: a bound name is no hyperparameter, or no tunable option of the optimiser.
        UnsupportedOptimizer: there is no update rule for the optimiser.
        UnsupportedParameter: a weight is complex.
        UnusableLoader: a loader is no iterable, or `train_loader` is an iterator or keeps one, or an open
            file.
        InvalidLoss: a loss reads an iterator; at a hyper-step, it is no scalar or not of these weights.
        UnknownName: there is no such estimator or horizon.
        UnsupportedSetting: torch.distributed runs several processes.
        SpaceError: the space has too many separate hyperparameters.
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        space: Space,
        loss_fn: Loss,
        train_loader: Iterable[Any],
        valid_loader: Iterable[Any],
        *,
        valid_loss_fn: Loss | None = None,
        bind: Bind = None,
        total_steps: int | None = None,
        schedule: Schedule | int | None = None,
        estimator: str | Estimator = "one_step",
        horizon: Literal["run", "step"] | Horizon = "run",
        hyper_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = SignSteps,
        max_grad_norm: float | None = None,
        examples: int | None = EXAMPLES,
        rollback: int | None = None,
        on_hyperstep: Callable[[int, dict[str, float]], Any] | None = None,
    ) -> None:
        _require_order(model, space)
        if len(space) > MOST_ENTRIES:
            raise SpaceError(
                f"a space must have at most {MOST_ENTRIES} separate hyperparameters, but has {len(space)}; "
                "use one Float with shape=."
            )
        for name, function in (("loss_fn", loss_fn), ("valid_loss_fn", valid_loss_fn)):
            if not callable(function) and not (name == "valid_loss_fn" and function is None):
                raise TypeError(f"{name} must be a function of (model, batch), but got {function!r}.")
        _require_one_process()
        self._total = None if total_steps is None else whole("total_steps", total_steps)
        self.space = space
        self.horizon = _horizon_for(horizon)
        self.schedule = schedule_for(schedule)
        self.schedule.begin(self._total)
        self.trajectory = Trajectory()
        """The values after each hyper-step; see `midflight.Replay`."""
        self.steps = 0
        """Optimiser steps so far; those of several optimisers in turn count as one."""
        self._optimizers = unwrapped(optimizer)
        self._binding = Binding(self._optimizers, space, bind)
        self._hyperstep = HyperStep(
            model, self._optimizers, space, self._binding, (loss_fn, valid_loss_fn or loss_fn),
            (train_loader, valid_loader), estimator_for(estimator), self.horizon,
            None if examples is None else whole("examples", examples), max_grad_norm,
        )  # fmt: skip
        self._guard = NonFiniteGuard(
            None if rollback is None else Rollback(model, self._optimizers, space, rollback)
        )
        self._move = Move(space.raws, hyper_optimizer, self._progress)
        self._bounds = Bounds()
        self._on_hyperstep = on_hyperstep
        self._look: Look | None = None
        self._versions: list[tuple[Tensor, int]] = []
        self._hypersteps, self._undecided = 0, 0
        self._unreached = dict.fromkeys(space, 0)
        self._log: dict[str, float] = {}
        self.trajectory.record(0, space)
        space.requires_grad_(False)
        self._due = False
        self._binding.attach(self.detach)
        self._hooks: StepHooks | None = StepHooks(
            self._optimizers, self._before_step, self._after_step, self._binding.restore
        )
        self._plan(hyper=False)

    def __enter__(self) -> "Tuner":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def hyper_optimizer(self) -> torch.optim.Optimizer:
        """What moves the raw coordinates."""
        return self._move.optimizer

    @property
    def mixed_partial(self) -> str | None:
        """How d/dlambda <w, g> is found; None before it is needed."""
        return self._hyperstep.mixed.way

    def log(self) -> dict[str, float]:
        """What a logger takes: values of the hyperparameters, losses and counts, name -> number."""
        found: dict[str, float] = {}
        for name in self.space:
            value = self.space[name].value.detach()
            found[f"value/{name}"] = float(value) if value.ndim == 0 else float(value.mean())
        found |= {f"option/{name}": value for name, value in self._binding.actual().items()}
        found |= {**self._log, "hypersteps": self._hypersteps, "skipped": self._guard.skipped}
        found |= {"undecided": self._undecided, "restored": self._guard.restored}
        if self.mixed_partial:
            found[f"mixed_partial/{self.mixed_partial.replace(' ', '_')}"] = 1.0
            found["mixed_partial/examples"] = self._hyperstep.mixed.examples
        if isinstance(self.horizon, Averaged):
            found["caution"] = self.horizon.caution
        spent = getattr(self.schedule, "spent", None)
        return {n: float(x) for n, x in found.items()} | ({} if spent is None else {"cost": float(spent)})

    def report(self, third: Iterable[Any] | None = None) -> list[str]:
        """What a user should know about this run, one sentence each; empty if there is nothing.

        Args:
            third: batches of data that neither trained nor tuned, at least two, in the size of those of
                `valid_loader`; both are gone through once, to see whether T2 is overfitted.

        Raises:
            ValueError: one of the two loaders gives fewer than two batches.
        """
        found = self._guard.report() + self._bounds.report(self.space)
        if self._undecided:
            found.append(
                f"{self._undecided} hyper-steps were left out: what happened to the gradient before the step "
                "was not clear; pass max_grad_norm= if it is clipped."
            )
        if self._total and not 0.5 <= self.steps / self._total <= 1:
            found.append(
                f"the run had {self.steps} optimiser steps, but total_steps={self._total}; hyper-steps "
                "anneal over total_steps."
            )
        found += self._silent()
        if third is not None:
            live = self._hyperstep.live
            with live.borrowed(), torch.no_grad():
                loss = partial(live.valid_loss, self._hyperstep.valid_loss)
                found += overfitted(loss, self._hyperstep.t2.whole_pass(), third)
        return found

    def _silent(self) -> list[str]:
        """What went without an error, and may not be what the user wants."""
        found = []
        if self._hypersteps < FEW and self.steps >= 10 * FEW:
            spent = getattr(self.schedule, "spent", None)
            took = "" if spent is None else f", which took {spent:.1%} of the training time"
            found.append(
                f"there were {self._hypersteps} hyper-steps in {self.steps} optimiser steps{took}; "
                "hyperparameters hardly move in so few: train longer, or allow more with schedule=."
            )
        never = [name for name, count in self._unreached.items() if count]
        if never:
            found.append(
                f"{', '.join(never)} reached neither the training loss nor the optimiser at any hyper-step; "
                "use it in the model or in loss_fn, or name it as the option that it is."
            )
        if self._hyperstep.read_in_validation:
            found.append(
                f"the validation loss itself reads {', '.join(self._hyperstep.read_in_validation)}, which is "
                "then tuned to make it small; pass a valid_loss_fn that does not."
            )
        return found

    def finish(self) -> dict[str, float]:
        """End the run: stop tuning, and give the model the best of the weights that the run has to offer.

        These are the last ones, and with the horizon "run" also the average of the recent ones and the
        average where the validation loss was least on the way. One pass through T2 for each decides, or 100
        batches where T2 has no end.

        Returns:
            the name of each ("last", "average", "earlier") -> its validation loss, the mean over the examples
            of T2, the best first.
        """
        self.detach()
        return choose(self._hyperstep, self.horizon.candidates())

    def detach(self) -> None:
        """Stop tuning: remove every hook. The space keeps its values, and so do the optimiser's options."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
            self._hyperstep.received.rest()
            self._binding.detach()
            self._binding.settle()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, the space's values and the place in the data included."""
        return {
            "steps": self.steps,
            "hypersteps": self._hypersteps,
            "undecided": self._undecided,
            "unreached": dict(self._unreached),
            "policies": self._policies(),
            "schedule": self.schedule.state_dict(),
            "guard": self._guard.state_dict(),
            "bounds": self._bounds.state_dict(),
            "trajectory": self.trajectory.state_dict(),
            "space": self.space.state_dict(),
            "move": self._move.state_dict(),
            "hyperstep": self._hyperstep.state_dict(),
            "binding": self._binding.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`, before or after the optimiser's own.

        Raises:
            ValueError: it is no state of a tuner, or of one with another schedule, horizon or
                hyper-optimiser.
            SpaceError, BindingError: it had other hyperparameters, or bound others.
        """
        missing = set(self.state_dict()) - set(state or ())
        if missing:
            raise ValueError(
                f"state must be what state_dict() of a tuner gave, but has no {', '.join(sorted(missing))}."
            )
        if state["policies"] != self._policies():
            raise ValueError(
                f"the saved tuner was made with {state['policies']}, this one with {self._policies()}; "
                "make it with the same arguments."
            )
        same = state["space"]["range"] == self.space.state_dict()["range"]
        self._binding.load_state_dict(state["binding"])
        self.space.load_state_dict(state["space"])
        self.steps, self._hypersteps = state["steps"], state["hypersteps"]
        self._undecided, self._unreached = state["undecided"], dict(state["unreached"])
        self._guard.load_state_dict(state["guard"])
        self._bounds.load_state_dict(state["bounds"])
        if same:
            self.trajectory.load_state_dict(state["trajectory"])
        else:  # in coordinates of another range
            self.trajectory = Trajectory()
            self.trajectory.record(self.steps, self.space)
        self._move.load_state_dict(state["move"])
        self._hyperstep.load_state_dict(state["hyperstep"])
        self.schedule.load_state_dict(state["schedule"])
        self._look = None
        self._plan(hyper=False)

    def _policies(self) -> dict[str, str]:
        policies = {
            "schedule": self.schedule,
            "horizon": self.horizon,
            "hyper_optimizer": self.hyper_optimizer,
        }
        return {name: type(policy).__name__ for name, policy in policies.items()}

    def _before_step(self, optimizer: torch.optim.Optimizer, first: bool) -> None:
        """The gradient is final, the weights are still those of the forward pass."""
        self._binding.restore()  # an earlier step that failed may have left values behind
        if self._due and first and not _skips(optimizer):
            try:
                with signals_wait():
                    self._look = self._take_look()
            except BaseException:
                self._hyperstep.watch()  # the loop may go on
                raise
            self._versions = self._gradient_versions()
        elif self._look is not None and not first and self._gradients_changed():
            self._look = None
            self._leave_out(
                UnknownGradient(
                    "all gradients must be final before the first optimiser of a training step moves, but "
                    "some changed after that; step the optimisers together, or tune one alone."
                )
            )
        self._binding.write(optimizer)

    def _take_look(self) -> Look | None:
        try:
            look = self._hyperstep()
        except UnknownGradient as error:
            self._leave_out(error)
            return None
        losses = [look.valid_loss, *([] if look.train_loss is None else [look.train_loss])]
        if all(map(math.isfinite, losses)) and all_finite(look.hypergradients.values()):
            self._guard.good()
            self._require_reached(look.hypergradients)
            return look
        if self._guard.failed():
            self.horizon.forget()
        self._move.shrink(self._guard.shrink)
        return None

    def _leave_out(self, error: UnknownGradient) -> None:
        """This hyper-step does not come; raises the error if none ever does."""
        self._undecided += 1
        if self._undecided >= PATIENCE and not self._hypersteps:
            raise error

    def _require_reached(self, found: Tensors) -> None:
        """A miss is no error, for a branch may be random; never reached at all is."""
        for name in self.space:
            if name in found:
                self._unreached.pop(name, None)
            elif name in self._unreached:
                self._unreached[name] += 1
        missing = [name for name, count in self._unreached.items() if count >= PATIENCE]
        if missing:
            raise UnreachedHyperparameter(
                f"each hyperparameter must reach the gradient of the training loss or a tuned option, but "
                f"{', '.join(missing)} did not in {PATIENCE} hyper-steps; use it in the model or in loss_fn, "
                "or bind it to an option of the optimiser with bind=."
            )

    def _after_step(self, optimizer: torch.optim.Optimizer, last: bool) -> None:
        self._binding.restore()
        if not last or _skips(optimizer):
            return
        works = self._due or self.horizon.due(self.steps + 1)
        with signals_wait() if works else nullcontext():
            moved = self._end_step()
        if moved and self._on_hyperstep is not None:
            self._on_hyperstep(self.steps, self.log())
        if self._total is not None and self.steps == self._total + 1:
            warnings.warn(
                f"the run is longer than total_steps={self._total} optimiser steps; hyperparameters move no "
                "more.",
                stacklevel=2,
            )

    def _end_step(self) -> bool:
        """Count the step, move the hyperparameters if it had a look at them, and plan the next one.

        Returns:
            whether they moved.
        """
        self.steps += 1
        hyper, busy = self._due, False
        look, self._look = self._look, None
        try:
            if self.horizon.due(self.steps):
                busy = self.horizon.follow(self._hyperstep.params(), self.steps, self._progress())
            if look is not None:
                self._apply(look)
        finally:
            self._plan(hyper, busy)
        return look is not None

    def _apply(self, look: Look) -> None:
        """Move the hyperparameters."""
        if isinstance(self.hyper_optimizer, SignSteps) and self.horizon.looks:
            self.hyper_optimizer.set_calm(self.horizon.calm)
        self._move(look.hypergradients, self._guard.shrink * self.schedule.step_scale)
        if look.train_loss is not None:
            self.horizon.observe(
                look.train_loss, look.valid_loss, self._progress(), self._hyperstep.buffers()
            )
            self._log["train_loss"] = look.train_loss
        self._hypersteps += 1
        self._bounds.observe(self.space)
        self.trajectory.record(self.steps, self.space)
        self._log["valid_loss"] = look.valid_loss
        for name, g in look.hypergradients.items():
            self._log[f"hypergradient/{name}"] = float(g.mean())

    def _plan(self, hyper: bool, busy: bool = False) -> None:
        self._due = self.schedule.next_is_hyper(self.steps, hyper, busy)
        if self._due:
            self._hyperstep.watch()

    def _progress(self) -> float | None:
        """The share of the run that is over; None if its length is not known."""
        return None if self._total is None else min(1.0, self.steps / self._total)

    def _gradient_versions(self) -> list[tuple[Tensor, int]]:
        """The gradients and how often they were changed, where several optimisers step in turn."""
        if len(self._optimizers) == 1:
            return []
        return [(p.grad, p.grad._version) for p in self._hyperstep.params().values() if p.grad is not None]

    def _gradients_changed(self) -> bool:
        now = self._gradient_versions()
        return len(now) != len(self._versions) or any(
            a is not b or i != j for (a, i), (b, j) in zip(now, self._versions, strict=True)
        )


def _require_order(model: Any, space: Any) -> None:
    for name, value, kind in (("model", model, nn.Module), ("space", space, Space)):
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} must be a {kind.__name__}, but got a {type(value).__name__}; the order is "
                "Tuner(model, optimizer, space, loss_fn, train_loader, valid_loader)."
            )


def _require_one_process() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise UnsupportedSetting(
            f"the tuner works in one process, but torch.distributed runs {distributed.get_world_size()}: "
            "each would move its hyperparameters by its own gradient, and the ranks would part."
        )


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a `GradScaler` found infinite gradients and a fused optimiser is to leave out its step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _horizon_for(horizon: str | Horizon) -> Horizon:
    if not isinstance(horizon, str):
        if not hasattr(horizon, "place"):
            raise UnknownName("horizon", horizon, ("run", "step"))
        return horizon
    if horizon not in ("run", "step"):
        raise UnknownName("horizon", horizon, ("run", "step"))
    if horizon == "run":
        return Averaged()
    return NextStep()
