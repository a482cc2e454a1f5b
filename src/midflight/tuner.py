"""The tuner: `tuner.backward(loss)` instead of `loss.backward()`, and nothing else changes.

Everything a hyper-step needs happens inside `backward`, before the optimiser changes the weights in
place: the training gradient with its graph, the weights after the step, the validation pass there,
the mixed partial. The hyperparameters move in a post-hook of `optimizer.step()`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from midflight.batches import EndlessBatches
from midflight.binding import Bind, Binding
from midflight.capture import (
    evaluating,
    trained_parameters,
    weights_at,
)
from midflight.errors import UnsupportedParameter
from midflight.foresight import Foresight
from midflight.guards import Bounds, Failures, Snapshots, overfitted
from midflight.hypergrad import Estimator, estimator_for
from midflight.hypergrad.one_step import one_step
from midflight.hypersteps import SignSteps, annealing
from midflight.memory import keep_freed_memory
from midflight.pacing import pace_for
from midflight.problem import Step, gradient
from midflight.space import Space
from midflight.training_gradient import TrainingGradient
from midflight.trajectory import Trajectory
from midflight.trees import Tensors, all_finite, detach


class Tuner:
    """Moves the hyperparameters of `space` along the gradient of the validation loss, during training.

    Args:
        model: the model being trained; used for its eval mode and the names of its weights.
        optimizer: the torch optimiser that trains it.
        space: what is tuned.
        validate: (model, batch) -> validation loss, a scalar; called in eval mode.
        valid_loader: batches of validation data (T2), iterated again and again.
        train_loader: batches of the training data (T1), for `validate` as well, iterated like the
            others. With it the tuner sees whether the model is memorising and judges each step for
            the run instead of for the moment; see `midflight.foresight`. Leave it out for the plain
            one-step hypergradient, which over-regularises where data are many and training short.
        bind: hyperparameters that are options of the optimiser: names that are both, or
            {hyperparameter: option}. The tuner writes a number into every param_group, and entry i
            of a hyperparameter of shape (number of groups,) into group i; see `param_groups`.
        every: a hyper-step at each `every`-th call of `backward`. Left out, there is one for twenty
            calls on the whole, most of them early; or at each twentieth without `total_steps`.
        budget: instead of `every`: the share of the training time that tuning may add, such as
            0.05. The tuner measures what it costs and spaces its hyper-steps to keep within it, so
            two runs are no longer equal bit for bit.
        estimator: of the hypergradient; a name from `midflight.ESTIMATORS` or a function. Left out,
            "one_step"; with `train_loader`, which moves the place of judgement anyway, "one_step_cheap".
        total_steps: calls of `backward` in the whole run, over which the steps anneal to zero;
            without it they shrink slowly and never end.
        hyper_optimizer: raw tensors -> torch optimiser that moves them; `SignSteps` by default.
        snapshots: keep a copy of model, optimiser and hyperparameters, renewed at every so many good
            hyper-steps, and go back to it after three failed ones in a row. None keeps no copy.
        compile: have torch.compile make one pass over the weights of what a hyper-step does with them. Takes
            half a minute at first and a C++ compiler; for Adam and AdamW, others stay as they are.

    On a CPU glibc is told to keep memory that is freed, up to 62 MB; see `midflight.memory`.

    With gradient accumulation a hyper-step comes only at the last micro-batch of an optimiser step, and the
    training side of the hypergradient sees that one.

    Raises:
        BindingError: a bound name is no hyperparameter, or no tunable option of the optimiser,
            or its param_groups differ in that option.
        UnsupportedOptimizer: there is no update rule for the optimiser.
        UnsupportedParameter: a weight is complex.
        UnknownName: there is no such estimator.
        NoCompiler: torch.compile does not work here.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        space: Space,
        *,
        validate: Callable[[nn.Module, Any], Tensor],
        valid_loader: Iterable[Any],
        train_loader: Iterable[Any] | None = None,
        bind: Bind = (),
        every: int | None = None,
        budget: float | None = None,
        estimator: str | Estimator | None = None,
        total_steps: int | None = None,
        hyper_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = SignSteps,
        snapshots: int | None = None,
        compile: bool = False,
    ) -> None:
        if every is not None and budget is not None:
            raise ValueError(f"one of every and budget can be given, but got {every} and {budget}.")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps >= 1 must hold, but total_steps={total_steps}.")
        self.space = space
        self.pace = pace_for(every, budget, total_steps)
        """When hyper-steps come; with a budget, `pace.spent` is the share used so far."""
        self.hyper_optimizer = hyper_optimizer(list(space.raws.values()))
        self._model = model
        self._optimizer = optimizer
        self._params = trained_parameters(model, optimizer)
        self._validate = validate
        self._batches = EndlessBatches(valid_loader, "valid_loader")
        self._train_batches = None if train_loader is None else EndlessBatches(train_loader, "train_loader")
        self._binding = Binding(optimizer, space, bind, compile)
        self._estimate = estimator_for(
            estimator or ("one_step" if train_loader is None else "one_step_cheap")
        )
        self.foresight = None if train_loader is None else Foresight()
        """Where validation is judged; None without `train_loader`."""
        self._total_steps = total_steps
        self._calls = 0
        self._steps = 0
        self._calls_in_step, self._calls_per_step, self._busy = 0, 1, False
        self.failures = Failures(None if snapshots is None else Snapshots(model, optimizer, space, snapshots))
        """Hyper-steps that were left out because a loss or a hypergradient was not finite."""
        factor = annealing(self._progress)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.hyper_optimizer, lambda n: factor(n) * self.failures.shrink * self.pace.stride
        )
        self._bounds = Bounds()
        self.trajectory = Trajectory()
        """The values after each hyper-step; see `midflight.Replay`."""
        self.trajectory.record(0, space)
        self._training_gradient = TrainingGradient(model, self._params, space, self._estimate)
        self._hypergradients: Tensors = {}
        keep_freed_memory(self._params.values())
        self._binding.write()
        self._plan_next(hyper=False)
        self._hook = optimizer.register_step_post_hook(lambda *_: self._after_step())

    @property
    def mixed_partial(self) -> str | None:
        """How d/dlambda <w, g> is found; chosen at the first hyper-step with a function for the loss."""
        return self._training_gradient.mixed_partial

    def backward(
        self, loss: Tensor | Callable[[], Tensor], probe: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """`loss.backward()`; at a hyper-step also the hypergradients.

        Args:
            loss: scalar training loss, computed from the model's current weights; or a function
                without arguments that computes it, which may be called more than once at a
                hyper-step (same weights or others, same random numbers). A function unlocks the
                estimators that evaluate the loss again, and lets hyperparameters that are linear
                in the loss be tuned without a double backward.
            probe: function without arguments that computes the same loss on fewer examples, such as the
                first 8 of the batch; called at hyper-steps only, the same each time. How the training
                gradient depends on the hyperparameters then comes from these examples, which is
                cheaper, unbiased and noisier.

        Returns:
            the loss, without graph.

        Raises:
            UnreachedHyperparameter: a hyperparameter reaches neither the training gradient nor
                the optimiser.
            NotTwiceDifferentiable: the loss holds an operation that is differentiable once only.
            NeedsClosure: the estimator evaluates the loss again, but got a tensor.
            BindingError: somebody else changed a bound option of the optimiser.
            UnsupportedParameter: a weight has a sparse gradient.
        """
        self._calls += 1
        self._calls_in_step += 1
        hyper = self._hyper
        if not hyper:
            value = loss() if callable(loss) else loss
            value.backward()  # type: ignore[no-untyped-call]
        else:
            self._binding.verify()
            value, step = self._step(loss, probe)
            self._hypergradients = {}
            if self._look_ahead():
                self._hypergradients = self._estimate(step)
                if self.foresight is not None and self._binding.steering:
                    self._hypergradients |= self._of_steering(step)
            self._guard()
        self._plan_next(hyper)
        return value.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, the space's values and the place in the validation data included."""
        return {
            "calls": self._calls,
            "steps": self._steps,
            "calls_per_step": self._calls_per_step,
            "pace": self.pace.state_dict(),
            "failures": self.failures.state_dict(),
            "bounds": self._bounds.state_dict(),
            "trajectory": self.trajectory.state_dict(),
            "space": self.space.state_dict(),
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "batches": self._batches.state_dict(),
            "train_batches": self._train_batches and self._train_batches.state_dict(),
            "foresight": self.foresight and self.foresight.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`, taken between a step and the next forward pass.

        Raises:
            ValueError: one of the two tuners has a train_loader, the other not.
        """
        if (state["foresight"] is None) != (self.foresight is None):
            raise ValueError(
                "train_loader must be given when saving and when loading, or at neither, but only the "
                f"{'loading' if self.foresight else 'saved'} tuner has one."
            )
        self._calls, self._steps = state["calls"], state["steps"]
        self._calls_in_step, self._calls_per_step = 0, state["calls_per_step"]
        self.failures.load_state_dict(state["failures"])
        self._bounds.load_state_dict(state["bounds"])
        self.trajectory.load_state_dict(state["trajectory"])
        self.space.load_state_dict(state["space"])
        self.hyper_optimizer.load_state_dict(state["hyper_optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._batches.load_state_dict(state["batches"])
        if self._train_batches is not None and self.foresight is not None:
            self._train_batches.load_state_dict(state["train_batches"])
            self.foresight.load_state_dict(state["foresight"])
        self._hypergradients = {}
        self._binding.write()
        self.pace.load_state_dict(state["pace"])
        self._plan_next(hyper=False)

    def report(self, third: Iterable[Any] | None = None) -> list[str]:
        """What a user should know about this run, one sentence each; empty if there is nothing.

        Failed hyper-steps, hyperparameters pinned at a bound, and with a third split an overfitted T2.

        Args:
            third: batches of data that neither trained nor tuned, at least two, in the size of those of
                `valid_loader`; both are gone through once.

        Raises:
            ValueError: one of the two loaders gives fewer than two batches.
        """
        found = self.failures.report() + self._bounds.report(self.space)
        if third is not None:
            with evaluating(self._model), torch.no_grad():
                found += overfitted(partial(self._validate, self._model), self._batches.loader, third)
        return found

    def finish(self) -> dict[str, float]:
        """End the run: stop tuning, and give the model the best of the weights that the run has to offer.

        These are the last ones, with foresight also the average of the recent ones and the average where
        the validation loss was least on the way. One pass through T2 decides between them.

        Returns:
            the name of each ("last", "average", "earlier") -> its validation loss, a mean over the batches
            of `valid_loader`, the best first.
        """
        self.detach()
        candidates: dict[str, Tensors] = {"last": {}}
        if self.foresight is not None and self.foresight.best:
            candidates |= {"average": self.foresight.average(), "earlier": self.foresight.best}
        tensors = {**dict(self._model.named_buffers()), **self._params}
        found: dict[str, list[float]] = {name: [] for name in candidates}
        with evaluating(self._model), torch.no_grad():
            for batch in self._batches.loader:
                for name, at in candidates.items():
                    with weights_at({n: tensors[n] for n in at}, at):
                        found[name].append(float(self._validate(self._model, batch)))
            losses = {name: fmean(of_batches) for name, of_batches in found.items()}
            losses = dict(sorted(losses.items(), key=lambda item: (math.isnan(item[1]), item[1])))
            for n, value in candidates[next(iter(losses))].items():
                tensors[n].copy_(value)
        return losses

    def detach(self) -> None:
        """Stop tuning: unhook from the optimiser; the space keeps its values."""
        self._hook.remove()
        self.space.requires_grad_(False)

    def _step(
        self, loss: Tensor | Callable[[], Tensor], probe: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Step]:
        """Fill `.grad` as `loss.backward()` would, and describe the coming optimiser step."""
        value, dependence = self._training_gradient.take(loss, probe)
        used = {name: p for name, p in self._params.items() if p.grad is not None}
        for name, p in used.items():
            if p.grad is not None and p.grad.is_sparse:
                raise UnsupportedParameter(
                    f"gradients must be dense, but that of {name} is sparse; "
                    "build its embedding with sparse=False."
                )
        values = {name: self.space[name].value for name in self.space}
        return value, Step(
            params=detach(used),
            grads={name: p.grad for name, p in used.items() if p.grad is not None},
            grads_with_graph={name: g for name, g in dependence.grads.items() if name in used},
            state={name: self._optimizer.state.get(p, {}) for name, p in used.items()},
            updates=self._binding.updates(used, values),
            hparams=self.space.raws,
            values=values,
            valid_grad=self._valid_grad,
            train_loss=dependence.train_loss,
            factors=dependence.factors,
        )

    def _of_steering(self, step: Step) -> Tensors:
        """Learning rates and the like, judged at the weights after the step.

        Judged at an average they have no cost: it smooths what a long step stirs up.
        """
        values = {name: self.space[name].value for name in self.space}
        updates = self._binding.updates({name: self._params[name] for name in step.params}, values)
        hparams = {name: step.hparams[name] for name in self._binding.steering}
        return one_step(
            replace(
                step, hparams=hparams, values=values, updates=updates, grads_with_graph={}, factors=(),
                train_loss=None, valid_grad=self._gradient_at,
            )
        )  # fmt: skip

    @torch.no_grad()
    def _look_ahead(self) -> bool:
        """Let foresight follow; False if the losses at the average are not finite."""
        if self.foresight is None or self._train_batches is None:
            return True
        self.foresight.follow(self._params, self._steps, self._progress())
        with evaluating(self._model), weights_at(self._params, self.foresight.average()):
            c1, c2 = (
                float(self._validate(self._model, next(b))) for b in (self._train_batches, self._batches)
            )
        if not math.isfinite(c1 + c2):
            return False
        self.foresight.observe(c1, c2, self._progress(), dict(self._model.named_buffers()))
        return True

    def _valid_grad(self, where: Callable[[], Tensors]) -> Tensors:
        if self.foresight is None:
            return self._gradient_at(where)
        return self.foresight.steadied(self._gradient_at(partial(self.foresight.judged, where)))

    def _gradient_at(self, where: Callable[[], Tensors]) -> Tensors:
        at = where()
        params = {name: self._params[name] for name in at}
        with evaluating(self._model), weights_at(params, at):
            return gradient(self._validate(self._model, next(self._batches)), params)

    def _guard(self) -> None:
        """Leave out a hyper-step that is not finite; go back to the last good snapshot if failures go on."""
        if self._hypergradients and all_finite(self._hypergradients.values()):
            self.failures.good()
            return
        self._hypergradients = {}
        if self.foresight is not None:
            self.foresight.forget_v()
        for group in self.hyper_optimizer.param_groups:
            group["lr"] /= 2  # as the schedule will have it from the next move on
        if self.failures.failed():
            self._binding.write()
            if self.foresight is not None:
                self.foresight.forget()

    def _after_step(self) -> None:
        """The optimiser has taken its step."""
        self._steps += 1
        self._calls_per_step, self._calls_in_step = max(1, self._calls_in_step), 0
        self._busy = self.foresight is not None and self.foresight.follow(
            self._params, self._steps, self._progress()
        )
        if self._hypergradients:
            self._move()
        self._arm()

    def _move(self) -> None:
        if self.foresight is not None and isinstance(self.hyper_optimizer, SignSteps):
            self.hyper_optimizer.foresee(self.foresight.calm)
        for name, hypergradient in self._hypergradients.items():
            self.space[name].raw.grad = hypergradient
        self.hyper_optimizer.step()
        self.hyper_optimizer.zero_grad()
        self._schedule.step()
        self.space.clamp_()
        self._hypergradients = {}
        self._binding.write()
        self._bounds.observe(self.space)
        self.trajectory.record(self._calls, self.space)

    def _plan_next(self, hyper: bool) -> None:
        self._due = self.pace.next_is_hyper(self._calls, hyper, self._busy)
        self._arm()

    def _arm(self) -> None:
        """Only the forward pass before a hyper-step pays for the graph to the hyperparameters."""
        self._hyper = self._due and self._calls_in_step + 1 == self._calls_per_step
        self.space.requires_grad_(self._hyper)

    def _progress(self) -> float | None:
        """The share of the run that is over; None if its length is not known."""
        return None if self._total_steps is None else min(1.0, self._calls / self._total_steps)
