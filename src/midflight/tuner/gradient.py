"""What happens to the gradient between `backward` and `step`, and its Jacobian.

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
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from midflight._tensors import Tensors
from midflight.errors import UnknownGradient
from midflight.tuner.data import examples_of

EPSILON = 1e-6
"""torch clips by c / (|r| + EPSILON)."""
SAME, SAME_NORM = 1e-4, 1e-3
"""Up to this relative difference, factors and norms count as equal, apart from rounding in half precision."""
SAMPLED = 16
"""Entries of a weight that are compared, besides its largest."""
FAR = 16
"""A gradient that is so many times longer than another is not of the same loss."""

OwnNorm = Callable[[frozenset[str]], float]
"""Weights -> the norm of the gradient of `loss_fn` at them."""


@dataclass(frozen=True)
class Clipped:
    """The Jacobian J of clipping and scaling, as a linear map.

    Attributes:
        norms: one entry per group of weights clipped together: (u, the factor of the group, the factor on
            u u^T, which is about 1 - EPSILON / |r|).
        limit: the number at which entries were cut off; None if none were.
        grads: the gradients that the optimiser gets, by weight.
        factors: constant factors, by weight.
    """

    norms: list[tuple[Tensors, float, float]] = field(default_factory=list)
    limit: float | None = None
    grads: Tensors = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)

    def received(self, raw: Tensors) -> Tensors:
        """What the optimiser would have got for another gradient, after the same clipping and scaling."""
        factors = {**self.factors, **{name: factor for unit, factor, _ in self.norms for name in unit}}
        found = {name: factors.get(name, 1.0) * g for name, g in raw.items()}
        if self.limit is None:
            return found
        return {name: g.clamp(-self.limit, self.limit) for name, g in found.items()}

    def __call__(self, w: Tensors) -> Tensors:
        """J^T w, for the weights of w and for those clipped together with them."""
        found = dict(w)
        for name, factor in self.factors.items():
            if name in found:
                found[name] = factor * found[name]
        if self.limit is not None:
            for name in w:
                found[name] = torch.where(self.grads[name].abs() < self.limit, w[name], 0)
        for unit, factor, share in self.norms:
            along = sum(float((w[name] * u).sum()) for name, u in unit.items() if name in w)
            for name, u in unit.items():
                found[name] = factor * (w.get(name, 0) - share * along * u)
        return found


class _ExamplesSeen:
    """A hook that counts the examples that go through a model; it can be pickled with the model."""

    def __init__(self) -> None:
        self.count, self.over = 0, False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and not self.over:
            self.count += examples_of((args, kwargs)) or 0


class ReceivedGradient:
    """Watches `backward` before a hyper-step, and finds out what happened to its gradient before `step`.

    Args:
        max_grad_norm: the norm to which the loop clips, or infinity if it does not. None finds it out from
            two hyper-steps.
    """

    def __init__(self, max_grad_norm: float | None = None) -> None:
        if max_grad_norm is not None and not (max_grad_norm > 0 and max_grad_norm is not True):
            raise ValueError(f"max_grad_norm must be a positive number, but max_grad_norm={max_grad_norm}.")
        self._max_norm = max_grad_norm
        self._seen: Tensors = {}
        """What `_look` gives of the gradients that `backward` left."""
        self._passes: dict[str, int] = {}
        self._first: dict[str, Tensor] = {}
        self.carried = False
        """Whether `.grad` already held a nonzero gradient when `backward` first added to it."""
        self.examples = 0
        """How many examples the model saw for the last gradient; 0 if that is not known."""
        self.passes = 1
        """How often `backward` added to the last gradient."""
        self._hooks: list[RemovableHandle] = []
        self._counter = _ExamplesSeen()
        self._divides = False
        """Whether the loop sums gradients over several passes and then divides them by their number."""
        self._watched: list[str] = []
        self._weights: dict[str, tuple[Tensor, int]] = {}
        self._samples: Tensors = {}
        """Some entries of the weights at the last pass: a write by `.data` leaves no other trace."""
        self._touched: Tensors = {}
        """Whether a gradient was changed between two passes."""
        self._norms: dict[frozenset[str], float] = {}
        self._factors: dict[frozenset[str], list[tuple[float, float]]] = {}
        self._lengths: dict[frozenset[str], float] = {}
        """How many times longer the gradient of `backward` is than that of `loss_fn`, where asked."""

    def watch(self, model: nn.Module, params: Mapping[str, Tensor]) -> None:
        """Start to record what `backward` leaves in `.grad`, and how many examples the model sees."""
        self.rest()
        self._counter = _ExamplesSeen()
        self._watched = [name for name, p in params.items() if p.requires_grad]
        if getattr(model, "_compiled_call_impl", None) is None:  # a hook would recompile it
            self._hooks.append(model.register_forward_pre_hook(self._counter, with_kwargs=True))
        for name, p in params.items():
            if p.requires_grad:
                theirs = list((p._post_accumulate_grad_hooks or {}).items())
                self._hooks.append(p.register_hook(self._note_part(name, p)))  # type: ignore[no-untyped-call]
                self._hooks.append(p.register_post_accumulate_grad_hook(self._note(name)))  # type: ignore[no-untyped-call]
                for key, hook in theirs:  # the user's hooks, such as clipping, must run after ours
                    del p._post_accumulate_grad_hooks[key]
                    p._post_accumulate_grad_hooks[key] = hook

    def end(self) -> None:
        """The loop's passes are over; examples that the model sees from now on are not its own."""
        self._counter.over = True

    def rest(self) -> None:
        """Stop recording, and drop what was recorded."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen, self._passes, self._first, self._weights = [], {}, {}, {}, {}
        self._samples, self._touched = {}, {}

    def _note_part(self, name: str, p: Tensor) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            if p.grad is None:  # a new beginning: a skipped step may have left something
                for found in (self._seen, self._passes, self._touched):
                    found.pop(name, None)
            elif name in self._seen and not p.grad.is_sparse:
                now = _sample(p.grad.detach())
                before = self._seen[name][:-2]
                changed = ((now != before) & ~(now.isnan() & before.isnan())).any() & now.any()
                self._touched[name] = changed | self._touched.get(name, torch.zeros_like(changed))
            if name not in self._seen and not grad.is_sparse:
                self._first[name] = _sample(grad).clone()

        return hook

    def _note(self, name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            grad = p.grad
            if grad is not None and not grad.is_sparse and grad.numel():
                if name not in self._seen and name in self._first:
                    self._first[name] = _sample(grad) - self._first[name]
                self._seen[name] = _look(grad)
                self._passes[name] = self._passes.get(name, 0) + 1
                self._weights[name] = p, p._version
                self._samples[name] = _sample(p.detach()).clone()

        return hook

    @torch.no_grad()
    def jacobian(self, grads: Tensors, own_norm: OwnNorm) -> Clipped | None:
        """What happened to the gradient since `backward`, as a map w -> J^T w; None if nothing did.

        Args:
            grads: the gradients that the optimisers get, without loss scale, by weight.
            own_norm: asked where the gradient became far shorter or longer.

        Raises:
            UnknownGradient: what happened fits no known case, or another hyper-step is needed to tell.
        """
        seen = {name: s for name, s in self._seen.items() if name in grads}
        self.examples = self._counter.count
        self.carried = any(bool(left.any()) for left in _fetched(self._first).values())
        passes = self.passes = max(self._passes.values(), default=1)
        moved, touched = self._moved(), [name for name, flag in self._touched.items() if bool(flag)]
        self.rest()
        _require_still(moved, touched)
        unseen = {name: grads[name] for name in self._watched if name in grads and name not in seen}
        if any(bool(g.any()) for g in unseen.values()):
            self._require_untouched(unseen)
        before, after = _fetched(seen), _fetched({name: _look(grads[name]) for name in seen})
        if all(_equal(before[name], after[name]) for name in seen):
            return None
        scale = loss_scale()
        ratios = _ratios(before, after, scale)
        if not all(math.isfinite(number) for ratio in ratios.values() for number in ratio):
            return None  # nothing can be told, and this hyper-step fails anyway
        tolerance = {name: _tolerance(grads[name]) for name in seen}
        limit = _limit(ratios, tolerance)
        if limit is not None and all(
            _cut_at(limit, before[name], after[name], scale, tolerance[name]) for name in seen
        ):
            return Clipped(limit=limit, grads=grads)
        groups = _together(ratios, tolerance)
        if len(groups) == 1:  # weights whose gradient is 0 were clipped with the others
            groups[0][1].extend(name for name in seen if name not in ratios)
        return self._of_groups(groups, grads, passes, own_norm)

    def _moved(self) -> list[str]:
        """Weights that are others than at their last backward pass."""
        standing = _fetched(self._samples)
        after = _fetched({name: _sample(p.detach()) for name, (p, _) in self._weights.items()})
        return [
            name
            for name, (p, version) in self._weights.items()
            if p._version != version or not _equal(standing[name], after[name])
        ]

    def _require_untouched(self, grads: Tensors) -> None:
        """Raise `UnknownGradient` unless `max_grad_norm` shows that these gradients were not clipped.

        They did not come from `backward`. Only the user can say what was done to such gradients.
        """
        if self._max_norm is None:
            raise UnknownGradient(
                "the gradient must come from backward(), but it was written into .grad by other means, so "
                "the tuner cannot tell what was done to it; pass max_grad_norm=math.inf if nothing was."
            )
        if _norm(grads) >= self._max_norm * (1 - SAME_NORM):
            raise UnknownGradient(
                "a clipped gradient must come from backward(), but it was written into .grad by other means."
            )

    def _of_groups(
        self, groups: list[tuple[float, list[str]]], grads: Tensors, passes: int, own_norm: OwnNorm
    ) -> Clipped | None:
        norms: list[tuple[Tensors, float, float]] = []
        factors: dict[str, float] = {}
        unknown: UnknownGradient | None = None
        for ratio, names in groups:
            if abs(ratio - 1) <= max(_tolerance(grads[name]) for name in names):
                continue
            if ratio == 0:
                factors |= dict.fromkeys(names, 0.0)
                continue
            together = {name: grads[name] for name in names}
            size = _norm(together)
            try:
                rounding = max(1e-6, *(_tolerance(grads[name]) for name in names))
                clipped = self._is_clipped(frozenset(names), ratio, size, passes, rounding)
            except UnknownGradient as error:  # go on: the factors of the other groups are needed next time
                unknown = error
                continue
            longer = self._longer(frozenset(names), size, ratio, own_norm)
            if clipped:
                if longer > FAR:
                    raise UnknownGradient(
                        "where a loop clips, a GradScaler that calls the optimiser must scale the loss, but "
                        f"the gradient of backward is {longer:.0f} times as long as that of loss_fn; use "
                        "scaler.step(optimizer), or scale loss_fn alike."
                    )
                if self._divides:  # the sum was divided by the passes before it was clipped
                    ratio *= passes
                unit = {name: g / size for name, g in together.items()}
                norms.append((unit, ratio, size / (size + EPSILON * ratio)))
            elif abs(ratio * passes - 1) < SAME:
                self._divides = True
            elif abs(math.log(longer)) <= abs(math.log(longer * abs(ratio))):  # not a loss scaled by 1/ratio
                factors |= dict.fromkeys(names, ratio)
        if unknown is not None:
            raise unknown
        return Clipped(norms=norms, factors=factors) if norms or factors else None

    def _longer(self, names: frozenset[str], size: float, ratio: float, own_norm: OwnNorm) -> float:
        """How many times longer the gradient of `backward` is than that of `loss_fn`; 1 if not asked.

        Args:
            size: norm of the gradient that the optimiser gets.
            ratio: what it was multiplied by.
        """
        if 1 / FAR < abs(ratio) < FAR:
            return 1.0
        if names not in self._lengths:
            own = own_norm(names)
            longer = size / abs(ratio) / own if own else math.nan
            self._lengths[names] = longer if 0 < longer < math.inf else 1.0
        return self._lengths[names]

    def _is_clipped(
        self, names: frozenset[str], ratio: float, size: float, passes: int, rounding: float
    ) -> bool:
        """Whether the common factor of these weights came from clipping, not from a constant factor."""
        if any(abs(size / norm - 1) < SAME_NORM for norm in (self._max_norm, self._norms.get(names)) if norm):
            return True
        if abs(ratio * passes - 1) < SAME:  # accumulation summed the gradients, then divided by the passes
            return False
        known = self._factors.setdefault(names, [])
        known.append((ratio, size))
        if len(known) == 1:
            raise UnknownGradient(
                f"the gradient was multiplied by {ratio:.4g} between backward and step, by clipping or by a "
                "constant factor; the next hyper-step will tell, or pass max_grad_norm=."
            )
        same_ratio = all(abs(r / ratio - 1) < SAME for r, _ in known)
        limit = size + EPSILON * ratio  # clipping by another norm than the 2-norm keeps nearly the same size
        same_size = all(abs((s + EPSILON * r) / limit - 1) < rounding for r, s in known)
        if same_size and not same_ratio:
            self._norms[names] = size
            return True
        if same_ratio:
            if not same_size:
                return False
            raise UnknownGradient(
                "the gradient must change between hyper-steps, to tell clipping from scaling, but it stayed "
                "the same; pass max_grad_norm=."
            )
        del known[:-1]
        raise UnknownGradient(
            f"the gradient must be left alone between backward and step, clipped, or multiplied by one "
            f"number, but it was multiplied by {ratio:.4g} to a norm of {size:.4g}, and by another number to "
            "another norm before; pass max_grad_norm= if it is clipped."
        )

    def state_dict(self) -> dict[str, Any]:
        """The norms and factors learned so far about the loop."""
        return {
            "norms": [(sorted(names), norm) for names, norm in self._norms.items()],
            "factors": [(sorted(names), list(seen)) for names, seen in self._factors.items()],
            "divides": self._divides,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict`."""
        self._divides = state["divides"]
        self._norms = {frozenset(names): norm for names, norm in state["norms"]}
        self._factors = {frozenset(names): [tuple(s) for s in seen] for names, seen in state["factors"]}


def _require_still(moved: list[str], touched: list[str]) -> None:
    """Raise `UnknownGradient` if weights moved before the step, or gradients changed between two passes."""
    if touched:
        raise UnknownGradient(
            f"gradients must be left alone between the passes that are accumulated, but {len(touched)} "
            f"were changed there, such as that of {touched[0]}; clip and scale after the last pass."
        )
    if moved:
        raise UnknownGradient(
            f"weights must stand still between backward and step, but {len(moved)} were changed, such as "
            f"{moved[0]}; the gradient belongs to other weights than those that the optimiser moves."
        )


class StandingWeights:
    """Notices weights that the loop changes after the optimiser's step, for instance by clamping."""

    def __init__(self) -> None:
        self._weights: Tensors = {}
        self._noted: Tensors = {}
        self._said = False

    def note(self, params: Mapping[str, Tensor]) -> None:
        """The weights as the optimiser left them."""
        if not self._said:
            self._weights = dict(params)
            self._noted = {name: _sample(p).clone() for name, p in params.items() if p.numel()}

    def forget(self) -> None:
        """Compare nothing: the weights were loaded, say."""
        self._noted = {}

    def compare(self) -> None:
        """Warn, once in a run, if they are others before the next step."""
        if not self._noted:
            return
        before = _fetched(self._noted)
        now = _fetched({name: _sample(self._weights[name]) for name in before})
        finite = [
            n for n in before if bool(now[n].isfinite().all())
        ]  # a loop that diverges is told otherwise
        changed = [n for n in finite if before[n].shape != now[n].shape or not _close(before[n], now[n])]
        self._weights, self._noted = {}, {}
        if changed:
            self._said = True
            warnings.warn(
                f"{len(changed)} weights, such as {changed[0]}, were changed between two optimiser steps, by "
                "clamping or normalising them, say; hypergradients are those of the optimiser's step alone.",
                stacklevel=2,
            )


def calling_scaler() -> torch.amp.GradScaler | None:
    """The `GradScaler` that is calling `step` now; None if there is none, or if it is disabled."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.amp.GradScaler) and caller.is_enabled():
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def loss_scale() -> float:
    """The scale that the `GradScaler` calling `step` put on the loss; 1 without one."""
    scaler = calling_scaler()
    return 1.0 if scaler is None else float(scaler.get_scale())


def scaler_stage(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> str:
    """What a `GradScaler` did to an optimiser since its last `update`: "READY", "UNSCALED" or "STEPPED"."""
    state = scaler._per_optimizer_states.get(id(optimizer))
    return "READY" if state is None else str(state["stage"].name)


def _largest(grad: Tensor) -> Tensor:
    low, high = torch.aminmax(grad.detach())
    return torch.maximum(-low, high)


def _sample(grad: Tensor) -> Tensor:
    flat = grad.detach().reshape(-1)
    stride = max(1, flat.numel() // SAMPLED)
    return flat[: SAMPLED * stride : stride]


def _look(grad: Tensor) -> Tensor:
    """Some entries of a gradient, then the largest, then the norm."""
    grad = grad.detach()
    return torch.cat([_sample(grad), _largest(grad)[None], torch.linalg.vector_norm(grad)[None]])


def _fetched(vectors: Tensors) -> Tensors:
    """The vectors in float64 on the CPU; one transfer from each device, for each waits for it."""
    found: Tensors = {}
    for kind in {(v.device, v.dtype) for v in vectors.values()}:
        there = {name: v for name, v in vectors.items() if (v.device, v.dtype) == kind}
        whole = torch.cat(list(there.values())).double().cpu()
        parts = whole.split([len(v) for v in there.values()])  # type: ignore[no-untyped-call]
        found |= dict(zip(there, parts, strict=True))
    return {name: found[name] for name in vectors}


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two vectors on the CPU are equal, NaN to NaN."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two vectors are equal up to the rounding of weights that were exchanged and put back."""
    return torch.allclose(one, other, rtol=SAME, atol=SAME * float(one.abs().max()), equal_nan=True)


def _ratios(before: Tensors, after: Tensors, scale: float) -> dict[str, tuple[float, float, float, float]]:
    """Weight -> (least factor, greatest factor, factor of the largest entry, the largest entry now)."""
    found = {}
    for name in before:
        *was, norm_was = (before[name] / scale).tolist()
        *now, norm_now = after[name].tolist()
        ratios = [y / x for x, y in zip(was, now, strict=True) if x != 0]
        if ratios:
            largest = now[-1] / was[-1] if was[-1] else math.nan
            whole = norm_now / norm_was if norm_was else math.nan
            if abs(whole - largest) > SAME * abs(largest):  # a mask, say, on entries not sampled
                ratios.append(whole)
            found[name] = min(ratios), max(ratios), largest, now[-1]
    return found


def _tolerance(grad: Tensor) -> float:
    """A few roundings of the type; scaling and clipping round once each."""
    return 16 * torch.finfo(grad.dtype).eps


def _limit(
    ratios: Mapping[str, tuple[float, float, float, float]], tolerance: Mapping[str, float]
) -> float | None:
    """The number at which entries were cut off; None if none were."""
    cut = {name for name, (_, _, largest, _) in ratios.items() if largest < 1 - tolerance[name]}
    rest = [ratios[name] + (tolerance[name],) for name in ratios if name not in cut]
    if not cut or any(abs(ratio - 1) > far for *some, _, far in rest for ratio in some):
        return None
    limits = [ratios[name][3] for name in cut]
    if max(limits) - min(limits) > SAME * max(limits):
        return None
    uneven = any(_is_uneven(ratios[name], tolerance[name]) for name in cut)
    factors = [ratios[name][2] for name in cut]
    return min(limits) if uneven or max(factors) - min(factors) > SAME * max(factors) else None


def _cut_at(limit: float, before: Tensor, after: Tensor, scale: float, tolerance: float) -> bool:
    """Whether the sampled entries are the earlier ones cut off at the limit."""
    expected = (before[:-2] / scale).clamp(-limit, limit)
    return bool(((after[:-2] - expected).abs() <= tolerance * limit).all())


def _is_uneven(ratio: tuple[float, float, float, float], tolerance: float) -> bool:
    least, greatest, *_ = ratio
    return greatest - least > tolerance * max(abs(greatest), abs(least))


def _together(
    ratios: Mapping[str, tuple[float, float, float, float]], tolerance: Mapping[str, float]
) -> list[tuple[float, list[str]]]:
    """Weights with equal factors, as (factor, names)."""
    groups: list[tuple[float, list[str]]] = []
    for name, ratio in ratios.items():
        if _is_uneven(ratio, tolerance[name]):
            raise UnknownGradient(
                f"the gradient must be left alone between backward and step, clipped, or multiplied by one "
                f"number, but entries of {name} were multiplied by {ratio[0]:.4g} to {ratio[1]:.4g}."
            )
        factor = ratio[2]
        for known, names in groups:
            if abs(known - factor) <= tolerance[name] * abs(known):
                names.append(name)
                break
        else:
            groups.append((factor, [name]))
    return groups


def _norm(tensors: Tensors) -> float:
    return float(torch.stack([t.double().norm() for t in tensors.values()]).norm())
