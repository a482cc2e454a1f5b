"""Infer what a loop does to the gradient between `backward` and `step`, and the Jacobian of that.

Loops scale, clip and average gradients there. At a hyper-step, r is the gradient as `backward` left it in
`.grad`, and g the one that the optimiser gets. The two are compared in a few entries of each weight and in
norm:

    observation                 meaning                 J
    g = r                       nothing happened        1
    g = a r, a stays            a constant factor       a, or 1 if a = 1 / (number of passes accumulated)
                                                        or if the loop scales its loss by 1/a
    g = a r, |g| stays          clipped by norm         (c / |r|) (1 - u u^T),  u = r / |r|
    |g| cut off at a number     clipped by value        1 where |g| is below it, else 0

Here c is the norm to which the loop clips. First, r is divided by the loss scale if a `GradScaler` applied
one. `UnknownGradient` is raised if no row fits or if weights change between `backward` and `step`. It is also
raised if gradients did not come from `backward`, unless `max_grad_norm` shows that they were not clipped.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from midflight._tensors import Tensors
from midflight.errors import UnknownGradient, UnsupportedSetting, warn
from midflight.tuner.data import examples_of, tensors_of
from midflight.tuner.sharded import WHOLE, Parts, is_sharded, part, part_of_gradient

EPSILON = 1e-6
"""torch clips by c / (|r| + EPSILON)."""
SAME, SAME_NORM = 1e-4, 1e-3
"""Relative differences up to which two factors, and two norms, count as equal."""
SAMPLED = 16
"""How many entries of a weight are compared, besides its largest."""
FAR = 16
"""Gradients whose norms differ by more than this factor are not of the same loss."""
LOOKS = 8
"""How often the norm of the gradient is compared with that of `loss_fn`, if they differ by less."""

OwnNorm = Callable[[frozenset[str]], float]
"""Names of weights -> the norm of the gradient of `loss_fn` at them."""


@dataclass(frozen=True)
class Clipped:
    """The Jacobian J of clipping and scaling, as a linear map.

    Attributes:
        norms: (u, a, b) for each group of weights that was clipped together: J = a (1 - b u u^T) there, where
            b is about 1 - EPSILON / |r|.
        limit: the number at which entries were cut off; None if none were.
        grads: the gradients that the optimiser gets, by weight.
        factors: constant factors, by weight.
        parts: sums over the processes, if these tensors are parts of sharded ones.
    """

    norms: list[tuple[Tensors, float, float]] = field(default_factory=list)
    limit: float | None = None
    grads: Tensors = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    parts: Parts = WHOLE

    def received(self, grads: Tensors) -> Tensors:
        """Return another gradient after the same clipping and scaling, name -> tensor."""
        factors = {**self.factors, **{name: factor for unit, factor, _ in self.norms for name in unit}}
        found = {name: factors.get(name, 1.0) * g for name, g in grads.items()}
        if self.limit is None:
            return found
        return {name: g.clamp(-self.limit, self.limit) for name, g in found.items()}

    def __call__(self, w: Tensors) -> Tensors:
        """Return J^T w, for the weights of w and for those clipped together with them."""
        found = {name: self.factors[name] * t if name in self.factors else t for name, t in w.items()}
        if self.limit is not None:
            for name in w:
                found[name] = torch.where(self.grads[name].abs() < self.limit, w[name], 0)
        for unit, factor, share in self.norms:
            along = self.parts.sum(sum(float((w[name] * u).sum()) for name, u in unit.items() if name in w))
            for name, u in unit.items():
                found[name] = factor * (w.get(name, 0) - share * along * u)
        return found


class _ExampleCounter:
    """A forward hook that counts the examples a model trains on; no closure, so that it can be pickled."""

    def __init__(self) -> None:
        self.count, self.stopped = 0, False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and not self.stopped:
            self.count += examples_of((args, kwargs)) or 0


class ReceivedGradient:
    """Records what `backward` leaves before a hyper-step, and infers what happened to it before `step`.

    Args:
        max_grad_norm: the norm to which the loop clips, or infinity if it does not. None finds it out from
            two hyper-steps.
        reduced: whether the mean over several processes is taken at the end of `backward`.
        parts: sums over the processes, if the weights are sharded.
    """

    def __init__(
        self, max_grad_norm: float | None = None, reduced: bool = False, parts: Parts = WHOLE
    ) -> None:
        if max_grad_norm is not None and not (max_grad_norm > 0 and max_grad_norm is not True):
            raise ValueError(f"max_grad_norm must be a positive number, but max_grad_norm={max_grad_norm}.")
        self._max_norm = max_grad_norm
        self._reduced, self._parts = reduced, parts
        self._waiting: Tensors = {}
        """Weights whose gradient is recorded at the end of the present pass."""
        self.carried = False
        """Whether `.grad` already held a nonzero gradient when `backward` first added to it."""
        self.examples = 0
        """How many examples the model saw for the last gradient; 0 if that is not known."""
        self.passes = 1
        """How often `backward` added to the last gradient."""
        self._hooks: list[RemovableHandle] = []
        self._counter = _ExampleCounter()
        self._params: Tensors = {}
        self._watched: list[str] = []
        """Names of the weights that were not frozen when the recording began."""

        # recorded by the hooks, by weight
        self._fingerprints: Tensors = {}
        """The gradient after the last pass, by `_fingerprint`."""
        self._passes: dict[str, int] = {}
        self._before: Tensors = {}
        """Entries that `.grad` held before the first pass."""
        self._weights: dict[str, tuple[Tensor, int]] = {}
        """The weight, and its version at the last pass."""
        self._entries: Tensors = {}
        """Entries of the weight at the last pass; a write by `.data` does not change the version."""
        self._changed: Tensors = {}
        """Whether the gradient was changed between two passes."""
        self._calls: dict[str, int] = {}
        """Number of the call of `backward` that made the last pass."""
        self._call = -1
        """Number of the last call of `backward`, if weights are sharded; -1 before the first."""

        # learned over several hyper-steps, by group of weights
        self._divides = False
        """Whether the loop sums gradients over several passes and then divides them by their number."""
        self._norms: dict[frozenset[str], float] = {}
        """The norm to which the group is clipped."""
        self._factors: dict[frozenset[str], list[tuple[float, float]]] = {}
        """(factor, norm afterwards) at each hyper-step since the last contradiction."""
        self._excess: dict[frozenset[str], list[float]] = {}
        """Logarithms of |gradient of `backward`| / |gradient of `loss_fn`|, where it was computed."""

    def watch(self, model: nn.Module, params: Mapping[str, Tensor]) -> None:
        """Start to record what `backward` leaves in `.grad`, and how many examples the model sees."""
        self.rest()
        self._counter = _ExampleCounter()
        self._params = dict(params)
        self._watched = [name for name, p in params.items() if p.requires_grad]
        if getattr(model, "_compiled_call_impl", None) is None:  # a hook would recompile it
            self._hooks.append(model.register_forward_pre_hook(self._counter, with_kwargs=True))
            if any(map(is_sharded, params.values())):
                self._hooks.append(model.register_forward_hook(self._await_backward))
        for name in self._watched:
            p = params[name]
            theirs = list((p._post_accumulate_grad_hooks or {}).items())
            # FSDP calls no hook of a sharded weight; autograd does, if the loss reads the weight itself
            begins = self._begin_pass if is_sharded(p) else self._before_pass(name, p)
            self._hooks.append(p.register_hook(begins))  # type: ignore[no-untyped-call]
            self._hooks.append(p.register_post_accumulate_grad_hook(self._after_pass(name)))  # type: ignore[no-untyped-call]
            if theirs and self._reduced:
                raise UnsupportedSetting(
                    "with several processes, no hook may change the gradient of a weight during backward, "
                    f"but {name} has a post_accumulate_grad_hook; clip after backward instead."
                )
            for key, hook in theirs:  # the user's hooks, such as clipping, must run after ours
                del p._post_accumulate_grad_hooks[key]
                p._post_accumulate_grad_hooks[key] = hook

    def end(self) -> None:
        """Stop counting examples, because the loop's passes are over."""
        self._counter.stopped = True

    def rest(self) -> None:
        """Stop recording, and drop what was recorded."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._fingerprints, self._passes, self._before = [], {}, {}, {}
        self._weights, self._entries, self._changed, self._waiting, self._calls = {}, {}, {}, {}, {}
        self._call = -1

    def _await_backward(self, model: nn.Module, args: Any, output: Any) -> None:
        """Let `_begin_pass` be called when a backward pass reaches the output of the model."""
        if not self._counter.stopped:
            for t in tensors_of(output):
                if t.requires_grad:
                    t.register_hook(self._begin_pass)  # type: ignore[no-untyped-call]

    def _begin_pass(self, grad: Tensor) -> None:
        """Note the gradients of sharded weights, and count the pass, before the pass adds to them.

        FSDP writes `.grad` at the end of a pass. With `set_requires_gradient_sync(False)`, it waits for a
        later pass, and `.grad` is None until then.
        """
        call = torch._C._current_graph_task_id()
        if call == self._call or not self._hooks:
            return
        self._call = call
        for name in self._watched:
            p = self._params[name]
            own = part_of_gradient(p)
            if own is None:
                self._before.pop(name, None)
            elif name not in self._fingerprints and name not in self._before:
                self._before[name] = sampled(own).clone()
            if name in self._fingerprints:
                self._compare_between(name, p)
            self._passes[name] = self._passes.get(name, 0) + 1

    def _compare_between(self, name: str, p: Tensor) -> None:
        """Note whether a gradient was changed since the last pass, just before the next one."""
        grad = part_of_gradient(p)
        if grad is None:  # a new beginning: a skipped step may have left something
            for records in (self._fingerprints, self._passes, self._changed):
                records.pop(name, None)
        elif name in self._fingerprints and not grad.is_sparse:
            now = sampled(grad)
            before = self._fingerprints[name][:-2]
            changed = ((now != before) & ~(now.isnan() & before.isnan())).any() & now.any()
            self._changed[name] = changed | self._changed.get(name, torch.zeros_like(changed))

    def _before_pass(self, name: str, p: Tensor) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            self._compare_between(name, p)
            if name not in self._fingerprints and not grad.is_sparse:
                self._before[name] = sampled(grad).clone()  # `_after_pass` subtracts it from the sum

        return hook

    def _after_pass(self, name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            grad = p.grad
            if grad is not None and not grad.is_sparse and grad.numel():
                if name not in self._fingerprints and name in self._before and not is_sharded(p):
                    self._before[name] = sampled(grad) - self._before[name]
                if not self._reduced:
                    self._record(name, p, grad)
                    return
                if not self._waiting:  # DistributedDataParallel ends its work in a callback queued meanwhile
                    engine = torch.autograd.Variable._execution_engine
                    engine.queue_callback(lambda: engine.queue_callback(self._end_pass))
                self._waiting[name] = p

        return hook

    def _end_pass(self) -> None:
        for name, p in self._waiting.items():
            grad = part_of_gradient(p)
            if grad is not None and self._hooks:
                self._record(name, p, grad)
        self._waiting = {}

    def _record(self, name: str, p: Tensor, grad: Tensor) -> None:
        self._fingerprints[name] = _fingerprint(grad)
        if not is_sharded(p) or self._call < 0:  # `_begin_pass` counts, if the model calls hooks
            self._passes[name] = self._passes.get(name, 0) + 1
        self._weights[name] = p, p._version
        self._entries[name] = sampled(p.detach()).clone()
        self._calls[name] = torch._C._current_graph_task_id()

    @torch.no_grad()
    def jacobian(self, grads: Tensors, own_norm: OwnNorm, standing: Tensors | None = None) -> Clipped | None:
        """Return the map w -> J^T w of what happened to the gradient since `backward`; None if nothing did.

        Args:
            grads: the gradients that the optimisers get, without loss scale, by weight.
            own_norm: called at the first few hyper-steps at which the gradient was multiplied by a constant.
            standing: gradients of weights of the model that no optimiser moves. Those of another call of
                `backward`, as of the other network of a GAN, do not count.

        Raises:
            UnknownGradient: what happened fits no known case, or another hyper-step is needed to tell.
        """
        left = {name: t for name, t in self._fingerprints.items() if name in grads}
        self.examples = self._counter.count
        calls = {self._calls[name] for name in grads if name in self._calls}
        grads = grads | {n: g for n, g in (standing or {}).items() if self._calls.get(n) in {None, *calls}}
        before_first = {name: t for name, t in self._before.items() if name in grads}
        self.carried = self._somewhere(bool(t.any()) for t in _fetched(before_first).values())
        self.passes = max((n for name, n in self._passes.items() if name in grads), default=1)
        unwatched = {n: self._params.get(n) for n in grads if n not in self._watched}
        new = [n for n, p in unwatched.items() if p is None or p.requires_grad]  # None: added just now
        moved = self._moved(name for name in self._weights if name in grads or self._calls[name] in calls)
        changed = self._in_some({n: bool(flag) for n, flag in self._changed.items() if n in grads})
        self.rest()
        _require_unchanged(moved, changed)
        unseen = {name: grads[name] for name in self._watched if name in grads and name not in left}
        if self._somewhere(bool(g.any()) for g in unseen.values()):
            self._require_not_clipped(unseen)
        before, after = self._whole(left), self._whole({name: _fingerprint(grads[name]) for name in left})
        if all(same_entries(before[name], after[name]) for name in left):
            return None
        if new:
            raise UnknownGradient(
                "where a loop clips or scales, no weight may be unfrozen or added just before a hyper-step, "
                f"but {new[0]} was; the next hyper-step will tell what happens to its gradient."
            )
        scale = loss_scale()
        factors = _factors(before, after, scale)
        if not all(math.isfinite(number) for found in factors.values() for number in found):
            return None  # this hyper-step fails anyway
        tolerance = {name: _tolerance(grads[name]) for name in left}
        limit = _limit(factors, tolerance)
        if limit is not None and all(
            _is_cut_off(limit, before[name], after[name], scale, tolerance[name]) for name in left
        ):
            return Clipped(limit=limit, grads=grads, parts=self._parts)
        groups = _grouped(factors, tolerance)
        if len(groups) == 1:  # weights whose gradient is 0 were clipped with the others
            groups[0][1].extend(name for name in left if name not in factors)
        return self._of_groups(groups, grads, self.passes, own_norm)

    def _moved(self, names: Iterable[str]) -> list[str]:
        """Return which of these weights changed since their last backward pass."""
        weights = {name: self._weights[name] for name in names}
        before = _fetched({name: self._entries[name] for name in weights})
        after = _fetched({name: sampled(p.detach()) for name, (p, _) in weights.items()})
        return self._in_some(
            {
                name: p._version != version or not same_entries(before[name], after[name])
                for name, (p, version) in weights.items()
            }
        )

    def _in_some(self, flags: Mapping[str, bool]) -> list[str]:
        """Return the names whose flag is set in some process."""
        return [name for name, flag in zip(flags, self._parts.any(flags.values()), strict=True) if flag]

    def _somewhere(self, flags: Iterable[bool]) -> bool:
        """Return whether any flag is set in any process."""
        return self._parts.any([any(flags)])[0]

    def _norm(self, tensors: Tensors) -> float:
        """Return the Euclidean norm over all entries of the whole tensors."""
        return self._parts.norms([_norm(tensors)])[0]

    def _whole(self, fingerprints: Tensors) -> Tensors:
        """Return the fingerprints of whole gradients, in float64 on the CPU, given those of the parts."""
        own = _fetched(fingerprints)
        if self._parts.count == 1:
            return own
        found = {}
        for name, each in self._parts.gathered({n: v.roll(2) for n, v in own.items()}, SAMPLED + 2).items():
            largest, norms = each[:, 0].max(), each[:, 1].norm()
            # zeros fill short vectors; they are compared as entries whose gradient is 0
            found[name] = torch.cat([each[:, 2:].flatten(), torch.stack([largest, norms])])
        return found

    def _require_not_clipped(self, grads: Tensors) -> None:
        """Raise `UnknownGradient` unless `max_grad_norm` shows that these gradients were not clipped.

        They did not come from `backward`. Only the user can say what was done to such gradients.
        """
        if self._max_norm is None:
            raise UnknownGradient(
                "the gradient must come from backward(), but it was written into .grad by other means, so "
                "the tuner cannot tell what was done to it; pass max_grad_norm=math.inf if nothing was."
            )
        if self._norm(grads) >= self._max_norm * (1 - SAME_NORM):
            raise UnknownGradient(
                "a clipped gradient must come from backward(), but it was written into .grad by other means."
            )

    def _of_groups(
        self, groups: list[tuple[float, list[str]]], grads: Tensors, passes: int, own_norm: OwnNorm
    ) -> Clipped | None:
        """Tell clipping from a constant factor in each (factor, names of weights)."""
        norms: list[tuple[Tensors, float, float]] = []
        factors: dict[str, float] = {}
        unknown: UnknownGradient | None = None
        for factor, names in groups:
            tolerance = max(_tolerance(grads[name]) for name in names)
            if abs(factor - 1) <= tolerance:
                continue
            if factor == 0:
                factors |= dict.fromkeys(names, 0.0)
                continue
            group, together = frozenset(names), {name: grads[name] for name in names}
            size = self._norm(together)
            try:
                clipped = self._is_clipped(group, factor, size, passes, max(1e-6, tolerance))
            except UnknownGradient as error:  # go on: the factors of the other groups are needed next time
                unknown = error
                continue
            if clipped:
                _require_scaler(self._excess_of(group, size, factor, own_norm))
                if self._divides:  # the sum was divided by the passes before it was clipped
                    factor *= passes
                unit = {name: g / size for name, g in together.items()}
                norms.append((unit, factor, size / (size + EPSILON * factor)))
            elif abs(factor * passes - 1) < SAME:
                self._divides = True
            elif not self._scales_loss(group, size, factor, own_norm):
                factors |= dict.fromkeys(names, factor)
        if unknown is not None:
            raise unknown
        return Clipped(norms=norms, factors=factors, parts=self._parts) if norms or factors else None

    def _excess_of(self, group: frozenset[str], size: float, factor: float, own_norm: OwnNorm) -> float:
        """Return |gradient of `backward`| / |gradient of `loss_fn`|, the geometric mean of a few hyper-steps.

        It is 1 after clipping by a factor within FAR, where it is not needed.

        Args:
            size: norm of the gradient that the optimiser gets.
            factor: that norm / |gradient of `backward`|.
        """
        is_far = not 1 / FAR < abs(factor) < FAR
        if group in self._norms and not is_far:
            return 1.0
        seen = self._excess.setdefault(group, [])
        if len(seen) < (
            1 if is_far else LOOKS
        ):  # the smaller the factor, the more batches it takes to see it
            own = own_norm(group)
            excess = size / abs(factor) / own if own else math.nan
            seen.append(math.log(excess) if 0 < excess < math.inf else 0.0)
        return math.exp(sum(seen) / len(seen))

    def _scales_loss(self, group: frozenset[str], size: float, factor: float, own_norm: OwnNorm) -> bool:
        """Return whether a constant factor undoes the scale 1/factor that the loop puts on its loss."""
        excess = self._excess_of(group, size, factor, own_norm)
        return abs(math.log(excess)) > abs(math.log(excess * abs(factor)))

    def _is_clipped(
        self, group: frozenset[str], factor: float, size: float, passes: int, rounding: float
    ) -> bool:
        """Return whether the common factor of these weights came from clipping, not from a constant factor.

        Args:
            size: norm of the gradient that the optimiser gets.
            rounding: relative difference up to which norms after clipping are equal.
        """
        if any(abs(size / norm - 1) < SAME_NORM for norm in (self._max_norm, self._norms.get(group)) if norm):
            return True
        if abs(factor * passes - 1) < SAME:  # accumulation summed the gradients, then divided by the passes
            return False
        known = self._factors.setdefault(group, [])
        known.append((factor, size))
        if len(known) == 1:
            raise UnknownGradient(
                f"the gradient was multiplied by {factor:.4g} between backward and step, by clipping or by a "
                "constant factor; the next hyper-step will tell, or pass max_grad_norm=."
            )
        same_factor = all(abs(f / factor - 1) < SAME for f, _ in known)
        limit = size + EPSILON * factor  # clipping by another norm than the 2-norm keeps nearly the same size
        same_size = all(abs((s + EPSILON * f) / limit - 1) < rounding for f, s in known)
        if same_size and not same_factor:
            self._norms[group] = size
            return True
        if same_factor:
            if not same_size:
                return False
            raise UnknownGradient(
                "the gradient must change between hyper-steps, to tell clipping from scaling, but it stayed "
                "the same; pass max_grad_norm=."
            )
        del known[:-1]
        raise UnknownGradient(
            "the gradient must be left alone between backward and step, clipped, or multiplied by one "
            f"number, but it was multiplied by {factor:.4g} to a norm of {size:.4g}, and by another number "
            "to another norm before; pass max_grad_norm= if it is clipped."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the norms and factors learned so far about the loop."""
        return {
            "norms": [(sorted(names), norm) for names, norm in self._norms.items()],
            "factors": [(sorted(names), list(seen)) for names, seen in self._factors.items()],
            "divides": self._divides,
            "excess": [(sorted(names), list(seen)) for names, seen in self._excess.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self._divides = state["divides"]
        self._norms = {frozenset(names): norm for names, norm in state["norms"]}
        self._factors = {frozenset(names): [tuple(s) for s in seen] for names, seen in state["factors"]}
        self._excess = {frozenset(names): list(seen) for names, seen in state["excess"]}


def _require_unchanged(moved: list[str], changed: list[str]) -> None:
    """Raise `UnknownGradient` if weights moved before the step, or gradients changed between two passes."""
    if changed:
        raise UnknownGradient(
            f"gradients must be left alone between the passes that are accumulated, but {len(changed)} "
            f"were changed there, such as that of {changed[0]}; clip and scale after the last pass."
        )
    if moved:
        raise UnknownGradient(
            f"weights must stand still between backward and step, but {len(moved)} were changed, such as "
            f"{moved[0]}; the gradient belongs to other weights than those that the optimiser moves."
        )


def _require_scaler(excess: float) -> None:
    """Raise `UnknownGradient` if a loop that clips scales its loss without a `GradScaler`."""
    if excess > FAR:
        raise UnknownGradient(
            "a loop that scales its loss and clips must let a GradScaler call the optimiser, but the "
            f"gradient of backward is {excess:.0f} times as long as that of loss_fn; use "
            "scaler.step(optimizer), or scale loss_fn alike."
        )


class StandingWeights:
    """Notices weights that the loop changes after the optimiser's step, for instance by clamping."""

    def __init__(self) -> None:
        self._weights: Tensors = {}
        self._noted: Tensors = {}
        self._said = False

    def note(self, params: Mapping[str, Tensor]) -> None:
        """Remember some entries of the weights as the optimiser left them."""
        if not self._said:
            self._weights = dict(params)
            self._noted = {name: sampled(p).clone() for name, p in params.items() if p.numel()}

    def forget(self) -> None:
        """Skip the next comparison, for instance because a state was loaded."""
        self._noted = {}

    def compare(self) -> None:
        """Warn, once in a run, if noted weights have changed before the next step."""
        if not self._noted:
            return
        before = _fetched(self._noted)
        now = _fetched({name: sampled(self._weights[name]) for name in before})
        finite = [n for n in before if bool(now[n].isfinite().all())]  # NaNs mean divergence, not clamping
        changed = [n for n in finite if before[n].shape != now[n].shape or not _close(before[n], now[n])]
        self._weights, self._noted = {}, {}
        if changed:
            self._said = True
            warn(
                f"{len(changed)} weights, such as {changed[0]}, were changed between two optimiser steps, by "
                "clamping or normalising them, say; hypergradients are those of the optimiser's step alone.",
            )


def calling_scaler() -> torch.amp.GradScaler | None:
    """Return the enabled `GradScaler` that is calling `step` now; None if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.amp.GradScaler) and caller.is_enabled():
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def loss_scale() -> float:
    """Return the scale that the `GradScaler` calling `step` put on the loss; 1 without one."""
    scaler = calling_scaler()
    return 1.0 if scaler is None else float(scaler.get_scale())


def scaler_stage(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> str:
    """Return what a `GradScaler` did since its last `update`: "READY" (nothing), "UNSCALED" or "STEPPED"."""
    state = scaler._per_optimizer_states.get(id(optimizer))
    return "READY" if state is None else str(state["stage"].name)


def sampled(t: Tensor) -> Tensor:
    """Return up to SAMPLED entries, spread evenly, as a vector."""
    flat: Tensor = part(t).detach().reshape(-1)
    stride = max(1, flat.numel() // SAMPLED)
    return flat[: SAMPLED * stride : stride]


def same_entries(one: Tensor, other: Tensor) -> bool:
    """Return whether two vectors are equal, NaN to NaN."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _fingerprint(grad: Tensor) -> Tensor:
    """Return a vector: some entries of a gradient, then the largest size of an entry, then the norm."""
    grad = grad.detach()
    if not grad.numel():  # this process has no part of a short weight
        return torch.zeros(2, dtype=grad.dtype, device=grad.device)
    low, high = torch.aminmax(grad)
    largest = torch.maximum(-low, high)
    return torch.cat([sampled(grad), largest[None], torch.linalg.vector_norm(grad)[None]])


def _fetched(vectors: Tensors) -> Tensors:
    """Return the vectors in float64 on the CPU; one transfer per device and type, for each is waited for."""
    found: Tensors = {}
    for kind in {(v.device, v.dtype) for v in vectors.values()}:
        there = {name: v for name, v in vectors.items() if (v.device, v.dtype) == kind}
        whole = torch.cat(list(there.values())).double().cpu()
        parts = whole.split([len(v) for v in there.values()])  # type: ignore[no-untyped-call]
        found |= dict(zip(there, parts, strict=True))
    return {name: found[name] for name in vectors}


def _close(one: Tensor, other: Tensor) -> bool:
    """Return whether two vectors are equal up to rounding, as of weights swapped for their average."""
    return torch.allclose(one, other, rtol=SAME, atol=SAME * float(one.abs().max()), equal_nan=True)


class _Factors(NamedTuple):
    """By what the entries of one weight's gradient were multiplied.

    Attributes:
        least, greatest: over the entries compared.
        of_largest: the factor of the largest entry.
        largest: the size of the largest entry now.
    """

    least: float
    greatest: float
    of_largest: float
    largest: float

    def is_uneven(self, tolerance: float) -> bool:
        return self.greatest - self.least > tolerance * max(abs(self.greatest), abs(self.least))


def _factors(before: Tensors, after: Tensors, scale: float) -> dict[str, _Factors]:
    """Compare fingerprints of gradients, name -> factors; without those of gradient 0 before."""
    found = {}
    for name in before:
        *was, norm_was = (before[name] / scale).tolist()
        *now, norm_now = after[name].tolist()
        factors = [y / x for x, y in zip(was, now, strict=True) if x != 0]
        if factors:
            of_largest = now[-1] / was[-1] if was[-1] else math.nan
            of_norm = norm_now / norm_was if norm_was else math.nan
            if abs(of_norm - of_largest) > SAME * abs(of_largest):  # a mask, say, on entries not sampled
                factors.append(of_norm)
            found[name] = _Factors(min(factors), max(factors), of_largest, now[-1])
    return found


def _tolerance(grad: Tensor) -> float:
    """Return a few roundings of the type; scaling and clipping round once each."""
    return 16 * torch.finfo(grad.dtype).eps


def _limit(factors: Mapping[str, _Factors], tolerance: Mapping[str, float]) -> float | None:
    """Return the number at which entries were cut off; None if none were."""
    cut = {name: found for name, found in factors.items() if found.of_largest < 1 - tolerance[name]}
    rest = {name: found for name, found in factors.items() if name not in cut}
    if not cut or any(abs(f - 1) > tolerance[name] for name, found in rest.items() for f in found[:3]):
        return None
    limits = [found.largest for found in cut.values()]
    if max(limits) - min(limits) > SAME * max(limits):
        return None
    uneven = any(found.is_uneven(tolerance[name]) for name, found in cut.items())
    of_largest = [found.of_largest for found in cut.values()]
    return min(limits) if uneven or max(of_largest) - min(of_largest) > SAME * max(of_largest) else None


def _is_cut_off(limit: float, before: Tensor, after: Tensor, scale: float, tolerance: float) -> bool:
    """Return whether the sampled entries are the earlier ones cut off at the limit."""
    expected = (before[:-2] / scale).clamp(-limit, limit)
    return bool(((after[:-2] - expected).abs() <= tolerance * limit).all())


def _grouped(
    factors: Mapping[str, _Factors], tolerance: Mapping[str, float]
) -> list[tuple[float, list[str]]]:
    """Group weights with equal factors, as (factor, names); raise `UnknownGradient` for uneven ones."""
    groups: list[tuple[float, list[str]]] = []
    for name, found in factors.items():
        if found.is_uneven(tolerance[name]):
            raise UnknownGradient(
                "the gradient must be left alone between backward and step, clipped, or multiplied by one "
                f"number, but entries of {name} were multiplied by {found.least:.4g} to {found.greatest:.4g}."
            )
        for known, names in groups:
            if abs(known - found.of_largest) <= tolerance[name] * abs(known):
                names.append(name)
                break
        else:
            groups.append((found.of_largest, [name]))
    return groups


def _norm(tensors: Tensors) -> float:
    return float(torch.stack([t.double().norm() for t in tensors.values()]).norm())
