"""One hyper-step: from the live loop just before `optimizer.step` to the hypergradients.

    received gradient  ->  at  ->  v = dC2/dtheta there  ->  estimator(step, v)  ->  hypergradients

Data flows from left to right. Nothing here moves a weight or a hyperparameter.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from midflight._tensors import Tensors, detach
from midflight.errors import (
    UnknownGradient,
    UnsupportedOptimizer,
    UnsupportedParameter,
    UnsupportedSetting,
    warn,
)
from midflight.hypergrad import Estimator
from midflight.hypergrad.graph import graph_leaves
from midflight.hypergrad.mixed import rounding_of, value_grads
from midflight.hypergrad.one_step import OneStep, one_step
from midflight.hypergrad.problem import Dependence, Step, added
from midflight.space import Space
from midflight.tuner.binding import Binding
from midflight.tuner.data import EndlessBatches, examples_of, require_many_passes, require_no_iterators
from midflight.tuner.distributed import Processes
from midflight.tuner.gradient import Clipped, ReceivedGradient, calling_scaler, sampled, scaler_stage
from midflight.tuner.horizon import Horizon
from midflight.tuner.live import LiveModel, Loss, preserved, require_moved, weights_at
from midflight.tuner.mixed_partial import DIFFERENCE, MixedPartial
from midflight.tuner.optimizers import named_parameters, require_real
from midflight.tuner.randomness import Randomness, held, plain, restored
from midflight.tuner.running_statistics import (
    Layers,
    Passes,
    Statistics,
    Watched,
    moved_statistics,
)
from midflight.tuner.saved import Saved
from midflight.tuner.sharded import part, part_of_gradient, parts
from midflight.tuner.slope import warn_unless_slope
from midflight.tuner.step_options import LENGTHS, slopes_of_length
from midflight.updates import BlackBox, State, Updates, step_ahead
from midflight.updates.base import tuned_options

_RAW = "raw of "
JUDGED = 4
"""At so many hyper-steps each rule that is not certain is checked; after them at the 8th, 16th, ..."""
SAME_STEP, ROUNDING = 1e-3, 8.0
"""A step is as a rule says if it differs by less than SAME_STEP of its size, and ROUNDING units of the last
place of a weight."""


SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
"""Keys of an optimiser's state under which it keeps a mean or sum of squared gradients, entry by entry."""


@dataclass(frozen=True)
class HyperStepResult:
    """Hold what a hyper-step found.

    Attributes:
        hypergradients: name -> tensor shaped like the raw coordinate, of the hyperparameters that were
            reached.
        valid_loss: C2 where v was taken; NaN counts as a failed hyper-step.
        train_loss: C1 at the averaged weights; None if nobody asked, or if all of the space are weights.
        loss_now, loss_at_best: C2 at the weights and at the best average so far, on the batch of
            `valid_loss`; None unless `compares` is set and an option such as lr is tuned.
    """

    hypergradients: Tensors
    valid_loss: float
    train_loss: float | None = None
    loss_now: float | None = None
    loss_at_best: float | None = None


class HyperStep(Saved):
    """Compute hypergradients of a live loop.

    Args:
        model, optimizers, space: what is trained, by whom, and what is tuned.
        binding: which hyperparameters are options.
        losses: training and validation loss, (model, batch) -> scalar.
        loaders: of T1 and T2.
        estimator: of the hypergradient.
        horizon: where v is taken.
        examples: of a T1 batch for the mixed partial; None for all.
        max_grad_norm: see `ReceivedGradient`.
    """

    SAVED = ("t1", "t2", "randomness", "horizon", "received", "mixed", "_first_look")

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        space: Space,
        binding: Binding,
        losses: tuple[Loss, Loss],
        loaders: tuple[Iterable[Any], Iterable[Any]],
        estimator: Estimator,
        horizon: Horizon,
        examples: int | None,
        max_grad_norm: float | None,
    ) -> None:
        require_real(model, optimizers)
        require_many_passes(loaders[0], "train_loader")
        self._model, self._optimizers, self._space, self._binding = model, optimizers, space, binding
        self._require_smooth()
        self.estimator, self.horizon = estimator, horizon
        for name, function in zip(("loss_fn", "valid_loss_fn"), losses, strict=True):
            require_no_iterators(function, name)
        self.randomness = Randomness([*loaders, *losses, model])
        self.t1 = EndlessBatches(loaders[0], "train_loader", self.randomness)
        self.t2 = EndlessBatches(loaders[1], "valid_loader", self.randomness)
        own = {id(p) for p in model.parameters()}
        others = [p for _, p, *_ in named_parameters(model, optimizers) if id(p) not in own]
        self.live = LiveModel(model, self.randomness, others, held([*loaders, *losses, model], nn.Module))
        self.train_loss, self.valid_loss = losses
        self.processes = Processes(self.live.all, self._trained())
        self._require_parts_suffice()
        if any(space[name].spec.is_per_example for name in space):
            examples = None  # else the weights of the others could not move
        self.mixed = MixedPartial(
            self.live, self.randomness, space, self.train_loss, examples,
            DIFFERENCE if self.processes.sharded else estimator.mixed, self.processes,
        )  # fmt: skip
        several = self.processes.count > 1 or self.processes.sharded
        self.received = ReceivedGradient(max_grad_norm, several, self.processes.parts)
        self._loss_reads: bool | None = True if binding.unbound else None
        """Whether the loss reads the space; None where it need not, until the first hyper-step."""
        self._guessed = binding.guessed and bool(binding.options)
        """Whether a name may be an option by accident, until the first hyper-step."""
        self._said_standing = self._judged_reading = False
        self.read_in_validation: list[str] = []
        """Hyperparameters that the validation loss is a function of; empty before the first hyper-step."""
        self._looked_at: Any = None
        """The batch of the first look; None before it, and after a resume until it is needed."""
        self._first_look: tuple[dict[str, Any], Any] | None = None
        """Where that batch is in T2, and the random states there."""
        self.compares = False
        """Whether a result holds `loss_now` and `loss_at_best`."""
        self.shrinkage = 0.0
        """The share by which the last step shrinks weights per unit of tuned weight decay; the largest of
        all."""
        self._buffers = Watched(self.live.all)
        self._judged = 0
        """At how many hyper-steps rules were there that are not certain."""
        self._expected: dict[str, tuple[Tensor, Tensor]] = {}
        """Weights before the coming step, and after it by such a rule."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._looked_at = None

    @property
    def decays(self) -> list[str]:
        """Names of the hyperparameters that are weight decay."""
        return [name for name, option in self._binding.options.items() if option == "weight_decay"]

    def schedule_factor(self) -> float:
        """Return the factor of the loop's schedule on lr now, the largest of all groups, at most 1."""
        return self._binding.schedule_factor()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimisers that train the model."""
        return list(self._optimizers)

    @property
    def reads_loss(self) -> bool | None:
        """Whether the loss reads a hyperparameter; None if that is not known yet."""
        return self._loss_reads

    @property
    def several(self) -> bool:
        """Whether several optimisers train the model together."""
        return len(self._optimizers) > 1

    def params(self) -> Tensors:
        """Return the weights of the optimisers, name -> live leaf."""
        self.live.reshard()
        return {name: p for name, p, *_ in named_parameters(self._model, self._optimizers)}

    def weights(self) -> Tensors:
        """Return the weights of the optimisers, or this process's parts of them, name -> live tensor."""
        return parts(self.params())

    def _trained(self) -> Tensors:
        """Return the weights of the optimisers, and those of the model that require a gradient."""
        own = self.params()
        return {n: p for n, p in self._all_params().items() if n in own or p.requires_grad}

    def _all_params(self) -> Tensors:
        """Return the weights of the optimisers and of the model, name -> live leaf."""
        trained = self.params()  # first, because it makes a sharded model show its parts
        return {**dict(self._model.named_parameters()), **trained}

    def buffers(self) -> Tensors:
        """Return the model's buffers, name -> live tensor."""
        return dict(self._model.named_buffers())

    def about_validation(self) -> list[str]:
        """Return a sentence if the validation loss reads hyperparameters, once that is known."""
        if not self.read_in_validation:
            return []
        return [
            f"the validation loss itself reads {', '.join(self.read_in_validation)}, which is then tuned to "
            "make it small; pass a valid_loss_fn that does not."
        ]

    def gradients(self) -> Tensors:
        """Return the dense gradients of what `weights` returns, name -> tensor."""
        found = {name: part_of_gradient(p) for name, p in self.params().items()}
        return {name: g for name, g in found.items() if g is not None and not g.is_sparse}

    def gradient_versions(self, of: torch.optim.Optimizer | None = None) -> dict[int, tuple[Tensor, int]]:
        """Return id of a weight -> its gradient and version; {} unless several optimisers step in turn.

        Args:
            of: the optimiser whose weights these are; all by default.
        """
        if not self.several:
            return {}
        weights = named_parameters(self._model, self._optimizers if of is None else [of])
        return {id(p): (p.grad, part(p.grad)._version) for _, p, *_ in weights if p.grad is not None}

    def watch(self) -> None:
        """Note the gradient that `backward` leaves, because a hyper-step comes with the next step."""
        if self._loss_reads is not False:
            self._buffers.begin()
            self.live.watch()
            self.received.watch(self._model, self._all_params())

    def close(self) -> None:
        """Stop watching the gradient, and let the workers of the tuner's own loaders go."""
        self.received.rest()
        self.t1.close()
        self.t2.close()

    def __call__(self) -> HyperStepResult:
        """Return the hypergradients of the step about to be taken; leave no trace in the loop.

        Raises:
            UnknownGradient: it could not be told what happened to the gradient.
        """
        params = self.params()
        with self.processes.together(self._equal(params)):
            return self._take(params)

    def _equal(self, params: Tensors) -> list[Tensor]:
        """Return what must be equal in all processes: the raw coordinates, some entries of whole weights."""
        if self.processes.count == 1:
            return []
        whole = [] if self.processes.sharded else params.values()
        return [*self._space.raws.values(), *map(sampled, whole)]

    def _take(self, params: Tensors) -> HyperStepResult:
        grads = self._final_gradients(params)
        if not grads:
            raise UnknownGradient("some weight must have a gradient at a step, but .grad of all is None.")
        standing = self._standing(params)
        if self._loss_reads is not False:
            self._buffers.end()
            self.received.end()
        batch = None
        if self._guessed or self._loss_reads is None:
            batch, read = self._reads()
            self._binding.require_unread(read)
            self._guessed, self._loss_reads = False, self._loss_reads or bool(read)
        clipped = self.received.jacobian(grads, self._own_norm, standing) if self._loss_reads else None
        if not self._loss_reads:
            self.received.rest()  # its hooks slow down every backward pass
        live = self._all_params()
        with self.live.borrowed():
            try:
                self._space.requires_grad_(True)
                return self._result(params, grads, clipped, live, batch)
            finally:
                for raw in self._space.raws.values():
                    raw.grad = None
                self._space.requires_grad_(False)

    def _reads(self) -> tuple[Any, set[str]]:
        """Return a batch of T1, and the names of the hyperparameters that the training loss reads there."""
        names = {id(raw): name for name, raw in self._space.raws.items()}
        with self.live.borrowed():
            try:
                self._space.requires_grad_(True)
                batch = next(self.t1)
                states = self.randomness.snapshot()
                loss = self.live.train_loss(self.train_loss, self.mixed.try_subsample(batch))
                self.randomness.rewind(states)
                read = {names[id(leaf)] for leaf in graph_leaves(loss) if id(leaf) in names}
                anywhere = self.processes.sum_of(float(name in read) for name in self._space)
                return batch, {name for name, n in zip(self._space, anywhere, strict=True) if n}
            finally:
                self._space.requires_grad_(False)

    def _own_norm(self, names: frozenset[str]) -> float:
        """Return the norm of the training gradient of these weights, on a batch of T1."""
        at = {name: p for name, p in self._all_params().items() if name in names}
        with self.live.borrowed():
            loss = partial(self.live.train_loss, self.train_loss, next(self.t1))
            found = self.processes.mean_gradient(self.live.gradients(loss, at)[1], at)
        return float(self.processes.parts.norm(found)) if found else 0.0

    def _result(
        self, params: Tensors, grads: Tensors, clipped: Clipped | None, live: Tensors, batch: Any
    ) -> HyperStepResult:
        batch = next(self.t1) if batch is None else batch
        step = self._step(params, grads, clipped, live, batch)
        result = self._of_own_batches(step, params, grads, batch)
        found = self.processes.mean_where_present(result.hypergradients, self._space.raws)
        return replace(result, hypergradients=found)

    def _of_own_batches(self, step: Step, params: Tensors, grads: Tensors, batch: Any) -> HyperStepResult:
        """Return the hypergradients of this process's batches."""
        self.shrinkage = self._shrinkage_of(step)
        if not self.horizon.needs_losses:
            valid_loss, found = self._at_horizon(step, params, batch)
            return HyperStepResult(found, valid_loss)
        only_weights = all(self._space[name].spec.are_weights for name in self._space)
        train_loss = None if only_weights else self._loss_at_average(batch)
        options = self._binding.step_options
        others = [name for name in self._space if name not in options]
        valid_loss, found = math.nan, dict[str, Tensor]()
        if others:
            valid_loss, found = self._at_horizon(_only(step, others), params, batch)
            if not math.isfinite(valid_loss):
                return HyperStepResult({}, valid_loss, train_loss)
        if options:
            _, v, _ = self._valid_gradient(params, self.horizon.ahead(parts(params)), grads, {})
            found |= self._of_options(step, options, v)
        elif self.horizon.at_average:
            return HyperStepResult(found, valid_loss, train_loss)
        return self._beside(HyperStepResult(found, math.nan, train_loss), compare=bool(options))

    def _shrinkage_of(self, step: Step) -> float:
        """Return the share by which a step shrinks weights per unit of tuned weight decay, the largest."""
        decayed = [u for u in step.updates.values() if "weight_decay" in tuned_options(u.options)]
        shares = [
            (share, u.options["weight_decay"]) for u in decayed if (share := u.rule.shrinkage(u.options))
        ]
        value = max((float(step.values[name].detach().max()) for name in self.decays if shares), default=0.0)
        return max((share * float(x.detach().max()) / value for share, x in shares if value), default=0.0)

    def _beside(self, result: HyperStepResult, compare: bool) -> HyperStepResult:
        """Return the result with C2 at the average, and if asked at the weights and at the best average."""
        batch = next(self.t2)
        if compare and self.compares:
            states = self.randomness.snapshot()
            now = self._loss_at({}, batch)
            self.randomness.rewind(states)
            best = self._loss_at(self.horizon.candidates().get("earlier", {}), batch)
            self.randomness.rewind(states)
            result = replace(result, loss_now=now, loss_at_best=best)
        return replace(result, valid_loss=self._loss_at_average(batch))

    def _of_options(self, step: Step, options: list[str], v: Tensors) -> Tensors:
        """Return the hypergradients of options that say how a step is taken.

        Those of LENGTHS are taken over the recent steps, along the drift of the horizon. The others are taken
        over one step. Before the first average, all are.
        """
        drift = self.horizon.drift(step.params)
        lengths = [name for name in options if drift and self._binding.options[name] in LENGTHS]
        pairs = [
            (option, (v[name] * drift[name]).sum() * slope)
            for name, update in step.updates.items()
            if name in drift
            for option, slope in slopes_of_length(update.options)
        ]
        found = _only(step, lengths).chain(pairs) if lengths else {}
        if others := [name for name in options if name not in lengths]:
            found |= one_step(replace(_only(step, others), dependence=_independent), v)
        return found

    def look(self) -> float:
        """Return C2 at the weights, on the next batch of T2."""
        with self.live.borrowed(), self.processes.together():
            self._looked_at = next(self.t2)
            if self.t2.repeats:
                self._first_look = self.t2.state_dict(), plain(self.randomness.snapshot())
            return self._loss_at({}, self._looked_at)

    def look_again(self, on_any: bool = False) -> float | None:
        """Return C2 at the weights, on the batch and with the random draws of `look`.

        If T2 is an iterator, that batch is not known. The result is then of another one if `on_any`, or None.
        """
        if self._first_look is None and not on_any:
            return None
        with self.live.borrowed(), self.processes.together():
            if self._first_look is None:
                return self._loss_at({}, next(self.t2))
            place, then = self._first_look
            if self._looked_at is None:
                self._looked_at = self.t2.read_again(place)
            states = self.randomness.snapshot()
            self.randomness.rewind(restored(then))
            loss = self._loss_at({}, self._looked_at)
            self.randomness.rewind(states)
            return loss

    def losses_beside(self, tensors: Tensors, batches: int) -> tuple[float, float]:
        """Return C2 at the weights, and with these tensors in place, means over the next batches of T2."""
        found = []
        with self.live.borrowed(), self.processes.together():
            for _ in range(batches):
                batch, states = next(self.t2), self.randomness.snapshot()
                now = self._loss_at({}, batch)
                self.randomness.rewind(states)
                found.append((now, self._loss_at(tensors, batch)))
        at_weights, there = (sum(losses) / batches for losses in zip(*found, strict=True))
        return at_weights, there

    def _loss_at(self, tensors: Tensors, batch: Any) -> float:
        """Return C2 with these weights and buffers in place of the model's own."""
        with weights_at({**self.buffers(), **self.params()}, tensors):
            loss = self.live.number(partial(self.live.valid_loss, self.valid_loss, batch))
        return self.processes.mean_of(loss)

    def _at_horizon(self, step: Step, params: Tensors, batch: Any) -> tuple[float, Tensors]:
        """Return C2 where the horizon takes v, and the hypergradients; none if C2 or v is not finite."""
        at = self.horizon.valid_at(step.params, lambda: self.estimator.at(step))
        by_statistics = self._loss_reads and self.estimator.through_statistics
        layers = self._buffers.layers if by_statistics else {}
        valid_loss, v, of_statistics = self._valid_gradient(params, at, step.grads, layers)
        if not math.isfinite(valid_loss):
            return valid_loss, {}
        if not self.processes.parts.all_finite(v.values()):
            return math.nan, {}
        found = self.estimator(step, self.horizon.smoothed(v))
        if of_statistics:
            found = added(found, self._through_statistics(batch, layers, of_statistics))
        if by_statistics and (left_out := self._buffers.others()):
            self._warn_if_reached(left_out, batch)
        return valid_loss, found

    def _step(
        self, params: Tensors, grads: Tensors, clipped: Clipped | None, live: Tensors, batch: Any
    ) -> Step:
        values = {name: self._space[name].value for name in self._space}
        owners = {
            id(p): self._optimizers[o] for _, p, o, _ in named_parameters(self._model, self._optimizers)
        }
        leaves = {name: params[name] for name in grads}
        updates = self._binding.updates(leaves, values)
        state = {name: parts(owners[id(p)].state.get(p, {})) for name, p in leaves.items()}
        used = parts(leaves)
        self._judge_rules(used, grads, state, updates)

        def dependence() -> Dependence:
            if not self._loss_reads:
                return _independent()
            trained = {name: p for name, p in live.items() if p.requires_grad}
            few = self.mixed.try_subsample(batch)
            theirs, along = self.mixed(few, trained)
            if theirs:
                theirs = self.processes.mean_gradient(theirs, trained)

            def mixed_partial(w: Tensors) -> Tensors:  # the gradient of a frozen weight stays as it is
                seen = w if theirs else _moving(w, grads, state)
                return along({name: seen[name] for name in seen if name in trained})

            if self.received.carried or not theirs:  # the step's gradient is not of its own examples only
                return Dependence(mixed_partial)
            others = clipped.received(theirs) if clipped else theirs
            return Dependence(mixed_partial, others, self._share(few, batch))

        return Step(
            params=detach(used),
            grads=grads,
            state=state,
            updates=updates,
            hparams=self._space.raws,
            values=values,
            dependence=dependence,
            train_loss=self.mixed.train_loss(batch) if self.estimator.needs_train_loss else None,
            clipped=clipped,
            shards=self.processes.parts.count,
        )

    def _judge_rules(
        self, params: Tensors, grads: Tensors, state: Mapping[str, State], updates: Updates
    ) -> None:
        """Check the rules that are not certain, at the first hyper-steps and ever more rarely after them."""
        doubtful = [name for name, update in updates.items() if not update.rule.certain]
        if not doubtful:
            return
        self._judged += 1
        if self._judged > JUDGED and self._judged.bit_count() > 1:
            return
        for rule in {id(updates[n].rule): updates[n].rule for n in doubtful}.values():
            ours = [name for name in doubtful if updates[name].rule is rule]
            rule.require_usable([(params[n], grads[n], state[n], updates[n].options) for n in ours])
        self._require_smooth()
        only = {name: updates[name] for name in doubtful}
        after = step_ahead(detach(params), grads, state, only)
        self._expected = {name: (params[name].detach().clone(), after[name]) for name in doubtful}

    def require_expected_step(self) -> None:
        """Compare the step just taken with the rules that are not certain.

        Raises:
            UnsupportedOptimizer: the optimiser took another step than its rule says.
        """
        expected, self._expected = self._expected, {}
        params = self.weights() if expected else {}
        for name, (before, after) in expected.items():
            if name not in params or params[name].shape != before.shape or not before.numel():
                continue
            now, size = params[name].detach(), float((after - before).abs().max())
            rounding = ROUNDING * torch.finfo(now.dtype).eps * float(before.abs().max())
            if not float((now - after).abs().max()) <= SAME_STEP * size + rounding:
                raise UnsupportedOptimizer(
                    "an optimiser without an UpdateRule must take the same step on copies of weights, but "
                    f"{name} moved otherwise; keep its state in optimizer.state[weight], or add a rule to "
                    "midflight.updates.RULES."
                )

    def _share(self, few: Any, batch: Any) -> float:
        """Return which share of a step's examples the few are."""
        count, passes = examples_of(few), self.received.passes
        if count is None:  # they cannot be counted: a whole batch, as each pass of the step had
            return 1 / passes
        return min(1.0, count / (self.received.examples or (examples_of(batch) or count) * passes))

    def _valid_gradient(
        self, params: Tensors, at: Tensors, grads: Tensors, layers: Layers
    ) -> tuple[float, Tensors, Statistics]:
        """Return C2 at the weights `at`, and its gradients for the weights and the running statistics."""
        batch, passes = next(self.t2), Passes(layers)
        if not self._judged_reading:
            with weights_at(params, at):
                self.live.choose_mode(self.valid_loss, batch)
        targets = {name: params[name] for name in grads}
        first = not self._judged_reading
        raws = {_RAW + name: raw for name, raw in self._space.raws.items()} if first else {}
        flags = {name: p.requires_grad for name, p in targets.items()}
        try:
            for p in targets.values():  # one that was frozen in mid-run may still be moved by its optimiser
                p.requires_grad_(True)
            with weights_at(params, at), self.live.evaluating(), passes if layers else nullcontext():
                loss = partial(self.live.valid_loss, self.valid_loss, batch)
                value, found = self.live.gradients(loss, targets, lambda: passes.read | raws)
                statistics = self._buffers.taken(passes, found)
        finally:
            for name, flag in flags.items():
                targets[name].requires_grad_(flag)
        if not self._judged_reading:
            self.read_in_validation = [
                name for name in self._space if found.pop(_RAW + name, None) is not None
            ]
            require_moved(self.valid_loss, targets, found)
            for sentence in self.about_validation():
                warn(sentence)
            self._judged_reading = True
            self._check_slope(batch, params, at, float(value), {n: found[n] for n in targets if n in found})
        v = {name: found[name] if name in found else torch.zeros_like(part(p)) for name, p in targets.items()}
        mean = v if self.processes.sharded else self.processes.mean(v)
        return self.processes.mean_of(float(value)), mean, statistics

    def _check_slope(self, batch: Any, params: Tensors, at: Tensors, value: float, v: Tensors) -> None:
        """Warn if v is not the slope of the validation loss, which is `value` at the weights `at`."""
        loss, states = partial(self.live.valid_loss, self.valid_loss, batch), self.randomness.snapshot()

        def loss_at(moved: Tensors) -> float:
            self.randomness.rewind(states)
            with weights_at(params, at | moved):
                return mean(self.live.number(loss))

        # the gradient of sharded weights is that of the mean loss
        mean = self.processes.mean_of if self.processes.sharded else float
        rounding = rounding_of(lambda: self.live.number(loss), at)
        warn_unless_slope(loss_at, at, v, rounding * abs(mean(value)), self.processes.parts)
        self.randomness.rewind(states)

    def _through_statistics(self, batch: Any, layers: Layers, along: Statistics) -> Tensors:
        """Return the hypergradient through BatchNorm's running statistics, name -> d/draw."""
        passes = Passes(layers)
        with passes:
            self.live.train_loss(self.train_loss, self.mixed.subsample(batch))
        moved = moved_statistics(layers, passes, along, self.received.passes)
        self.live.gather()
        return {} if moved is None else value_grads(moved, self._space.raws)

    def _warn_if_reached(self, others: set[str], batch: Any) -> None:
        """Warn if hyperparameters reach the validation loss by buffers that are left out."""
        states, losses = self.randomness.snapshot(), []
        for low in (0.0, 0.1):
            raws = {name: 0.9 * raw.detach() + low for name, raw in self._space.raws.items()}
            values = {name: self._space[name].transform.value(raw) for name, raw in raws.items()}
            with preserved(self._model), self._space.seeing(values):
                with self._buffers.only(others):
                    self.live.train_loss(self.train_loss, self.mixed.subsample(batch))
                losses.append(self.live.valid_loss(self.valid_loss, batch).detach())
            self.randomness.rewind(states)
        if bool((losses[0] - losses[1]).abs() > 16 * torch.finfo(losses[0].dtype).eps * losses[0].abs()):
            warn(
                f"training moves {', '.join(sorted(others))}, and hyperparameters reach the validation "
                "loss that way as well; the hypergradient leaves this out.",
            )

    def _loss_at_average(self, batch: Any) -> float:
        try:
            return self._loss_at(self.horizon.average(), batch)
        except Exception as error:
            error.add_note("The tuner calls the validation loss on batches of train_loader as well.")
            raise

    def _final_gradients(self, params: Tensors) -> Tensors:
        """Return the gradients as the optimisers use them: without a fused one's loss scale."""
        found = {}
        scaler = calling_scaler() if self.several else None  # one alone is unscaled by now
        for name, p, o, _ in named_parameters(self._model, self._optimizers):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise UnsupportedParameter(
                    f"gradients must be dense, but that of {name} is sparse; "
                    "build its embedding with sparse=False."
                )
            grad = part_of_gradient(p)
            assert grad is not None
            scale = getattr(self._optimizers[o], "grad_scale", None)
            if scale is None and scaler is not None and scaler_stage(scaler, self._optimizers[o]) == "READY":
                scale = scaler.get_scale()  # it steps later and is unscaled then
            found[name] = grad.detach() if scale is None else grad.detach() / scale
        return found

    def _standing(self, params: Tensors) -> Tensors:
        """Return the gradients of the model's weights that no optimiser moves."""
        own = {id(p) for p in params.values()}
        found = {
            name: grad.detach()
            for name, p in self._model.named_parameters()
            if p.requires_grad and id(p) not in own
            if (grad := part_of_gradient(p)) is not None and not grad.is_sparse
        }
        if found and not self._said_standing:
            self._said_standing = True
            warn(
                f"{len(found)} weights of the model, such as {next(iter(found))}, are in no optimiser of the "
                "tuner and count as standing still; pass all optimisers as a list.",
            )
        return found

    def _require_parts_suffice(self) -> None:
        """Refuse sharded weights if the step or its derivative needs whole ones.

        Raises:
            UnsupportedOptimizer: an optimiser with a rule is not elementwise.
            UnsupportedSetting: the estimator, or its mixed partial, does not work on parts.
        """
        if not self.processes.sharded:
            return
        for optimizer, rule in zip(self._optimizers, self._binding.rules, strict=True):
            if not (rule.elementwise or isinstance(rule, BlackBox)):  # a BlackBox has tested this itself
                raise UnsupportedOptimizer(
                    "with fully_shard, each entry of a weight must be updated by itself, but "
                    f"{type(optimizer).__name__} reads whole weights; use an elementwise optimiser, or "
                    "DistributedDataParallel."
                )
        if not isinstance(self.estimator, OneStep) or self.estimator.mixed not in (None, DIFFERENCE):
            raise UnsupportedSetting(
                "with fully_shard, the estimator must work on parts of weights, as 'one_step', "
                "'one_step_cheap' and 'central_difference' do; use one of these."
            )

    def _require_smooth(self) -> None:
        for optimizer, rule in zip(self._optimizers, self._binding.rules, strict=True):
            if rule.why_not_differentiable and self._binding.unbound:
                raise UnsupportedOptimizer(
                    f"{type(optimizer).__name__} {rule.why_not_differentiable}, so that no hyperparameter of "
                    f"the loss has a derivative; tune its own options, {', '.join(sorted(rule.tunable))}, "
                    f"without {', '.join(self._binding.unbound)}."
                )


def _only(step: Step, names: Iterable[str]) -> Step:
    """Return the step as a function of these hyperparameters alone."""
    return replace(step, hparams={name: step.hparams[name] for name in names})


def _independent() -> Dependence:
    """Return the dependence of a training gradient that reads none of the hyperparameters."""
    return Dependence(lambda _: {})


def _moving(w: Tensors, grads: Tensors, state: Mapping[str, State]) -> Tensors:
    """Return w, with 0 for entries whose gradients were all 0 so far, such as those of tokens not seen yet.

    There dU/dg of Adam and its kin is about lr / eps. At the gradient of another batch, which sees the token,
    it is 0, because the first step of an entry has the length lr for any gradient.
    """
    moving = {}
    for name, x in w.items():
        squares = [state[name][key] for key in SECOND_MOMENTS if key in state.get(name, {})]
        moving[name] = torch.where(torch.logical_or(grads[name], squares[0]), x, 0) if squares else x
    return moving
