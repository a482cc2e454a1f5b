"""Decide at each optimiser step whether the hyperparameters move, and move them.

before the step    compute the hypergradients of the step about to be taken, if a hyper-step is due
after the step     move the hyperparameters against them, and ask the schedule for the next hyper-step
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from midflight._tensors import Tensors, all_finite
from midflight.errors import UnknownGradient, warn
from midflight.space import Space
from midflight.tuner.diagnostics import PATIENCE, Bounds, Reach, Signal
from midflight.tuner.failures import Failures
from midflight.tuner.gradient import StandingWeights
from midflight.tuner.guard import LOOKS, Guard
from midflight.tuner.horizon import Horizon
from midflight.tuner.hyper_optimizer import MakeOptimizer, Move, SignSteps
from midflight.tuner.hyperstep import HyperStep, HyperStepResult
from midflight.tuner.live import signals_wait
from midflight.tuner.schedule import Schedule
from midflight.tuner.sharded import part
from midflight.tuner.step_options import ERASED, stride
from midflight.tuner.trajectory import Trajectory

_COUNTS = "steps", "hypersteps", "undecided", "best_step", "first_losses", "learned"
UNKNOWN_STEPS = 1000
"""A run of unknown length counts as this long at least."""
UNLEARNED, LEARNED = 0.25, 0.03
"""A model has learned once C1 or C2 has fallen by the share LEARNED of its first value. Before that, only
options that set how a step is taken may rise above their start. The signs of all other hypergradients are
noise then, and with too much noise, dropout or decay a model does not learn at all. Steps in ranges wider
than usual are multiplied by UNLEARNED, because such a range does not say which values are sensible."""


class Controller:
    """Moves the hyperparameters of a run, step by step.

    Args:
        space: the hyperparameters.
        hyperstep: computes hypergradients.
        horizon: decides at which weights the validation gradient is taken.
        schedule: decides when hyper-steps come.
        failures: counts hyper-steps that fail.
        guard: goes back if the run diverges; None leaves it alone.
        options: hyperparameter -> option; only options that set how a step is taken.
        hyper_optimizer: raw tensors -> torch optimiser that moves them.
        total_steps: optimiser steps of the whole run; None if that is not known.

    Attributes:
        steps: optimiser steps so far.
        hypersteps: hyper-steps that moved the hyperparameters so far.
        undecided: hyper-steps left out so far because the gradient was unknown.
        best_step: the optimiser step at which the average validated best.
        first_losses: C1 and C2 at the first hyper-step; None before it, and if the horizon needs no losses.
        learned: whether one of them has fallen clearly since.
        due: whether the coming optimiser step has a hyper-step.
        seconds: that computing hypergradients took in this process; None before the first.
        log: losses and mean hypergradients of the last hyper-step, by name.
    """

    def __init__(
        self,
        space: Space,
        hyperstep: HyperStep,
        horizon: Horizon,
        schedule: Schedule,
        failures: Failures,
        guard: Guard | None,
        options: Mapping[str, str],
        hyper_optimizer: MakeOptimizer,
        total_steps: int | None,
    ) -> None:
        self._space, self._hyperstep, self.horizon = space, hyperstep, horizon
        self.schedule, self.failures, self.total_steps = schedule, failures, total_steps
        self.guard, self.options = guard, dict(options)
        self._returns: list[tuple[int, str]] = []
        """Optimiser step and reason of each return of the guard."""
        hyperstep.compares = guard is not None
        self.steps, self.hypersteps, self.undecided = 0, 0, 0
        self.move = Move(space.raws, hyper_optimizer, self.progress, self._stride)
        if isinstance(self.move.optimizer, SignSteps) and horizon.needs_losses:
            self.move.optimizer.move_by_agreement([space.raws[name] for name in options])
        if isinstance(self.move.optimizer, SignSteps):
            specs = {name: space[name].spec for name in space}
            self.move.optimizer.move_by_size(
                shares=[space.raws[name] for name, spec in specs.items() if spec.is_shares],
                examples=[space.raws[name] for name, spec in specs.items() if spec.is_per_example],
            )
        self.trajectory = Trajectory()
        self.bounds, self.reach, self.signal = Bounds(), Reach(space), Signal()
        self.best_step = 0
        self.log: dict[str, float] = {}
        self.first_losses: tuple[float, float] | None = None
        self.learned = False
        self.due = False
        self.seconds: float | None = None
        self._pace: dict[str, float] = {}
        """Option -> how many times as far as usual it moves at this hyper-step."""
        self._result: HyperStepResult | None = None
        """Found before the present training step; None if there was no hyper-step, or it failed."""
        self._versions: dict[int, tuple[Tensor, int]] = {}
        """The gradients that it used, with their versions, by id of the weight."""
        self._standing = StandingWeights()
        self._said_incomplete = False
        self.schedule.begin(total_steps)
        self.trajectory.record(0, space)

    @property
    def reads_gradients(self) -> bool:
        """Whether the gradients of the coming optimiser step are read before it."""
        return self.due or self._looks

    @property
    def _looks(self) -> bool:
        """Whether the guard looks at the run before the coming optimiser step."""
        guard = self.guard
        if guard is None or not guard.watching:
            return False
        often = not guard.begun or guard.beginning.due or guard.trial_due or self.steps in LOOKS
        return often or self.due or self.horizon.due(self.steps + 1)

    def begin(self) -> None:
        """Plan the first hyper-step."""
        self._plan(hyper=False)

    def progress(self) -> float | None:
        """Return the share of the run that is over, in [0, 1]; None if its length is not known."""
        return None if self.total_steps is None else min(1.0, self.steps / self.total_steps)

    @property
    def cost(self) -> float | None:
        """The share of the training time that hyper-steps took; None if the schedule does not measure it."""
        return getattr(self.schedule, "spent", None)

    def before_step(self, optimizer: torch.optim.Optimizer, first: bool) -> None:
        """Compute the hypergradients of the coming optimiser step, if they are due.

        Args:
            optimizer: which steps now.
            first: whether no other optimiser of the same training step has moved yet.

        Raises:
            UnknownGradient: the first PATIENCE hyper-steps could not infer how the loop changes the gradient.
            UnreachedHyperparameter: a hyperparameter never reaches the loss or the optimiser.
        """
        self._standing.compare()
        if first and self.guard is not None and self._looks and self._went_back(self.guard):
            return
        if self.due and first:
            if self._result is not None and self._hyperstep.several:
                self._warn_incomplete()
            try:
                with signals_wait():
                    self._result = self._compute()
                    if self._result is not None and self.guard is not None:
                        self.guard.begin_step()
            except BaseException:
                self._hyperstep.watch()  # the loop may catch this and go on
                raise
            if self._hyperstep.several:  # the other optimisers may step later
                self._hyperstep.watch()
            self._versions = self._hyperstep.gradient_versions()
        elif self._result is not None and not first and not self._same_gradients(optimizer):
            self._result = None
            self._leave_out(
                UnknownGradient(
                    "all gradients must be final before the first optimiser of a training step moves, but "
                    "some changed after that; step the optimisers together, or tune one alone."
                )
            )

    def _went_back(self, guard: Guard) -> bool:
        """Look at the run; return whether it diverged and went back."""
        grads = self._hyperstep.gradients()
        if not grads:
            return False
        if not guard.begun:
            guard.begin(self._hyperstep.look(), grads)
            return False
        look = self._hyperstep.look_again
        lost = guard.lost(grads, partial(look, on_any=True)) or (
            self.steps in LOOKS and guard.diverged_early(look())
        )
        if lost and self._go_back(guard.restore, "it diverged"):
            return True
        if guard.trial_due:
            guard.end_trial(look())
        return self._go_back(partial(guard.begin_again, look), "its first steps changed the weights too much")

    def _diverged(self, result: HyperStepResult) -> bool:
        """Return whether a hyper-step shows that the run diverges or got worse, so that it went back."""
        guard, now, best = self.guard, result.loss_now, result.loss_at_best
        if guard is None or not guard.begun or now is None or best is None:
            return False
        if guard.diverged(now, result.valid_loss):
            return self._go_back(guard.restore, "it diverged")
        worse = guard.got_worse(result.valid_loss, best)
        return worse and self._go_back(partial(guard.restore, diverged=False), "its average got worse")

    def _weights_are_lost(self) -> bool:
        """Return whether a training gradient is not finite; otherwise a batch of T2 is to blame."""
        return not self._hyperstep.processes.parts.all_finite(self._hyperstep.gradients().values())

    def _go_back(self, restore: Callable[[], bool], reason: str) -> bool:
        """Let the guard go back; return whether it did."""
        with signals_wait():
            if not restore():
                return False
            self.horizon.forget()
            self.move.forget()
            self._result = None
            self._returns.append((self.steps, reason))
            self.trajectory.record(self.steps, self._space)
        return True

    def returns(self) -> list[str]:
        """Return what the guard did, and why, one sentence for each reason."""
        reasons = dict.fromkeys(reason for _, reason in self._returns)
        found = []
        for reason in reasons:
            steps = [str(step) for step, why in self._returns if why == reason]
            found.append(
                f"the run went back to earlier weights, because {reason}, at step{'s' * (len(steps) > 1)} "
                f"{', '.join(steps)}."
            )
        if self.guard is not None and self.guard.replaced:
            found.append("the last weights validated worse than the best average, which replaced them.")
        return found

    def _warn_incomplete(self) -> None:
        if not self._said_incomplete:
            self._said_incomplete = True
            warn(
                "all optimisers must step once in each training step, but one stepped again before the "
                "others did; only training steps of all of them count. Step all together, or tune one alone.",
            )

    def has_work_after_step(self) -> bool:
        """Return whether `after_step` will do more than count."""
        return self.due or self.horizon.due(self.steps + 1) or self.steps + 1 == self.total_steps

    def after_step(self) -> bool:
        """Count the optimiser step, apply its hyper-step if it has one, and plan the next.

        Returns:
            whether hyperparameters moved.
        """
        self.steps += 1
        if self.guard is not None:
            self.guard.beginning.count_step()
        hyper, busy = self.due, False
        result, self._result = self._result, None
        try:
            if self.horizon.due(self.steps):
                busy = self.horizon.follow(self._hyperstep.weights(), self.steps, self.progress())
            if result is not None:
                self._hyperstep.require_expected_step()
                self._apply(result)
                if self.hypersteps.bit_count() == 1:  # at 1, 2, 4, 8, ..., because it reads all weights
                    params = self._hyperstep.params().items()
                    self._standing.note({name: part(p) for name, p in params if p.grad is not None})
            if self.steps == self.total_steps:
                self._end()
        finally:
            self._plan(hyper, busy)
        return result is not None

    def _end(self) -> None:
        """Give the model the best average if the guard watches the run and its last weights are worse."""
        guard = self.guard
        if guard is not None and guard.watching and guard.begun:
            guard.end(self._hyperstep.losses_beside)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume."""
        counts = {name: getattr(self, name) for name in _COUNTS} | {"returns": list(self._returns)}
        parts = {name: saved.state_dict() for name, saved in self._parts().items()}
        return {"policies": self._policies(), "space": self._space.state_dict(), **counts, **parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`; raise `SpaceError` if it has other hyperparameters."""
        same_range = state["space"]["range"] == self._space.state_dict()["range"]
        self._space.load_state_dict(state["space"])
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._returns = [tuple(entry) for entry in state["returns"]]
        for name, saved in self._parts().items():
            saved.load_state_dict(state[name])
        if not same_range:  # the recorded coordinates are of another range
            self.trajectory = Trajectory()
            self.trajectory.record(self.steps, self._space)
        self._result = None
        self._standing.forget()
        self._plan(hyper=False)

    def require_fitting(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless `state` was saved by a tuner with the same policies.

        Args:
            state: what the user loads.
            own: the present `state_dict` of the tuner.
        """
        missing = set(own) - set(state or ())
        if "policies" not in missing and state["policies"] != own["policies"]:
            raise ValueError(
                f"the saved tuner was made with {state['policies']}, this one with {own['policies']}; "
                "make it with the same classes."
            )
        if missing:
            raise ValueError(
                f"state must be what state_dict() of a tuner gave, but has no {', '.join(sorted(missing))}."
            )

    def _policies(self) -> dict[str, str]:
        """Return policy -> its class, which a saved state must have too."""
        policies = {
            "schedule": self.schedule,
            "horizon": self.horizon,
            "hyper_optimizer": self.move.optimizer,
        }
        return {name: type(policy).__name__ for name, policy in policies.items()}

    def _parts(self) -> dict[str, Any]:
        return {
            "failures": self.failures, "bounds": self.bounds, "reach": self.reach,
            "signal": self.signal,
            "trajectory": self.trajectory, "move": self.move, "hyperstep": self._hyperstep,
            "schedule": self.schedule,
            **({} if self.guard is None else {"guard": self.guard}),
        }  # fmt: skip

    def _stride(self, name: str, raw: Tensor) -> float | Tensor:
        """Return the fraction of a step that this coordinate takes; less in a range wider than usual."""
        transform = self._space[name].transform
        if self.horizon.needs_losses and name in self.options:
            return self._pace.get(name, 1.0) * stride(self.options[name], transform, raw)
        usual = transform.stride(raw)
        is_wide = isinstance(usual, Tensor) or usual < 1
        slowly = is_wide and self.horizon.needs_losses and not self.learned
        return UNLEARNED * usual if slowly else usual

    def _compute(self) -> HyperStepResult | None:
        began = time.perf_counter()
        try:
            result = self._hyperstep()
        except UnknownGradient as error:
            self._leave_out(error)
            return None
        finally:
            self.seconds = (self.seconds or 0.0) + time.perf_counter() - began
        losses = [result.valid_loss, *([] if result.train_loss is None else [result.train_loss])]
        if self._diverged(result):
            return None
        if all(map(math.isfinite, losses)) and all_finite(result.hypergradients.values()):
            self.failures.good()
            self.reach.observe(result.hypergradients)
            return result
        self.failures.failed()
        if self.guard is not None and self._weights_are_lost():
            self._go_back(self.guard.restore, "its gradient was not finite")
        self.move.shrink(self.failures.shrink)
        return None

    def _leave_out(self, error: UnknownGradient) -> None:
        """Count a hyper-step that is left out; raise the error if the first PATIENCE are all left out."""
        self.undecided += 1
        if self.undecided >= PATIENCE and not self.hypersteps:
            raise error

    def _apply(self, result: HyperStepResult) -> None:
        self._note_learning(result)
        optimizer = self.move.optimizer
        if isinstance(optimizer, SignSteps) and self.horizon.needs_losses:
            optimizer.set_averaging(self.horizon.averaging)
        found = result.hypergradients
        if self.guard is not None:
            found, self._pace = self.guard.paced(found, self.steps, self._hyperstep.schedule_factor())
        limited = self._limited()
        before = {name: self._space.raws[name].detach().clone() for name in limited}
        self.trajectory.record_effects(self._space, found)
        self.move(found, self.failures.shrink * self.schedule.step_scale)
        if self.guard is not None:
            self.guard.limit()
        self._limit(before)
        if self.horizon.needs_losses:
            best = self.horizon.observe(
                result.train_loss, result.valid_loss, self.progress(), self._hyperstep.buffers()
            )
            if best:
                self.best_step = self.steps
                if self.guard is not None:
                    self.guard.note_best()
        if result.train_loss is not None:
            self.log["train_loss"] = result.train_loss
        self.hypersteps += 1
        self.bounds.observe(self._space)
        self.trajectory.record(self.steps, self._space)
        self.log["valid_loss"] = result.valid_loss
        means = {
            name: float(g.mean())
            for name, g in result.hypergradients.items()
            if not self._space[name].spec.is_shares  # theirs is 0 up to rounding; see `Trajectory.effects`
        }
        self.log |= {f"hypergradient/{name}": mean for name, mean in means.items()}
        self.signal.observe(means)

    def _note_learning(self, result: HyperStepResult) -> None:
        if result.train_loss is None or self.learned:
            return
        losses = result.train_loss, result.valid_loss
        self.first_losses = self.first_losses or losses
        pairs = zip(losses, self.first_losses, strict=True)
        self.learned = any(first - now > LEARNED * abs(first) for now, first in pairs)

    def _limited(self) -> set[str]:
        """Return the hyperparameters that must not rise freely at this hyper-step."""
        if not self.horizon.needs_losses:
            return set()
        decays = self._hyperstep.decays if self._hyperstep.shrinkage else []
        others = [name for name in self._space if not self._space[name].spec.is_shares]
        return {*decays, *([] if self.learned else set(others) - self.options.keys())}

    @torch.no_grad()
    def _limit(self, before: Tensors) -> None:
        """Keep regularisers at their start until the model has learned, and weight decay as ERASED says.

        What is above its limit already may stay where it was before the move, but weight decay only where it
        was at the start. Without `total_steps`, the values before the move take the place of the start.

        Args:
            before: the raw coordinates before the move, of the hyperparameters of `_limited`.
        """
        if not before:
            return
        start = self.trajectory.at(0.0)
        share = self._hyperstep.shrinkage * (self.total_steps or max(self.steps, UNKNOWN_STEPS))
        for name, earlier in before.items():
            raw, transform = self._space.raws[name], self._space[name].transform
            if not self.learned:
                raw.copy_(torch.minimum(raw, torch.maximum(earlier, start[name].to(raw))))
            if share and name in self._hyperstep.decays:
                most = torch.full_like(raw, ERASED / share).clamp(transform.low, transform.high)
                allowed = start[name].to(raw) if self.total_steps else earlier
                raw.copy_(torch.minimum(raw, torch.maximum(transform.raw(most).clamp(0, 1), allowed)))

    def _plan(self, hyper: bool, busy: bool = False) -> None:
        self.due = self.schedule.next_is_hyper(self.steps, hyper, busy)
        if self.due:
            self._hyperstep.watch()

    def _same_gradients(self, of: torch.optim.Optimizer) -> bool:
        """Return whether the gradients for this optimiser are those that the hyper-step used."""
        now = self._hyperstep.gradient_versions(of)
        used = {
            id(p): self._versions[id(p)]
            for group in of.param_groups
            for p in group["params"]
            if id(p) in self._versions
        }
        return now.keys() == used.keys() and all(
            grad is used[key][0] and version == used[key][1] for key, (grad, version) in now.items()
        )
