"""Tune hyperparameters inside `optimizer.step()`, while the training loop stays unchanged."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import nn

from midflight.errors import SpaceError, UnsupportedSetting, warn
from midflight.hypergrad import Estimator, estimator_for
from midflight.space import Space
from midflight.tuner import report
from midflight.tuner.binding import Bind, Binding
from midflight.tuner.controller import Controller
from midflight.tuner.data import batches_of, same_data
from midflight.tuner.failures import Failures
from midflight.tuner.finish import choose
from midflight.tuner.guard import Guard
from midflight.tuner.hooks import StepHooks
from midflight.tuner.horizon import Averaged, Horizon, horizon_for
from midflight.tuner.hyper_optimizer import MakeOptimizer, SignSteps
from midflight.tuner.hyperstep import HyperStep
from midflight.tuner.live import ORDER, Loss, require_loss, signals_wait
from midflight.tuner.optimizers import Optimizers, skips, unwrapped
from midflight.tuner.schedule import Every, FrontLoaded, Schedule, TimeBudget, schedule_for, whole
from midflight.tuner.trajectory import Trajectory

EXAMPLES = 128
"""The default number of examples of a T1 batch for the mixed partial. Fewer make it noisier."""
MOST_ENTRIES = 10_000
"""The most separate hyperparameters in a space, because each needs its own small operations."""
FEWEST_MOVES = 5
"""The tuner warns if the weight of an example moves fewer times in a run."""


class Tuner:
    """Moves the hyperparameters of `space` against the gradient of the validation loss, during training.

        tuner = mf.Tuner(model, optimizer, space, loss_fn, train_loader, valid_loader, total_steps=steps)
        ...                     # the training loop, unchanged
        tuner.finish()

    It hooks `optimizer.step`, so it sees the gradient that the optimiser really gets: accumulated, unscaled
    and clipped. The loop's own forward and backward passes see plain numbers. A hyper-step leaves weights,
    buffers, modes, gradients and random numbers unchanged.

    Args:
        model: the model being trained, compiled or not.
        optimizer: the torch optimiser that trains it, or the wrapper of Accelerate, Lightning or Fabric
            around it. A list if several train the model together; each then steps once in a training step. A
            tuner that is attached to it already is detached, with a warning.
        space: the hyperparameters to tune.
        loss_fn: (model, batch) -> training loss, a scalar, the mean over the batch. It must be what the loop
            minimises over an optimiser step, and read the hyperparameters where the loop does. The tuner
            calls it as well and restores modules and random generators, so it must change nothing else.
        train_loader: batches of T1, the training data. It may be the loop's own loader, which is not
            disturbed.
        valid_loader: batches of T2, the validation data.
        valid_loss_fn: (model, batch) -> validation loss, a scalar, on batches of either loader; `loss_fn` by
            default. It is called with the model, and other modules that it uses, in eval mode. It must read
            the weights that the optimiser moves, and change no state of its own either.
        bind: hyperparameters that are options of the optimiser: names that are both, or {hyperparameter:
            option}. None binds every name of the space that is an option; then the loss must not read it as
            well. During a step, an option is the tuned value times the factor that the loop's scheduler
            gives. A param_group whose option is 0, while another's is not, is not tuned.
        total_steps: optimiser steps of the whole run, over which hyper-steps anneal to zero. None: they
            shrink slowly and never end.
        schedule: when hyper-steps come: `FrontLoaded()` (the default: one per 20 optimiser steps, most of
            them early; fewer in a run of over 3,000 steps), `Every(n)` (the default for mixtures alone, with
            n = 25) or `TimeBudget(share)`. A whole number n is `Every(n)`.
        estimator: of the hypergradient, a name from `midflight.hypergrad.ESTIMATORS` or an `Estimator`.
        horizon: where the validation gradient is taken: "run" at averaged weights (`Averaged`), an
            approximation for the whole run; "step" at the weights right after the step (`NextStep`).
        hyper_optimizer: raw tensors -> torch optimiser that moves them.
        max_grad_norm: the norm to which the loop clips, `math.inf` if it does not. None finds it out, which
            takes a hyper-step or two.
        examples: how many examples of a T1 batch the mixed partial uses, the first along dimension 0. None
            uses whole batches, and so does a model that has a layer with `batch_first=False`, and a space
            with `ExampleWeights`.
        guard: whether a run that diverges goes on from its best average so far, with a lower learning rate
            and momentum if these are tuned. If an option such as `lr` is tuned, it takes two more forward
            passes on a T2 batch per hyper-step, and the last weights of a run of `total_steps` are replaced
            by the best average if they validate worse. `horizon="step"` has no guard.
        on_hyperstep: called with (optimiser steps so far, `log()`) after each hyper-step.

    Raises:
        BindingError: a bound name is no hyperparameter, or no tunable option of the optimiser.
        UnsupportedOptimizer: there is no update rule for the optimiser; or the model is sharded, and the
            optimiser is not elementwise.
        UnsupportedParameter: a weight is complex.
        UnusableLoader: a loader is empty or not iterable, or `train_loader` keeps an iterator or an open
            file.
        InvalidLoss: a loss reads an iterator. At a hyper-step: the loss is no scalar, or does not depend on
            the trained weights.
        UnsupportedSetting: the model is TorchScript. Or several processes train the model, and the schedule
            is a `TimeBudget`, or the model has a layer or a hook that is not supported. Or the model is
            sharded, but not by `fully_shard` over all processes, or the estimator needs whole weights.
        AnotherProcessFailed: at a hyper-step: the hyper-step failed in another process. A sharded model never
            raises this.
        TypeError, UnknownName, SpaceError, ValueError: an argument is not one of those allowed.
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
        hyper_optimizer: MakeOptimizer = SignSteps,
        max_grad_norm: float | None = None,
        examples: int | None = EXAMPLES,
        guard: bool = True,
        on_hyperstep: Callable[[int, dict[str, float]], Any] | None = None,
    ) -> None:
        _require_arguments(model, space, loss_fn, valid_loss_fn, train_loader, valid_loader)
        self._total = None if total_steps is None else whole("total_steps", total_steps)
        self.space, self.horizon = space, horizon_for(horizon)
        self.schedule = schedule_for(schedule, all(space[name].spec.is_shares for name in space))
        optimizers = unwrapped(optimizer)
        self._kinds = [type(o).__name__ for o in optimizers]
        self._binding = Binding(optimizers, space, bind)
        self._hyperstep = HyperStep(
            model, optimizers, space, self._binding, (loss_fn, valid_loss_fn or loss_fn),
            (train_loader, valid_loader), estimator_for(estimator), self.horizon,
            None if examples is None else whole("examples", examples), max_grad_norm,
        )  # fmt: skip
        if self._hyperstep.processes.count > 1 and isinstance(self.schedule, TimeBudget):
            raise UnsupportedSetting(
                "hyper-steps must come at the same steps in all processes, but a TimeBudget goes by the time "
                "of each; pass FrontLoaded() or Every(n)."
            )
        options = {name: self._binding.options[name] for name in self._binding.step_options}
        watch = None
        if guard and isinstance(self.horizon, Averaged):
            tensors = self._hyperstep.weights, self._hyperstep.buffers
            parts = self._hyperstep.processes.parts
            watch = Guard(space, self.horizon, *tensors, optimizers, options, parts)
        self._controller = Controller(
            space, self._hyperstep, self.horizon, self.schedule, Failures(), watch, options,
            hyper_optimizer, self._total,
        )  # fmt: skip
        self._controller.reach.options = self._binding.tunable
        self._on_hyperstep = on_hyperstep
        self._finished: dict[str, float] = {}
        space.requires_grad_(False)
        self._binding.attach(self.detach)
        calls = self._before_step, self._after_step, self._binding.restore
        self._hooks: StepHooks | None = StepHooks(optimizers, *calls)
        self._controller.begin()
        self._warn_if_seldom_drawn(train_loader)

    def __enter__(self) -> "Tuner":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        """Return what is tuned, how, and what it has cost so far, a line each."""
        return report.card(self.space, self._binding, self._controller, self._hyperstep, self._finished)

    def _repr_html_(self) -> str:
        """Return the text of `__repr__` as HTML, for a notebook."""
        from html import escape

        return f"<pre>{escape(repr(self))}</pre>"

    @property
    def steps(self) -> int:
        """Optimiser steps so far; one step of each of several optimisers counts as one."""
        return self._controller.steps

    @property
    def trajectory(self) -> Trajectory:
        """The hyperparameters after each hyper-step; see `midflight.Replay`."""
        return self._controller.trajectory

    @property
    def hyper_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser that moves the raw coordinates."""
        return self._controller.move.optimizer

    @property
    def mixed_partial(self) -> str | None:
        """The method that computes d/dlambda <w, g>; None before it is needed."""
        return self._hyperstep.mixed.method

    def log(self) -> dict[str, float]:
        """Return numbers for a logger: values of hyperparameters, losses and counts, name -> number."""
        return report.numbers(self.space, self._binding, self._controller, self._hyperstep)

    def report(self, third: Iterable[Any] | None = None) -> list[str]:
        """Return what a user should know about this run, one sentence each; it says most after `finish`.

        Args:
            third: at least two batches of data used neither to train nor to tune, of the same size as those
                of `valid_loader`. One pass over each shows whether T2 is overfitted.

        Raises:
            ValueError: one of the two loaders gives fewer than two batches.
        """
        found = report.sentences(self.space, self._controller, self._hyperstep, self._finished)
        return found if third is None else found + report.beside_third(self._hyperstep, third)

    def finish(self) -> dict[str, float]:
        """Stop tuning, and give the model the weights with the least validation loss.

        The candidates are the last weights and, with horizon="run", the average of recent weights and the
        best average so far. Each is evaluated in one pass through T2, or on 100 batches if the length of T2
        is not known. Warns if no hyper-step reached a hyperparameter. Calls `eval` of optimisers that have
        it, such as schedule-free ones.

        Returns:
            name ("last", "average" or "earlier") -> mean validation loss per example, sorted from the best.
        """
        self.detach()
        for sentence in self._controller.reach.report():
            warn(sentence)
        for optimizer in self._hyperstep.optimizers:
            if hasattr(optimizer, "eval"):  # a schedule-free optimiser keeps other weights for training
                optimizer.eval()
        self._finished = choose(self._hyperstep, self.horizon.candidates())
        return self._finished

    def detach(self) -> None:
        """Stop tuning and remove every hook; the space and the optimiser's options keep their values."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
            self._hyperstep.close()
            self._binding.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume, including the space's values and the place in the data.

        Each of several processes has a state of its own. That of a sharded model holds this process's parts.
        """
        own: dict[str, Any] = {"optimizers": self._kinds, "binding": self._binding.state_dict()}
        if (place := self._hyperstep.processes.place) is not None:
            own["part"] = place
        return own | self._controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`, before or after the optimiser's own.

        Raises:
            ValueError: `state` is not of a tuner, or of one with other classes of optimiser, schedule,
                horizon or hyper_optimizer. Or it does not hold this process's parts of sharded weights.
            SpaceError, BindingError: it has other hyperparameters, or bound others.
        """
        self._controller.require_fitting(state, self.state_dict())
        _require_same_part(state.get("part"), self._hyperstep.processes.place)
        _require_same_kinds(state["optimizers"], self._kinds)
        self._binding.load_state_dict(state["binding"])
        self._controller.load_state_dict(state)

    def _warn_if_seldom_drawn(self, train_loader: Iterable[Any]) -> None:
        """Warn if each training example is in the T1 batch of few hyper-steps, so that its weight stays."""
        batches = batches_of(train_loader)
        if not batches or self._total is None or not isinstance(self.schedule, Every | FrontLoaded):
            return
        moves = self.schedule.planned(self._total) * self._hyperstep.processes.count / batches
        if moves < FEWEST_MOVES and any(self.space[name].spec.is_per_example for name in self.space):
            warn(
                f"the weight of an example moves about {moves:.1f} times in this run, too rarely to find "
                f"wrong labels; pass a train_loader of larger batches, for at least {FEWEST_MOVES} moves."
            )

    def _before_step(self, optimizer: torch.optim.Optimizer, first: bool) -> None:
        self._binding.restore()  # an earlier step that failed may have left values behind
        if not (first and self._controller.reads_gradients and skips(optimizer)):
            self._controller.before_step(optimizer, first)
        self._binding.write(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, last: bool) -> None:
        self._binding.restore()
        if not last or skips(optimizer):
            return
        with signals_wait() if self._controller.has_work_after_step() else nullcontext():
            moved = self._controller.after_step()
        if moved and self._on_hyperstep is not None:
            self._on_hyperstep(self.steps, self.log())
        if self.steps - 1 == self._total:
            warn(
                f"the run is longer than total_steps={self._total} optimiser steps; hyperparameters no "
                "longer move; pass the true number.",
            )


def _require_same_kinds(saved: list[str], own: list[str]) -> None:
    if saved != own:
        raise ValueError(
            f"the saved tuner was made with {', '.join(saved)}, this one with {', '.join(own)}; make it with "
            "the same kind of optimiser."
        )


def _require_same_part(saved: list[int] | None, own: list[int] | None) -> None:
    if saved != own:
        names = ["whole weights" if p is None else f"part {p[0]} of {p[1]}" for p in (saved, own)]
        raise ValueError(
            f"the saved tuner had {names[0]}, this one has {names[1]}; save one state per process, and "
            "resume each in the process of the same rank, with the same number of processes."
        )


def _require_arguments(
    model: Any, space: Any, loss_fn: Any, valid_loss_fn: Any, train_loader: Any, valid_loader: Any
) -> None:
    """Raise an error if an argument is of the wrong kind."""
    for name, value, kind in (("model", model, nn.Module), ("space", space, Space)):
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} must be a {kind.__name__}, but got a {type(value).__name__}; the order is {ORDER}."
            )
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise UnsupportedSetting(
            "the model must be a plain module, but a part of it is TorchScript, which has no second "
            "derivatives here; build the tuner on the model that was scripted or traced."
        )
    if len(space) > MOST_ENTRIES:
        raise SpaceError(
            f"a space must have at most {MOST_ENTRIES} separate hyperparameters, but has {len(space)}; "
            "use one Float with shape=."
        )
    require_loss("loss_fn", loss_fn)
    if valid_loss_fn is not None:
        require_loss("valid_loss_fn", valid_loss_fn)
    if same_data(train_loader, valid_loader):
        warn(
            "train_loader and valid_loader read the same data, so hyperparameters are tuned on training data "
            "and nothing keeps the model from memorising it; hold out data for valid_loader.",
        )
